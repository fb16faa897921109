"""Figures from artefacts: every function takes data and draws it.

Given `ax` a function draws there and returns it. Without, it makes a figure, already
closed for pyplot so that a notebook shows it once, and returns the figure. Works on
any matplotlib backend. Diagrams and Figure 1 are in `univg_nb.figures.diagrams`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from univg_nb import paper
from univg_nb.figures.drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY
from univg_nb.train.difficulty import (
    EASY_ABOVE,
    HARD_BELOW,
    difficulty_bin,
    difficulty_weight,
)

MODEL_COLOURS = {
    "base": GREY,
    "sft_nocot": SKY,
    "sft_lora": BLUE,
    "sft_qlora": PURPLE,
    "grpo_none": ORANGE,
    "grpo_exp": RED,
}
BIN_COLOURS = {"easy": GREEN, "medium": ORANGE, "hard": RED}
_SPARE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)


def colour_of(name: str, index: int) -> str:
    """A model's fixed colour, or the next of the palette for other names."""
    return MODEL_COLOURS.get(name, _SPARE[index % len(_SPARE)])


def new_axes(
    ax: Axes | None, width: float, height: float
) -> tuple[Figure | Axes, Axes]:
    """(what to return, where to draw): the given axes, or a new figure and its axes."""
    if ax is not None:
        return ax, ax
    figure = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(figure)
    return figure, figure.add_subplot()


def tidy(ax: Axes) -> None:
    """Light grid, no box: the look of every chart here."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)


def save(figure: Figure, path: str | Path, dpi: int = 110) -> Path:
    """Write the figure as PNG so that a half-written file is never seen."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, dpi=dpi, format="png")
    os.replace(temporary, path)
    return path


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average, (N,) -> (N,); the window shrinks at both ends."""
    rolling = pd.Series(values, dtype=float).rolling(window, center=True, min_periods=1)
    return rolling.mean().to_numpy()


def training_curve(
    runs: Mapping[str, Iterable[Mapping[str, Any]]],
    key: str = "loss",
    window: int | None = None,
    ax: Axes | None = None,
) -> Figure | Axes:
    """One logged value over the updates, a line per run, raw points pale behind.

    runs: {name: rows of metrics.jsonl}; rows without `key` are passed over.
    window: updates averaged, by default a tenth. Raises ValueError if no row has `key`.
    """
    result, ax = new_axes(ax, 6.5, 3.8)
    for index, (name, rows) in enumerate(runs.items()):
        rows = list(rows)
        points = [(row["step"], row[key]) for row in rows if key in row]
        if not points:
            logged = sorted({k for row in rows for k in row} - {"step"})
            raise ValueError(f"{name}: no row has {key!r}; logged: {', '.join(logged)}")
        steps, values = zip(*points, strict=True)
        colour = colour_of(name, index)
        ax.plot(steps, values, ".", color=colour, alpha=0.25, markersize=5)
        line = smooth(values, window or max(1, len(values) // 10))
        ax.plot(steps, line, color=colour, linewidth=2, label=name)
    ax.set(xlabel="update", ylabel=key.replace("_", " "))
    if len(runs) > 1:
        ax.legend(frameon=False)
    tidy(ax)
    return result


def training_curves(
    runs: Mapping[str, Iterable[Mapping[str, Any]]],
    keys: Sequence[str] = ("loss", "reward"),
    window: int | None = None,
) -> Figure:
    """`training_curve` for several logged values, side by side."""
    figure = plt.figure(figsize=(5.2 * len(keys), 3.8), layout="constrained")
    plt.close(figure)
    runs = {name: list(rows) for name, rows in runs.items()}
    for index, key in enumerate(keys):
        axes = figure.add_subplot(1, len(keys), index + 1)
        training_curve(runs, key, window, ax=axes)
    return figure


def difficulty_over_training(
    shares: pd.DataFrame,
    published: bool = True,
    window: int | None = None,
    ax: Axes | None = None,
) -> Figure | Axes:
    """Figure 3: shares of easy, medium and hard groups over the updates.

    shares: `tables.difficulty_shares`. Raw shares are dots, lines are smoothed over
    `window` updates (by default a tenth), trends are dashed. The paper's curves lie
    behind in grey.
    """
    result, ax = new_axes(ax, 8.5, 4.8)
    steps = shares.index.to_numpy(dtype=float)
    window = window or max(1, len(steps) // 10)
    if published:
        _published_shares(ax, steps)
    for name, colour in BIN_COLOURS.items():
        values = shares[name].to_numpy()
        ax.plot(steps, values, "o", color=colour, alpha=0.22, markersize=3.5)
        line = smooth(values, window)
        ax.plot(steps, line, color=colour, linewidth=2.2, label=_BIN_LABELS[name])
        if name != "medium" and len(steps) > 1:  # the paper draws two trends
            trend = np.polyval(np.polyfit(steps, values, 1), steps)
            ax.plot(steps, trend, "--", color=colour, linewidth=1.5)
    key = f"dots: each update; lines: mean of {window}; dashed: trend"
    if published:
        key += "; grey: the paper's 500 iterations, stretched"
    ax.set_title(key, fontsize=9, loc="left", color="0.35")
    ax.set(xlabel="update", ylabel="share of groups", ylim=(0, 1))
    ax.legend(ncols=2, loc="upper left", frameon=False)
    tidy(ax)
    return result


_BIN_LABELS = {
    "easy": f"easy, mean IoU > {EASY_ABOVE}",
    "medium": "medium",
    "hard": f"hard, mean IoU < {HARD_BELOW}",
}


def _published_shares(ax: Axes, steps: np.ndarray) -> None:
    figure = paper.FIGURE_3
    x = np.interp(figure.iteration, (0, 500), (steps.min(), steps.max()))
    styles = {"easy": "-", "medium": ":", "hard": "-."}
    for name, style in styles.items():
        ax.plot(x, getattr(figure, name), style, color="0.72", label=f"paper: {name}")


def weight_functions(
    forms: Sequence[str] = ("exp", "power", "log", "log_released"),
    ax: Axes | None = None,
) -> Figure | Axes:
    """phi over the mean IoU of a group, as `difficulty_weight` gives it."""
    result, ax = new_axes(ax, 6.8, 4.2)
    m = torch.linspace(0, 1, 501)
    ax.axvspan(0, HARD_BELOW, color=RED, alpha=0.07, linewidth=0)
    ax.axvspan(EASY_ABOVE, 1, color=GREEN, alpha=0.07, linewidth=0)
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
    for index, form in enumerate(forms):
        # the two logs differ only below 0: dashes show both
        style = "--" if form == "log_released" else "-"
        colour = (BLUE, PURPLE, ORANGE, "black", SKY, GREY)[index % 6]
        phi = difficulty_weight(m, form)
        ax.plot(m, phi, style, color=colour, linewidth=2, label=form)
    top = ax.get_ylim()[1]
    ax.text(HARD_BELOW / 2, top, "hard", ha="center", va="bottom", color=RED)
    ax.text((1 + EASY_ABOVE) / 2, top, "easy", ha="center", va="bottom", color=GREEN)
    ax.set(xlabel="mean IoU of the group", ylabel="weight φ", xlim=(0, 1))
    ax.set_ylim(top=top)
    ax.legend(frameon=False)
    tidy(ax)
    return result


def accuracy_bars(results: pd.DataFrame, ax: Axes | None = None) -> Figure | Axes:
    """Acc@0.5 per task with 95 % intervals, a bar per model (`tables.result_table`)."""
    columns = [c for c in dict.fromkeys(results["column"]) if c != "Pooled"]
    models = list(dict.fromkeys(results["model"]))
    result, ax = new_axes(ax, max(6.0, 1.1 * len(columns) + 1), 4.4)
    width = 0.84 / len(models)
    table = results.set_index(["model", "column"])
    for index, model in enumerate(models):
        rows = table.loc[model].reindex(columns)
        x = np.arange(len(columns)) - 0.42 + width * (index + 0.5)
        spread = [rows["acc"] - rows["lo"], rows["hi"] - rows["acc"]]
        errors = np.maximum(spread, 0)  # rounding can leave -1e-14
        style = {"ecolor": "0.25", "elinewidth": 0.9, "capsize": 1.5}
        colour = colour_of(model, index)
        ax.bar(
            x,
            rows["acc"],
            width * 0.94,
            yerr=errors,
            color=colour,
            label=model,
            error_kw=style,
        )
    if "AVG" in columns and len(columns) > 1:
        ax.axvline(columns.index("AVG") - 0.5, color="0.6", linewidth=0.8)
    ax.set_xticks(range(len(columns)), columns)
    ax.set(ylabel="Acc@0.5, %", ylim=(0, 100))
    ax.legend(
        ncols=min(6, len(models)),
        loc="lower center",
        frameon=False,
        bbox_to_anchor=(0.5, 1.0),
    )
    tidy(ax)
    return result


def group_bars(
    ious: Sequence[float], form: str = "exp", title: str = "", ax: Axes | None = None
) -> Figure | Axes:
    """The IoU rewards of one group's replies, their mean and its weight (Figure 2b)."""
    result, ax = new_axes(ax, 4.2, 3.0)
    mean = float(np.mean(ious))
    phi = float(difficulty_weight(torch.tensor(mean), form))
    colour = BIN_COLOURS[difficulty_bin(mean)]
    ax.bar(range(1, len(ious) + 1), ious, 0.75, color=colour, alpha=0.85)
    ax.axhline(mean, color="black", linewidth=1.3, linestyle="--")
    caption = f"mean IoU {mean:.2f}, φ {phi:.2f}"
    ax.set_title(f"{title}\n{caption}" if title else caption, fontsize=11)
    ax.set_xticks(range(1, len(ious) + 1))
    ax.set(xlabel="reply", ylabel="IoU", ylim=(0, 1))
    tidy(ax)
    return result


def memory_bars(
    parts: Mapping[str, Mapping[str, float]], ax: Axes | None = None
) -> Figure | Axes:
    """Stacked bars, from 1000 MB on in GB: {"LoRA": {"weights": MB, ...}, ...}."""
    result, ax = new_axes(ax, 7.0, 0.62 * len(parts) + 1.6)
    large = max(sum(row.values()) for row in parts.values()) >= 1000
    unit, divisor = ("GB", 1000) if large else ("MB", 1)
    names = list(dict.fromkeys(part for row in parts.values() for part in row))
    labels = list(parts)
    start = np.zeros(len(labels))
    for index, name in enumerate(names):
        sizes = np.array([parts[label].get(name, 0.0) for label in labels]) / divisor
        look = {"color": _SPARE[index % len(_SPARE)], "edgecolor": "white"}
        look |= {"hatch": "////", "linewidth": 0} if index >= len(_SPARE) else {}
        ax.barh(labels, sizes, 0.6, left=start, label=name, **look)
        start += sizes
    for row, total in enumerate(start):
        ax.text(total, row, f" {total:,.3g} {unit}", va="center")
    ax.invert_yaxis()
    ax.set(xlabel=unit, xlim=(0, 1.2 * max(start.max(), 1e-9)))
    if len(names) > 1:
        ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    tidy(ax)
    ax.grid(axis="y", visible=False)
    return result


def iou_curve(
    ious: Mapping[str, Sequence[float]], ax: Axes | None = None
) -> Figure | Axes:
    """Accuracy over the IoU threshold, {model: IoU of each item}; Acc@0.5 is marked."""
    result, ax = new_axes(ax, 6.5, 4.2)
    thresholds = np.linspace(0, 1, 201)
    ax.axvline(0.5, color="0.6", linewidth=1, linestyle=":")
    for index, (name, values) in enumerate(ious.items()):
        reached = np.asarray(values)[:, None] >= thresholds  # (N, 201)
        share = 100 * reached.mean(axis=0)
        share[0] = np.nan  # IoU >= 0 holds for every reply
        colour = colour_of(name, index)
        ax.plot(thresholds, share, color=colour, linewidth=2, label=name)
        ax.plot(0.5, share[100], "o", color=colour)
    ax.set(xlabel="IoU threshold", ylabel="items at or above it, %")
    ax.set(xlim=(0, 1), ylim=(0, 100))
    ax.legend(frameon=False)
    tidy(ax)
    return result

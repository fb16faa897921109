"""Plots of artifacts: every function takes data and draws it.

A function draws into the axes `ax`, or else into those of a new figure, and returns the
figure.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from univg_nb import paper
from univg_nb.figures import drawing
from univg_nb.figures.drawing import (
    BLUE,
    GRAY,
    GREEN,
    MODEL_COLORS,
    ORANGE,
    PURPLE,
    RED,
    SKY,
)
from univg_nb.io import open_atomically
from univg_nb.train import difficulty
from univg_nb.train.difficulty import EASY_ABOVE, HARD_BELOW

# Levels of difficulty have colors that no model has: the darker, the harder.
BIN_COLORS = {"easy": "#B39DDB", "medium": "#7E57C2", "hard": "#311B92"}
# Weights have the color of the model that is trained with them, or one of their own.
FORM_COLORS = {form: MODEL_COLORS[f"grpo_{form}"] for form in ("none", "exp")}
FORM_COLORS |= {"power": "#7A7A00", "log": "#44AA99", "log_released": "black"}
_LOOKS_OF_LOGS: dict[str, dict[str, Any]] = {"log": {"ls": "-", "lw": 5, "alpha": 0.6}}
_LOOKS_OF_LOGS |= {"log_released": {"ls": "--", "lw": 1.2}}
_BIN_LABELS = {
    "easy": f"easy, mean IoU > {EASY_ABOVE}",
    "medium": "medium",
    "hard": f"hard, mean IoU < {HARD_BELOW}",
}
BIN_LINES = {"easy": "-", "medium": ":", "hard": "-."}
BIN_MARKS = {"easy": "^", "medium": "s", "hard": "v"}
# Of what becomes of items, in the order of scoring.KINDS: green is right, gray is not.
KIND_COLORS = (GREEN, "#8FD3BD", "#D6D2CA", "#A39C90", "#4D4D4D")
# Parts of memory have colors that no model has, and hatches for prints in gray.
MEMORY_LOOKS = {"weights": ("#37474F", ""), "gradients": ("#78909C", "")}
MEMORY_LOOKS |= {"optimizer": ("#B0BEC5", ""), "activations": ("#E0C48C", "")}
MEMORY_LOOKS |= {"buffers": ("#78909C", "////"), "logits": ("#A1782F", "")}
MEMORY_LOOKS |= {"runtime": ("#E0C48C", "xxxx")}
_SPARE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
# What colors say, lines and hatches say again: for prints in gray. Where two models
# coincide, the dashes of the later one let the line of the earlier one through.
MODEL_LINES = {"base": ":", "sft_nocot": "-.", "sft_qlora": "--", "grpo_exp": "--"}
RIM: list[Any] = [withStroke(linewidth=2.2, foreground="white")]  # on dark bars
INK = "#333333"  # a difference of two models has the color of neither
_LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
_MARKS = "o^sDv"
_MOST_MARKS = 150  # of single updates in a panel, for all curves together
_HATCHES = ("", "////", "....", "xxxx", "")
# What the trainers log, in words and with its unit or range.
AXIS_TITLES = {
    "loss": "loss, nats per token",
    "mean_token_accuracy": "tokens predicted right (0 to 1)",
    "reward": "mean reward: IoU + form (0 to 2)",
    "rewards/format_reward/mean": "replies in the asked form (0 to 1)",
    "kl": "KL to the reference, nats per token",
    "groups/mean_iou": "mean IoU of the replies (0 to 1)",
    "groups/weight_mean": "mean weight φ of the groups",
    "completions/mean_length": "length of a reply, tokens",
}


def color_of(name: str, index: int) -> str:
    """Return a model's own color, or that of `index` in the palette for other names."""
    return drawing.find_color(name, _SPARE[index % len(_SPARE)])


def line_of(index: int, name: str = "") -> Any:
    """Return a model's own line style, or that of the curve with that place."""
    name = drawing.MODEL_OF_WORD.get(name, name)
    if name in MODEL_COLORS:
        return MODEL_LINES.get(name, "-")
    return _LINES[index % len(_LINES)]


def style_axes(ax: Axes) -> None:
    """Set the look of every plot: a light grid, no box."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)


def create_axes(ax: Axes | None, width: float, height: float) -> tuple[Any, Axes]:
    """Return figure and axes to draw into; `ax` None makes a figure, in inches."""
    ax = drawing.create_figure(width, height).add_subplot() if ax is None else ax
    style_axes(ax)
    return ax.figure, ax


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG of 144 dpi, atomically, with what stands out of it."""
    with open_atomically(path, "wb") as handle:
        figure.savefig(handle, dpi=144, format="png", bbox_inches="tight")


def spread_columns(entries: int, most: int) -> int:
    """Return how many of `most` columns a legend takes so that its rows are even."""
    rows = -(-entries // most)
    return -(-entries // max(1, rows))


def count_updates(ax: Axes) -> None:
    """Give the axis of the updates whole numbers."""
    ax.set_xlabel("update")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Return the centered moving average, (N,) -> (N,); it is shorter at both ends."""
    rolling = pd.Series(values, dtype=float).rolling(window, center=True, min_periods=1)
    return rolling.mean().to_numpy()


# ---------------------------------------------------------------- training


def plot_training_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    keys: Sequence[str] = ("loss", "reward"),
    columns: int = 0,
) -> Figure:
    """Plot logged values over the updates, a line for each run.

    Marks are single updates, evenly chosen where there are many, of each run others. A
    line is the mean of a tenth of all updates, of fifty at most. A loss that falls to
    less than a third has a log axis: its first values do not flatten the rest.

    Args:
        runs: rows of metrics.jsonl by name; rows without a key are passed over.
        keys: the logged values; `AXIS_TITLES` says them in words.
        columns: how many panels stand side by side; 0 for all.

    Raises:
        ValueError: if no row of a run has a key.
    """
    columns = columns or len(keys)
    panels = -(-len(keys) // columns)
    # Wider figures would be shrunk on a page, and their letters with them.
    figure = drawing.create_figure(min(6.5 * columns, 9.6), 3.6 * panels)
    layout: Any = figure.get_layout_engine()
    layout.set(wspace=0.08)  # a label stays off the panel at its left
    for place, key in enumerate(keys, start=1):
        ax = figure.add_subplot(panels, columns, place)
        style_axes(ax)
        for index, (name, rows) in enumerate(runs.items()):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if not points:
                logged = ", ".join(sorted({k for row in rows for k in row} - {"step"}))
                raise ValueError(f"{name}: no row has {key!r}; logged: {logged}")
            steps, values = zip(*points, strict=True)
            color = color_of(name, index)
            look: dict[str, Any] = {"marker": _MARKS[index % len(_MARKS)], "ls": ""}
            look |= {"ms": 4, "mew": index % 2, "color": color, "alpha": 0.6}
            look["mfc"] = "none" if index % 2 else color  # open marks beside full ones
            every = -(-len(values) * len(runs) // _MOST_MARKS)
            some = slice(index * every // len(runs), None, every)
            ax.plot(steps[some], values[some], **look)
            line = smooth(values, min(50, max(1, len(values) // 10)))
            style = line_of(index, name)
            ax.plot(steps, line, style, color=color, linewidth=2, label=name)
        ax.set_ylabel(AXIS_TITLES.get(key, key.replace("_", " ")))
        if key == "loss":
            _show_ratios(ax)
        count_updates(ax)
    if len(runs) > 1:
        frame: dict[str, Any] = {"loc": "outside upper center", "frameon": False}
        each: dict[str, Any] = {
            "color": "0.6",
            "ms": 4,
            "label": "marks: single updates",
        }
        figure.axes[0].plot([], [], "o", **each)
        lines, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(lines, names, ncols=spread_columns(len(names), 4), **frame)
    return figure


def _show_ratios(ax: Axes) -> None:
    """Give values above 0 that fall far an axis on which equal ratios are equal."""
    values = np.concatenate([line.get_ydata() for line in ax.lines])
    if values.min() <= 0 or values.max() < 3 * values.min():
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel(f"{ax.get_ylabel()} (log axis)")


def plot_difficulty_shares(shares: pd.DataFrame, ax: Axes | None = None) -> Figure:
    """Plot Figure 3: shares of easy, medium and hard groups over the updates.

    The shares (`tables.compute_difficulty_shares`) are pale marks, means of a tenth of
    the updates lines with marks, their trends dashed. The paper's curves are gray.
    """
    figure, ax = create_axes(ax, 8.5, 4.8)
    steps = shares.index.to_numpy(dtype=float)
    window = max(1, len(steps) // 10)
    key = f"pale: each update; lines: mean of {window}; dashed: trend; "
    key += "gray: the paper's 500 iterations, stretched"
    curves = paper.FIGURE_3
    x = np.interp(curves.iteration, (0, 500), (steps.min(), steps.max()))
    for name, style in BIN_LINES.items():
        y = getattr(curves, name)
        ax.plot(x, y, style, color="0.72", label=f"paper: {name}")
    for name, color in BIN_COLORS.items():
        values = shares[name].to_numpy()
        marks: dict[str, Any] = {"color": color, "marker": BIN_MARKS[name]}
        pale: dict[str, Any] = {"ls": "", "alpha": 0.3, "ms": 4, "mew": 0}
        ax.plot(steps, values, clip_on=False, **marks, **pale)  # whole at 0 too
        marks |= {"markevery": window, "ms": 8, "mec": "white"}
        line, style = smooth(values, window), BIN_LINES[name]
        ax.plot(steps, line, style, lw=2.2, label=_BIN_LABELS[name], **marks)
        if name != "medium" and len(steps) > 1:  # the paper draws two trends
            trend = np.polyval(np.polyfit(steps, values, 1), steps)
            ax.plot(steps, trend, "--", color=color, linewidth=1.5)
    ax.set(ylabel="share of groups", ylim=(-0.03, 1), xlabel=f"update ({key})")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    look: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}
    ax.legend(ncols=2, frameon=False, **look)
    return figure


def plot_weight_functions(
    forms: Sequence[str] = ("exp", "power", "log", "log_released"),
) -> Figure:
    """Plot the weight over the mean IoU of a group, for forms of difficulty_weight."""
    figure, ax = create_axes(None, 6.8, 4.2)
    m = torch.linspace(0, 1, 501)
    hard, easy = BIN_COLORS["hard"], BIN_COLORS["easy"]
    ax.axvspan(0, HARD_BELOW, color=hard, alpha=0.1, linewidth=0)
    ax.axvspan(EASY_ABOVE, 1, color=easy, alpha=0.25, linewidth=0)
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
    # The two logs part near m = 1 only: a thin line on a wide one, and that end large.
    end = ax.inset_axes((0.73, 0.55, 0.24, 0.35), xlim=(0.94, 1), ylim=(-0.03, 0.11))
    end.set(xticks=(0.94, 0.98), yticks=(0, 0.1))
    for index, form in enumerate(forms):
        color = FORM_COLORS.get(form, ("black", GRAY, PURPLE, SKY)[index % 4])
        look: dict[str, Any] = {"color": color, "ls": line_of(index), "lw": 2}
        look |= _LOOKS_OF_LOGS.get(form, {})
        phi = difficulty.difficulty_weight(m, form)
        ax.plot(m, phi, label=form, **look)
        end.plot(m, phi, **look)
    end.axhline(0, color="0.4", linewidth=0.8)
    end.set_title("near m = 1", fontsize="small")
    end.tick_params(labelsize="x-small")
    top = ax.get_ylim()[1]
    ax.text(HARD_BELOW / 2, top, "hard", ha="center", va="bottom", color="0.3")
    ax.text((1 + EASY_ABOVE) / 2, top, "easy", ha="center", va="bottom", color="0.3")
    ax.set(xlabel="mean IoU of the group", ylabel="weight φ", xlim=(0, 1))
    ax.set_ylim(top=top)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.3, 1), handlelength=2)
    return figure


def plot_group_bars(
    ious: Sequence[float], form: str = "exp", title: str = "", ax: Axes | None = None
) -> Figure:
    """Plot the IoU rewards of a group's replies (0..1), their mean and its weight."""
    figure, ax = create_axes(ax, 4.2, 3.0)
    mean = float(np.mean(ious))
    phi = float(difficulty.difficulty_weight(torch.tensor(mean), form))
    numbers = range(1, len(ious) + 1)
    color = BIN_COLORS[difficulty.difficulty_bin(mean)]
    ax.bar(numbers, ious, 0.75, color=color, alpha=0.85)
    ax.axhline(mean, color="black", linewidth=1.3, linestyle="--")
    caption = f"mean IoU {mean:.2f}, φ {phi:.2f}"
    ax.set_title(f"{title}\n{caption}" if title else caption, fontsize="medium")
    ax.set_xticks(numbers)
    ax.set(xlabel="reply", ylabel="IoU", ylim=(0, 1))
    return figure


def plot_memory_bars(parts: Mapping[str, Mapping[str, float]]) -> Figure:
    """Plot memory in GB as stacked bars, from {"LoRA": {"weights": MB, ...}, ...}."""
    figure, ax = create_axes(None, 7.0, 0.62 * len(parts) + 1.6)
    sizes = pd.DataFrame(parts).fillna(0) / 1000  # parts x bars, in order of appearance
    start = np.zeros(len(parts))
    for name, row in sizes.iterrows():
        color, hatch = MEMORY_LOOKS.get(str(name), ("#BCAAA4", ""))
        look: dict[str, Any] = {"color": color, "hatch": hatch, "label": name}
        ax.barh(list(parts), row, 0.6, left=start, edgecolor="white", **look)
        start += row.to_numpy()
    for place, total in enumerate(start):
        ax.text(total, place, f" {total:,.3g} GB", va="center")
    ax.invert_yaxis()
    ax.set(xlabel="GB", xlim=(0, 1.2 * max(start.max(), 1e-9)))
    if len(sizes) > 1:
        look = {"ncols": spread_columns(len(sizes), 4), "frameon": False}
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), **look)
    ax.grid(axis="y", visible=False)
    return figure


# ---------------------------------------------------------------- evaluation


def plot_accuracy_bars(results: pd.DataFrame) -> Figure:
    """Plot Acc@0.5 for each task with 95 % intervals, a bar for each model.

    `results` is from `tables.load_result_table`. Where no interval reaches 80 %, the
    axis ends at the next ten above the highest, and its label says so.
    """
    columns = [c for c in dict.fromkeys(results["column"]) if c != "Pooled"]
    models = list(dict.fromkeys(results["model"]))
    figure, ax = create_axes(None, max(6.0, 0.8 * len(columns) + 1), 4.2)
    width = 0.84 / len(models)
    table = results.set_index(["model", "column"])
    style: dict[str, Any] = {"ecolor": "0.25", "elinewidth": 0.9, "capsize": 1.5}
    for index, model in enumerate(models):
        rows = table.loc[model].reindex(columns)
        x = np.arange(len(columns)) - 0.42 + width * (index + 0.5)
        spread = [rows["acc"] - rows["lo"], rows["hi"] - rows["acc"]]
        errors = np.maximum(spread, 0)  # rounding can leave -1e-14
        color = color_of(model, index)
        ax.bar(x, rows["acc"], width * 0.94, label=model, color=color)
        whiskers = ax.errorbar(x, rows["acc"], errors, fmt="none", **style)
        for line in whiskers.get_children():
            line.set_path_effects(RIM)
    if "AVG" in columns and len(columns) > 1:
        ax.axvline(columns.index("AVG") - 0.5, color="0.6", linewidth=0.8)
    ax.set_xticks(range(len(columns)), columns)
    highest = results["hi"].max()
    top = 100 if not highest < 80 else 10 * (int(highest) // 10 + 1)
    label = "Acc@0.5, %" if top == 100 else f"Acc@0.5, % (axis to {top})"
    ax.set(ylabel=label, ylim=(0, top), xlim=(-0.55, len(columns) - 0.45))
    many = spread_columns(len(models), 6)
    ax.legend(ncols=many, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def plot_iou_curve(ious: Mapping[str, Sequence[float]]) -> Figure:
    """Plot the accuracy over the IoU threshold, of the items' IoUs (0..1) by model."""
    figure, ax = create_axes(None, 6.5, 4.2)
    thresholds = np.linspace(0, 1, 201)
    ax.axvline(0.5, color="0.6", linewidth=1, linestyle=":")
    for index, (name, values) in enumerate(ious.items()):
        reached = np.asarray(values)[:, None] >= thresholds  # (N, 201)
        share = 100 * reached.mean(axis=0)
        share[0] = np.nan  # IoU >= 0 holds for every reply
        look: dict[str, Any] = {"linewidth": 2, "label": name}
        look |= {"color": color_of(name, index), "linestyle": line_of(index, name)}
        ax.plot(thresholds, share, **look)
    ax.set(xlabel="IoU threshold", ylabel="items at or above it, %")
    ax.set(xlim=(0, 1), ylim=(0, 100))
    many = spread_columns(len(ious), 3)
    ax.legend(ncols=many, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return figure


def plot_kinds(counts: pd.DataFrame) -> Figure:
    """Plot what became of the items, a stacked bar for each model.

    `counts` has a row for each model and the columns `scoring.KINDS`; a row of zeros is
    a model that was not run.
    """
    figure, ax = create_axes(None, 7.0, 0.45 * len(counts) + 1.2)
    totals = counts.sum(axis=1).to_numpy()
    shares = 100 * counts.div(np.maximum(totals, 1), axis=0)
    start = np.zeros(len(counts))
    for kind, color, hatch in zip(counts, KIND_COLORS, _HATCHES, strict=True):
        look: dict[str, Any] = {"color": color, "hatch": hatch, "label": kind}
        look |= {"edgecolor": "white", "linewidth": 0}
        ax.barh(list(counts.index), shares[kind], 0.7, left=start, **look)
        start += shares[kind].to_numpy()
    for place in np.flatnonzero(totals == 0).tolist():
        ax.text(1, place, "not run", va="center", color="0.35")
    ax.invert_yaxis()
    ax.set(xlabel="share of replies, %", xlim=(0, 100))
    ax.grid(axis="y", visible=False)
    many = spread_columns(counts.shape[1], 3)
    figure.legend(loc="outside upper center", ncols=many, frameon=False)
    return figure


def plot_forest(gains: pd.DataFrame) -> Figure:
    """Plot effects with their intervals, one below the other, and the paper's beside.

    `gains` has the index what is compared and the columns ours, lo, hi, paper, in
    points; NaN is not run, or not published.
    """
    figure, ax = create_axes(None, 6.5, 0.5 * len(gains) + 1.2)
    y = np.arange(len(gains))
    ax.axvline(0, color="0.4", linewidth=0.8)
    below = 0.0  # where the paper has a value too, ours stands below it
    if gains["paper"].notna().any():
        below = 0.12
        ax.plot(gains["paper"], y - 0.16, "D", mfc="white", mec="0.35", label="paper")
    ax.hlines(y + below, gains["lo"], gains["hi"], color=INK, linewidth=1.8)
    ax.plot(gains["ours"], y + below, "o", color=INK, label="ours, 95 % interval")
    for place in np.flatnonzero(gains["ours"].isna()).tolist():
        ax.text(0, place + below, " not run", va="center", color="0.35")
    ax.set_yticks(y, gains.index)
    ax.set_ylim(len(gains) - 0.4, -0.6)
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, -2), max(high, 2))  # no axis of hundredths around zeros
    ax.set_xlabel("gain, points of Acc@0.5")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def plot_group_histogram(
    rows: Sequence[Mapping[str, Any]], ax: Axes | None = None
) -> Figure:
    """Plot how the mean IoUs of groups are spread, early and late in the training.

    `rows` are of rollouts.jsonl; early and late are the first and last third of the
    updates. The dotted lines part hard, medium and easy.
    """
    figure, ax = create_axes(ax, 5.0, 3.2)
    steps = sorted({row["step"] for row in rows})
    third = max(1, len(steps) // 3)
    filled: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.45, "color": GRAY}
    outline: dict[str, Any] = {"histtype": "step", "linewidth": 1.6, "color": BLUE}
    for name, chosen, look in (
        ("first third", steps[:third], filled),
        ("last third", steps[-third:], outline),
    ):
        values = [row["mean_iou"] for row in rows if row["step"] in chosen]
        share = [100 / len(values)] * len(values)
        look |= {"bins": 10, "range": (0, 1), "label": name}
        ax.hist(values, weights=share, **look)
    for edge in (HARD_BELOW, EASY_ABOVE):
        ax.axvline(edge, color="0.4", linewidth=0.8, linestyle=":")
    ax.set(xlabel="mean IoU of the group", ylabel="groups, %", xlim=(0, 1))
    return figure

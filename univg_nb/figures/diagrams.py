"""Figures 1 and 2 of the paper: the teaser and the pipeline.

Figure 1 is drawn from samples and results; Figure 2 is a diagram and needs no data.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from univg_nb import paper
from univg_nb.data.images import open_image
from univg_nb.data.sample import GroundingSample
from univg_nb.figures.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    TARGET_COLOUR,
    draw_boxes,
    target_image,
)
from univg_nb.figures.plots import BIN_COLOURS, colour_of, group_bars, new_axes, tidy
from univg_nb.train.difficulty import difficulty_bin

# The rewards that the paper's Figure 2 shows for an easy and a hard group come to a
# mean of 0.8 and 0.2 (PF sec. 8); the single bars are ours.
HARD_GROUP = (0.05, 0.60, 0.0, 0.35, 0.10, 0.0, 0.45, 0.05)
EASY_GROUP = (0.92, 0.75, 0.95, 0.60, 0.88, 0.70, 0.85, 0.75)
ROLLOUTS = (0.97, 0.71, 0.16)  # IoU of the three replies drawn (PF sec. 8)


def average_bars(
    results: pd.DataFrame, published: int | None = None, ax: Axes | None = None
) -> Figure | Axes:
    """A bar per model for the average accuracy, with its 95 % interval and value.

    results: `tables.result_table`. published: column of `paper.FIGURE_1` (0 MIG-Bench,
    1 zero-shot) whose values are named below the axis: they were measured on another
    benchmark, so they do not stand as bars beside ours.
    """
    rows = results[results["column"] == "AVG"]
    result, ax = new_axes(ax, 5.6, 3.8)
    errors = np.maximum([rows["acc"] - rows["lo"], rows["hi"] - rows["acc"]], 0)
    colours = [colour_of(model, i) for i, model in enumerate(rows["model"])]
    ax.bar(rows["model"], rows["acc"], 0.7, color=colours, yerr=errors, capsize=3)
    for x, row in enumerate(rows.itertuples()):
        ax.text(x, row.hi + 1.5, f"{row.acc:.1f}", ha="center", fontweight="bold")
    ax.set(ylabel="Acc@0.5, %", ylim=(0, min(118, rows["hi"].max() + 14)))
    ax.tick_params(axis="x", labelrotation=25)
    if published is not None:
        values = [
            f"{name} {row[published]:.1f}" for name, row in paper.FIGURE_1.items()
        ]
        source = "paper: " if published == 0 else "paper, mean of its five:\n"
        label = source + ", ".join(values)
        ax.set_xlabel(label, fontsize=9, color="0.35", labelpad=8)
    tidy(ax)
    return result


def teaser(
    samples: Sequence[GroundingSample],
    mig: pd.DataFrame,
    zero_shot: Mapping[str, pd.DataFrame] | None = None,
    columns: int = 5,
) -> Figure:
    """Figure 1: a picture of each task with its target, and the averages below.

    samples: one per task; the image with the target is shown (the last where it is not
    recorded). mig and zero_shot ({title: table}): `tables.result_table`.
    """
    tables = {"MIG": mig, **(zero_shot or {})}
    rows = -(-len(samples) // columns)
    figure = plt.figure(
        figsize=(2.5 * columns, 2.75 * rows + 4.2), layout="constrained"
    )
    plt.close(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.75 * rows, 4.2])
    for index, sample in enumerate(samples):
        axes = top.add_subplot(rows, columns, index + 1)
        target = target_image(sample)
        place = target if target is not None else len(sample.images) - 1
        marked = [(sample.answer, TARGET_COLOUR, "")] if target is not None else []
        axes.imshow(draw_boxes(open_image(sample.images[place], sample.id), marked))
        axes.set_title(paper.TASK_COLUMN.get(sample.task, sample.task))
        axes.set_axis_off()
    for index, (title, table) in enumerate(tables.items()):
        axes = bottom.add_subplot(1, len(tables), index + 1)
        average_bars(table, published=min(index, 1), ax=axes)
        axes.set_title(title)
    return figure


def pipeline() -> Figure:
    """Figure 2: (a) chains are made, (b) groups weighed, (c) the policy trained."""
    figure = plt.figure(figsize=(12, 8.4), layout="constrained")
    plt.close(figure)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    left, right = upper.subfigures(1, 2, width_ratios=[1.25, 1])
    _chains(left.add_subplot())
    hard, easy = right.subplots(1, 2, sharey=True)
    group_bars(HARD_GROUP, title="a hard group", ax=hard)
    group_bars(EASY_GROUP, title="an easy group", ax=easy)
    easy.set_ylabel("")
    right.suptitle("(b) A hard group gets more weight", fontweight="bold")
    _grpo(lower.add_subplot())
    return figure


def _canvas(ax: Axes, width: float, height: float, title: str) -> None:
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.set_axis_off()
    ax.set_title(title, fontweight="bold", loc="left")


def _block(
    ax: Axes, x: float, y: float, w: float, h: float, text: str, colour: str
) -> None:
    """A rounded box centred on (x, y) with text in it."""
    style = "round,pad=0,rounding_size=0.15"
    corner = (x - w / 2, y - h / 2)
    for face, alpha in (("white", 1.0), (colour, 0.16)):
        ax.add_patch(
            FancyBboxPatch(corner, w, h, style, fc=face, alpha=alpha, lw=0, zorder=3)
        )
    ax.add_patch(
        FancyBboxPatch(corner, w, h, style, fc="none", ec=colour, lw=1.6, zorder=3)
    )
    ax.text(x, y, text, ha="center", va="center", fontsize=10, zorder=4)


def _arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str = "0.3",
) -> None:
    style = {
        "arrowstyle": "-|>",
        "color": colour,
        "lw": 1.5,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    ax.annotate("", end, start, arrowprops=style)


def _chains(ax: Axes) -> None:
    _canvas(ax, 10, 6, "(a) Chains of reasoning: three candidates, the best is kept")
    asked = "images\nquestion\nanswer box"
    _block(ax, 1.1, 3, 1.9, 1.9, asked, GREY)
    _block(ax, 3.6, 3, 1.7, 1.2, "teacher\nmodel", BLUE)
    _arrow(ax, (2.05, 3), (2.75, 3))
    for y, colour in ((4.9, GREY), (3.0, GREEN), (1.1, GREY)):
        _block(ax, 6.1, y, 1.9, 1.1, "<think>…\n<answer>…", colour)
        _arrow(ax, (4.45, 3), (5.15, y), colour)
        _arrow(ax, (7.05, y), (7.85, 3), colour)
    _block(ax, 8.75, 3, 1.8, 1.6, "teacher\npicks\nthe best", GREEN)
    _arrow(ax, (8.75, 2.2), (8.75, 1.15), GREEN)
    ax.text(8.75, 1.0, "stage 1:\nCoT-SFT", ha="center", va="top", fontweight="bold")


def _route(ax: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    """An arrow along right angles."""
    xs, ys = zip(*points[:-1], strict=True)
    ax.plot(xs, ys, color=colour, lw=1.5, solid_capstyle="round")
    _arrow(ax, points[-2], points[-1], colour)


def _grpo(ax: Axes) -> None:
    title = "(c) Stage 2: GRPO, each group's advantages times its weight"
    _canvas(ax, 24, 11.4, title)
    _block(ax, 2.1, 6, 3.4, 1.9, "images\nand question", GREY)
    _block(ax, 6.7, 6, 3.2, 1.9, "policy\n(trained)", BLUE)
    _arrow(ax, (3.8, 6), (5.1, 6))
    for y, value in zip((9.0, 6.0, 3.0), ROLLOUTS, strict=True):
        colour = BIN_COLOURS[difficulty_bin(value)]
        _arrow(ax, (8.3, 6), (9.3, y))
        _block(ax, 11.2, y, 3.8, 1.5, "<think>…</think>\n<answer>box", colour)
        _arrow(ax, (13.1, y), (13.8, y), colour)
        text = f"r: IoU {value:.2f}\n + format"
        ax.text(13.95, y, text, ha="left", va="center", color=colour, weight="bold")
        _arrow(ax, (16.15, y), (16.9, 6 + (y - 6) * 0.25))
    _block(ax, 18.2, 6, 2.6, 2.5, "advantage\n(r − mean)\n/ std", ORANGE)
    _block(ax, 18.2, 9, 2.6, 1.4, "φ(mean IoU)", RED)
    ax.text(20.15, 5.95, "×", ha="center", va="center", fontsize=18)
    _route(ax, [(19.5, 9), (20.15, 9), (20.15, 6.5)], RED)
    _arrow(ax, (20.5, 6), (21.1, 6))
    _block(ax, 22.4, 6, 2.6, 2.0, "policy\nloss", BLUE)
    _block(ax, 6.7, 1, 3.2, 1.7, "reference\n(frozen)", GREY)
    _route(ax, [(2.1, 5.05), (2.1, 1), (5.1, 1)], "0.3")
    _route(ax, [(8.3, 1), (22.4, 1), (22.4, 5)], GREY)
    _block(ax, 14.5, 1, 5.4, 1.1, "β · KL(policy, reference)", GREY)
    ax.text(22.2, 2.4, "not weighed", ha="right", color="0.35", style="italic")
    _route(ax, [(22.4, 7), (22.4, 10.7), (6.7, 10.7), (6.7, 6.95)], BLUE)
    ax.text(7.0, 10.5, "update", ha="left", va="top", color=BLUE)

"""Figures 1 and 2 of the paper: the teaser and the pipeline.

Figure 1 is drawn from samples and results; Figure 2 is a diagram and needs no data.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from univg_nb import paper
from univg_nb.data.images import open_image
from univg_nb.data.sample import GroundingSample
from univg_nb.figures import drawing, plots
from univg_nb.figures.drawing import BLUE, GRAY, GREEN, ORANGE, RED
from univg_nb.train.difficulty import difficulty_bin

# The rewards that the paper's Figure 2 shows for an easy and a hard group come to a
# mean of 0.8 and 0.2 (docs/paper_facts.md#figures); the single bars are ours.
HARD_GROUP = (0.05, 0.60, 0.0, 0.35, 0.10, 0.0, 0.45, 0.05)
EASY_GROUP = (0.92, 0.75, 0.95, 0.60, 0.88, 0.70, 0.85, 0.75)
ROLLOUTS = (0.97, 0.71, 0.16)  # IoU of the three replies drawn there

Point = tuple[float, float]


def plot_average_bars(
    results: pd.DataFrame, published: int | None = None, ax: Axes | None = None
) -> Figure | Axes:
    """Plot the average accuracy of each model with its 95 % interval and value.

    Args:
        results: from `tables.load_result_table`.
        published: column of `paper.FIGURE_1` (0 MIG-Bench, 1 zero-shot) to name below.
        ax: axes to draw into.
    """
    rows = results[results["column"] == "AVG"]
    result, ax = plots.create_axes(ax, 5.6, 3.8)
    errors = np.maximum([rows["acc"] - rows["lo"], rows["hi"] - rows["acc"]], 0)
    colors = [plots.color_of(model, i) for i, model in enumerate(rows["model"])]
    ax.bar(rows["model"], rows["acc"], 0.7, color=colors, yerr=errors, capsize=3)
    for x, row in enumerate(rows.itertuples()):
        ax.text(x, row.hi + 1.5, f"{row.acc:.1f}", ha="center", fontweight="bold")
    ax.set(ylabel="Acc@0.5, %", ylim=(0, min(118, rows["hi"].max() + 14)))
    ax.tick_params(axis="x", labelrotation=25)
    if published is not None:
        values = [f"{k} {row[published]:.1f}" for k, row in paper.FIGURE_1.items()]
        source = "paper: " if published == 0 else "paper, mean of its five:\n"
        ax.set_xlabel(source + ", ".join(values), fontsize=9, color="0.35", labelpad=8)
    return result


def draw_teaser(
    samples: Sequence[GroundingSample],
    mig: pd.DataFrame,
    zero_shot: Mapping[str, pd.DataFrame] | None = None,
    columns: int = 5,
) -> Figure:
    """Draw Figure 1: an image of each task with its target, and the averages below.

    Args:
        samples: one of each task; the image with the target is shown, or the last.
        mig: results on MIG, from `tables.load_result_table`.
        zero_shot: results on other benchmarks by title.
        columns: images in a row.
    """
    tables = {"MIG": mig, **(zero_shot or {})}
    rows = math.ceil(len(samples) / columns)
    figure = plt.figure(
        figsize=(2.5 * columns, 2.75 * rows + 4.2), layout="constrained"
    )
    plt.close(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.75 * rows, 4.2])
    for index, sample in enumerate(samples):
        axes = top.add_subplot(rows, columns, index + 1)
        target = drawing.get_target_index(sample)
        place = target if target is not None else len(sample.images) - 1
        marked = (
            [(sample.answer, drawing.TARGET_COLOR, "")] if target is not None else []
        )
        axes.imshow(
            drawing.draw_boxes(open_image(sample.images[place], sample.id), marked)
        )
        axes.set_title(paper.TASK_COLUMN.get(sample.task, sample.task))
        axes.set_axis_off()
    for index, (title, table) in enumerate(tables.items()):
        axes = bottom.add_subplot(1, len(tables), index + 1)
        plot_average_bars(table, published=min(index, 1), ax=axes)
        axes.set_title(title)
    return figure


def draw_pipeline() -> Figure:
    """Draw Figure 2: (a) the chains, (b) the weights of groups, (c) the training."""
    figure = plt.figure(figsize=(12, 8.4), layout="constrained")
    plt.close(figure)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    left, right = upper.subfigures(1, 2, width_ratios=[1.25, 1])
    _draw_chains(left.add_subplot())
    hard, easy = right.subplots(1, 2, sharey=True)
    plots.plot_group_bars(HARD_GROUP, title="a hard group", ax=hard)
    plots.plot_group_bars(EASY_GROUP, title="an easy group", ax=easy)
    easy.set_ylabel("")
    right.suptitle("(b) A hard group gets more weight", fontweight="bold")
    _draw_grpo(lower.add_subplot())
    return figure


def _set_canvas(ax: Axes, width: float, height: float, title: str) -> None:
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.set_axis_off()
    ax.set_title(title, fontweight="bold", loc="left")


def _draw_block(
    ax: Axes, x: float, y: float, w: float, h: float, text: str, color: str
) -> None:
    """Draw a rounded box centered on (x, y) with text in it."""
    corner, style = (x - w / 2, y - h / 2), "round,pad=0,rounding_size=0.15"
    for face, edge in (("white", "none"), ((color, 0.16), color)):
        look: dict[str, Any] = {"fc": face, "ec": edge, "lw": 1.6, "zorder": 3}
        ax.add_patch(FancyBboxPatch(corner, w, h, style, **look))
    ax.text(x, y, text, ha="center", va="center", fontsize=10, zorder=4)


def _draw_arrow(ax: Axes, start: Point, end: Point, color: str = "0.3") -> None:
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=style)


def _draw_route(ax: Axes, points: Sequence[Point], color: str) -> None:
    """Draw an arrow along right angles."""
    xs, ys = zip(*points[:-1], strict=True)
    ax.plot(xs, ys, color=color, lw=1.5, solid_capstyle="round")
    _draw_arrow(ax, points[-2], points[-1], color)


def _draw_chains(ax: Axes) -> None:
    title = "(a) Chains of reasoning: three candidates, the best is kept"
    _set_canvas(ax, 10, 6, title)
    asked = "images\nquestion\nanswer box"
    _draw_block(ax, 1.1, 3, 1.9, 1.9, asked, GRAY)
    _draw_block(ax, 3.6, 3, 1.7, 1.2, "teacher\nmodel", BLUE)
    _draw_arrow(ax, (2.05, 3), (2.75, 3))
    for y, color in ((4.9, GRAY), (3.0, GREEN), (1.1, GRAY)):
        _draw_block(ax, 6.1, y, 1.9, 1.1, "<think>…\n<answer>…", color)
        _draw_arrow(ax, (4.45, 3), (5.15, y), color)
        _draw_arrow(ax, (7.05, y), (7.85, 3), color)
    _draw_block(ax, 8.75, 3, 1.8, 1.6, "teacher\npicks\nthe best", GREEN)
    _draw_arrow(ax, (8.75, 2.2), (8.75, 1.15), GREEN)
    ax.text(8.75, 1.0, "stage 1:\nCoT-SFT", ha="center", va="top", fontweight="bold")


def _draw_grpo(ax: Axes) -> None:
    title = "(c) Stage 2: GRPO, each group's advantages times its weight"
    _set_canvas(ax, 24, 11.4, title)
    _draw_block(ax, 2.1, 6, 3.4, 1.9, "images\nand question", GRAY)
    _draw_block(ax, 6.7, 6, 3.2, 1.9, "policy\n(trained)", BLUE)
    _draw_arrow(ax, (3.8, 6), (5.1, 6))
    for y, value in zip((9.0, 6.0, 3.0), ROLLOUTS, strict=True):
        color = plots.BIN_COLORS[difficulty_bin(value)]
        _draw_arrow(ax, (8.3, 6), (9.3, y))
        _draw_block(ax, 11.2, y, 3.8, 1.5, "<think>…</think>\n<answer>box", color)
        _draw_arrow(ax, (13.1, y), (13.8, y), color)
        text = f"r: IoU {value:.2f}\n + format"
        ax.text(13.95, y, text, ha="left", va="center", color=color, weight="bold")
        _draw_arrow(ax, (16.15, y), (16.9, 6 + (y - 6) * 0.25))
    _draw_block(ax, 18.2, 6, 2.6, 2.5, "advantage\n(r − mean)\n/ std", ORANGE)
    _draw_block(ax, 18.2, 9, 2.6, 1.4, "φ(mean IoU)", RED)
    ax.text(20.15, 5.95, "×", ha="center", va="center", fontsize=18)
    _draw_route(ax, [(19.5, 9), (20.15, 9), (20.15, 6.5)], RED)
    _draw_arrow(ax, (20.5, 6), (21.1, 6))
    _draw_block(ax, 22.4, 6, 2.6, 2.0, "policy\nloss", BLUE)
    _draw_block(ax, 6.7, 1, 3.2, 1.7, "reference\n(frozen)", GRAY)
    _draw_route(ax, [(2.1, 5.05), (2.1, 1), (5.1, 1)], "0.3")
    _draw_route(ax, [(8.3, 1), (22.4, 1), (22.4, 5)], GRAY)
    _draw_block(ax, 14.5, 1, 5.4, 1.1, "β · KL(policy, reference)", GRAY)
    ax.text(22.2, 2.4, "not weighted", ha="right", color="0.35", style="italic")
    _draw_route(ax, [(22.4, 7), (22.4, 10.7), (6.7, 10.7), (6.7, 6.95)], BLUE)
    ax.text(7.0, 10.5, "update", ha="left", va="top", color=BLUE)

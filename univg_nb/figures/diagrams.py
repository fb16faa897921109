"""Figures 1 and 2 of the paper: the teaser and the pipeline.

Figure 1 is drawn from samples and results; Figure 2 is a diagram and needs no data.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from univg_nb import paper
from univg_nb.data.images import open_image
from univg_nb.data.sample import GroundingSample
from univg_nb.figures import drawing, plots
from univg_nb.io import read_asset


def plot_average_bars(
    results: pd.DataFrame, published: int | None = None, ax: Axes | None = None
) -> Figure:
    """Plot the average accuracy of each model with its 95 % interval and value.

    Args:
        results: from `tables.load_result_table`.
        published: column of `paper.FIGURE_1` (0 MIG-Bench, 1 zero-shot) to name below.
        ax: axes to draw into.
    """
    rows = results[results["column"] == "AVG"]
    figure, ax = plots.create_axes(ax, 5.6, 3.8)
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
    return figure


def draw_teaser(
    samples: Sequence[GroundingSample],
    mig: pd.DataFrame,
    zero_shot: Mapping[str, pd.DataFrame],
) -> Figure:
    """Draw Figure 1: an image of each task with its target, and the averages below.

    The samples' images with the target are shown, or the last. The averages are those
    of `tables.load_result_table` on MIG, and on other benchmarks by title.
    """
    rows = math.ceil(len(samples) / 5)
    heights = [2.75 * rows, 4.2]
    figure = drawing.create_figure(12.5, sum(heights))
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    for place, sample in enumerate(samples, start=1):
        axes = top.add_subplot(rows, 5, place)
        target = drawing.get_target_index(sample)
        path = sample.images[-1 if target is None else target]
        marked = [(sample.answer, drawing.TARGET_COLOR, "")]
        image = open_image(path, sample.id)
        axes.imshow(drawing.draw_boxes(image, [] if target is None else marked))
        axes.set_title(paper.TASK_COLUMN.get(sample.task, sample.task))
        axes.set_axis_off()
    tables = {"MIG": mig, **zero_shot}
    for index, (title, table) in enumerate(tables.items()):
        axes = bottom.add_subplot(1, len(tables), index + 1)
        plot_average_bars(table, published=min(index, 1), ax=axes)
        axes.set_title(title)
    return figure


def draw_pipeline() -> Figure:
    """Draw Figure 2: (a) the chains, (b) the weights of groups, (c) the training."""
    content = read_asset("figure_2.yaml")
    figure = drawing.create_figure(12, 8.4)
    heights = [1, 1.15]
    (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    left, right = upper.subfigures(1, 2, width_ratios=[1.25, 1])
    _draw_panel(left.add_subplot(), content["chains"])
    hard, easy = right.subplots(1, 2, sharey=True)
    plots.plot_group_bars(content["hard_group"], title="a hard group", ax=hard)
    plots.plot_group_bars(content["easy_group"], title="an easy group", ax=easy)
    easy.set_ylabel("")
    right.suptitle("(b) A hard group gets more weight", fontweight="bold")
    _draw_panel(lower.add_subplot(), content["grpo"])
    return figure


def _draw_panel(ax: Axes, panel: Mapping[str, Any]) -> None:
    """Draw blocks, arrows and texts as figure_2.yaml describes them."""
    width, height = panel["size"]
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.set_axis_off()
    ax.set_title(panel["title"], fontweight="bold", loc="left")
    for x, y, w, h, text, name in panel["blocks"]:
        color, corner = _find_color(name), (x - w / 2, y - h / 2)
        for face, edge in (("white", "none"), ((color, 0.16), color)):
            look: dict[str, Any] = {"fc": face, "ec": edge, "lw": 1.6, "zorder": 3}
            look["boxstyle"] = "round,pad=0,rounding_size=0.15"
            ax.add_patch(FancyBboxPatch(corner, w, h, **look))
        ax.text(x, y, text, ha="center", va="center", fontsize=10, zorder=4)
    for name, points in panel["arrows"]:
        color = _find_color(name)
        xs, ys = zip(*points[:-1], strict=True)
        ax.plot(xs, ys, color=color, lw=1.5, solid_capstyle="round")
        style = {"arrowstyle": "-|>", "color": color, "lw": 1.5}
        style |= {"shrinkA": 0, "shrinkB": 0}
        ax.annotate("", points[-1], points[-2], arrowprops=style)
    for x, y, text, options in panel["texts"]:
        color = _find_color(options.get("color", "black"))
        ax.text(x, y, text, **{**options, "color": color})


def _find_color(name: str) -> str:
    return getattr(drawing, name.upper(), name)

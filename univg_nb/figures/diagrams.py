"""Figures 1 and 2 of the paper, its two cases, and how a picture becomes tokens.

Figure 1 and the cases are drawn from samples and results; Figure 2 is a diagram and
needs no data.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image
from torch import Tensor

from univg_nb import paper
from univg_nb.data.boxes import Box, to_pixels
from univg_nb.data.images import open_image
from univg_nb.data.sample import GroundingSample
from univg_nb.figures import drawing, plots
from univg_nb.figures.drawing import SKY
from univg_nb.io import read_asset


def plot_average_bars(
    results: pd.DataFrame, published: int | None = None, ax: Axes | None = None
) -> Figure:
    """Plot the average accuracy of each model with its 95 % interval and value.

    `results` is from `tables.load_result_table`; `published` is the column of
    `paper.FIGURE_1` (0 MIG-Bench, 1 zero-shot) that is named above.
    """
    rows = results[results["column"] == "AVG"]
    figure, ax = plots.create_axes(ax, 5.6, 0.4 * len(rows) + 1.2)
    for y, row in enumerate(rows.itertuples()):
        if math.isnan(row.acc):
            ax.text(1, y, "not run", va="center", fontsize="small")
            continue
        look: dict[str, Any] = {"color": plots.color_of(row.model, y)}
        if row.model.endswith("(paper)"):
            look = {"color": "white", "edgecolor": drawing.GRAY, "hatch": "////"}
        ax.barh(y, row.acc, 0.7, **look)
        if row.hi > row.lo:
            ends = np.maximum([[row.acc - row.lo], [row.hi - row.acc]], 0)
            bar = ax.errorbar(row.acc, y, xerr=ends, color="black", capsize=2.5, lw=1)
            for line in bar.get_children():
                line.set_path_effects(plots.RIM)
        ax.text(row.hi + 1.5, y, f"{row.acc:.1f}", va="center", fontsize="small")
    ax.set_yticks(range(len(rows)), rows["model"])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set(xlabel="Acc@0.5, %", xlim=(0, 100))  # values may stand out on the right
    ax.grid(axis="y", visible=False)
    if published is not None:
        names = ", ".join(f"{k} {v[published]:.1f}" for k, v in paper.FIGURE_1.items())
        source = ("paper, MIG-Bench", "paper, mean of five zero-shot sets")[published]
        ax.set_title(f"{source}:\n{names}", fontsize="small", color="0.35")
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
    heights = [2.1 * rows, 3.4]
    figure = drawing.create_figure(9.8, sum(heights))
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
    panels = bottom.subplots(1, len(tables), squeeze=False).flat  # of equal width
    for index, (ax, title) in enumerate(zip(panels, tables, strict=True)):
        plot_average_bars(tables[title], min(index, 1), ax)
        published = ax.get_title()
        ax.set_title(title, fontweight="bold", color="black", pad=32)
        look: dict[str, Any] = {"xycoords": "axes fraction", "ha": "center"}
        ax.annotate(published, (0.5, 1.02), fontsize="small", color="0.35", **look)
    return figure


def draw_cases(
    cases: Sequence[tuple[str, GroundingSample, Mapping[str, Box | None], str]],
    width: float,
) -> Figure:
    """Draw items with the boxes of several models and a reply, each in a column.

    A case is title, item, boxes by model, and text to write below. There are two
    columns from a width of 5 inches on.
    """
    columns = 2 if width > 5 and len(cases) > 1 else 1
    rows = math.ceil(len(cases) / columns)
    figure = drawing.create_figure(width, 2.9 * rows)
    parts = figure.subfigures(rows, columns, squeeze=False).flat
    letters = round(17.5 * width / columns)  # in a line of 7 pt
    for part, (title, sample, boxes, text) in zip(parts, cases, strict=False):
        (upper,), (lower,) = part.subfigures(2, 1, squeeze=False)
        target = drawing.get_target_index(sample)
        marked, legend = drawing.label_boxes(sample, boxes)
        styles = {color: plots.line_of(k) for k, color in enumerate(legend.values())}
        for place, path in enumerate(sample.images):
            ax = upper.add_subplot(1, len(sample.images), place + 1)
            image = open_image(path, sample.id)
            ax.imshow(image)
            ax.set_axis_off()
            here = marked if target in (None, place) else []
            for k, (box, color, _) in enumerate([*here, *here]):
                x1, y1, x2, y2 = to_pixels(tuple(box), *image.size)
                look: dict[str, Any] = {"edgecolor": "white", "linewidth": 3}
                if k >= len(here):  # in color above all white rims
                    look = {"edgecolor": color, "linestyle": styles[color]}
                    look["linewidth"] = 2.4 - 0.5 * (k - len(here))
                ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **look))
        upper.suptitle(f"{title} ({sample.task.replace('_', ' ')})", fontsize="medium")
        handles = [
            Line2D([], [], color=color, linestyle=styles[color], label=label)
            for label, color in legend.items()
        ]
        lower.legend(handles=handles, loc="upper center", ncols=2, frameon=False)
        said = [f"Q: {drawing.clean_question(sample)}", text]
        lines = [line for part in said for line in textwrap.wrap(part, letters)]
        shown = "\n".join(lines[:10] + ["…"] * (len(lines) > 10))
        lower.text(0.02, 0.74, shown, va="top", fontsize=7, parse_math=False)
    return figure


def draw_pipeline(width: float = 12) -> Figure:
    """Draw Figure 2: (a) the chains, (b) the weights of groups, (c) the training.

    A figure under 5 inches wide has its panels below each other, (c) from top to
    bottom.
    """
    content = read_asset("figure_2.yaml")
    if narrow := width < 5:
        figure = drawing.create_figure(width, 2.7 * width)
        heights = [0.68, 0.62, 1.4]
        parts = figure.subfigures(3, 1, squeeze=False, height_ratios=heights)
        left, right, lower = parts.flat
    else:
        figure = drawing.create_figure(width, 0.7 * width)
        heights = [1, 1.15]
        parts = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
        upper, lower = parts.flat
        left, right = upper.subfigures(1, 2, width_ratios=[1.25, 1])
    size = 10 if width > 10 else 7  # pt
    _draw_panel(left.add_subplot(), content["chains"], size)
    hard, easy = right.subplots(1, 2, sharey=True)
    plots.plot_group_bars(content["hard_group"], title="a hard group", ax=hard)
    plots.plot_group_bars(content["easy_group"], title="an easy group", ax=easy)
    easy.set_ylabel("")
    for axes in (hard, easy):
        axes.title.set_fontsize(size)
    right.suptitle("(b) A hard group gets more weight", fontweight="bold")
    _draw_panel(lower.add_subplot(), content["grpo_narrow" if narrow else "grpo"], size)
    return figure


def _draw_panel(ax: Axes, panel: Mapping[str, Any], size: float) -> None:
    """Draw blocks, arrows and texts, in pt, as figure_2.yaml describes them."""
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
        ax.text(x, y, text, ha="center", va="center", fontsize=size, zorder=4)
    for name, points in panel["arrows"]:
        color = _find_color(name)
        xs, ys = zip(*points[:-1], strict=True)
        ax.plot(xs, ys, color=color, lw=1.5, solid_capstyle="round")
        style = {"arrowstyle": "-|>", "color": color, "lw": 1.5}
        style |= {"shrinkA": 0, "shrinkB": 0}
        ax.annotate("", points[-1], points[-2], arrowprops=style)
    for x, y, text, options in panel["texts"]:
        color = _find_color(options.get("color", "black"))
        ax.text(x, y, text, **{"fontsize": size, **options, "color": color})


def _find_color(name: str) -> str:
    return getattr(drawing, name.upper(), name)


# ---------------------------------------------------------------- pictures as tokens


def draw_patches(
    image: Image.Image, patch: int, merge: int, ax: Axes | None = None
) -> Figure:
    """Draw a picture as the vision tower cuts it: patches thin, image tokens thick.

    Args:
        image: as the processor resized it; its sides are multiples of patch * merge.
        patch: pixels of a patch's side.
        merge: patches of a token's side.
        ax: axes to draw into.

    Raises:
        ValueError: if a side is no such multiple.
    """
    token = patch * merge
    if image.width % token or image.height % token:
        raise ValueError(
            f"a picture of {image.size} pixels does not split into blocks of {token}; "
            "resize it as the processor does (data.images.fit_size)"
        )
    figure, ax = plots.create_axes(ax, 4, 4 * image.height / image.width)
    ax.imshow(image, extent=(0, image.width, image.height, 0))
    for step, width, color in ((patch, 0.5, SKY), (token, 1.4, drawing.BLUE)):
        look: dict[str, Any] = {"color": color, "linewidth": width}
        ax.vlines(np.arange(0, image.width + 1, step), 0, image.height, **look)
        ax.hlines(np.arange(0, image.height + 1, step), 0, image.width, **look)
    columns = image.width // token
    for number in range(columns * (image.height // token)):
        if columns > 8:  # too many to be read
            break
        x, y = (token * (k + 0.5) for k in (number % columns, number // columns))
        text = ax.text(x, y, str(number + 1), ha="center", va="center", fontsize=8)
        text.set_bbox({"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1})
    ax.set_axis_off()
    return figure


POSITION_COLORS = {"time": "#4D4D4D", "height": "#A23B9A", "width": "#1A7F9C"}


def plot_positions(positions: Tensor, image: Tensor) -> Figure:
    """Plot the three M-RoPE positions of a prompt, (3, P), over its tokens.

    They are of time, height and width. Tokens of a picture, bool (P,), are shaded.
    """
    figure, ax = plots.create_axes(None, 9, 3.4)
    for place in image.nonzero().flatten().tolist():
        ax.axvspan(place - 0.5, place + 0.5, color="0.92", lw=0, zorder=0)
    rows = zip(POSITION_COLORS.items(), positions.tolist(), strict=True)
    for k, ((name, color), values) in enumerate(rows):
        look: dict[str, Any] = {"color": color, "lw": 0.6, "mfc": "none"}  # rings
        ax.plot(values, "osD"[k], ls="-", ms=(7, 4, 2)[k], label=name, **look)
    ax.set(xlabel="token of the prompt (gray: of a picture)", ylabel="position")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def draw_position_grid(positions: Tensor, columns: int) -> Figure:
    """Draw the positions (time, height, width) of one picture's tokens, in its grid.

    They are (3, tokens), row by row, with `columns` tokens in a row of the picture.
    """
    triples = positions.T.tolist()
    rows = len(triples) // columns
    figure, ax = plots.create_axes(None, 1.0 * columns, 0.6 * rows + 0.4)
    for number, triple in enumerate(triples):
        x, y = number % columns, number // columns
        ax.add_patch(Rectangle((x, y), 1, 1, fc="0.95", ec=drawing.BLUE))
        for k, (value, color) in enumerate(
            zip(triple, POSITION_COLORS.values(), strict=True)
        ):
            place = (x + 0.2 + 0.3 * k, y + 0.5)
            ax.text(*place, str(value), color=color, ha="center", va="center")
    ax.set(xlim=(-0.05, columns + 0.05), ylim=(rows + 0.05, -0.05))
    ax.set_axis_off()
    return figure

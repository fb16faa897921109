"""Boxes on images, drawn the same way everywhere.

The target is green, predictions have the other colors. These are Okabe and Ito's, which
color-blind readers can tell apart.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageColor, ImageDraw, ImageFont

from univg_nb.data.boxes import Box, iou, to_pixels
from univg_nb.data.images import open_image
from univg_nb.data.sample import GroundingSample, find_target_image

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, SKY, PURPLE, GRAY = "#D55E00", "#56B4E9", "#CC79A7", "#7F7F7F"
TARGET_COLOR = GREEN
# A model has its color in every picture, of boxes and of numbers.
MODEL_COLORS = {
    "base": GRAY,
    "sft_nocot": "#882255",
    "sft_lora": BLUE,
    "sft_qlora": PURPLE,
    "sft_thorough": "#8C510A",
    "shipped": "black",
    "grpo_none": ORANGE,
    "grpo_exp": RED,
}
# Notebook 03 calls its models by a word each.
MODEL_OF_WORD = {
    "control": "sft_nocot",
    "mixture": "sft_lora",
    "thorough": "sft_thorough",
}
PREDICTION_COLORS = (RED, BLUE, ORANGE, PURPLE, SKY)  # of other names
LONG_SIDE = 448  # px; MiniMIG's 256 px images are enlarged, photographs reduced

LabeledBox = tuple[Sequence[float], str, str]  # box, color, label
Rectangle = tuple[float, float, float, float]


def create_figure(width: float, height: float) -> Figure:
    """Return a figure, in inches; closed for pyplot: a notebook shows it once."""
    figure = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(figure)
    return figure


def find_color(name: str, spare: str) -> str:
    """Return the color of a model, by its name or word, or `spare` for other names."""
    return MODEL_COLORS.get(MODEL_OF_WORD.get(name, name), spare)


def draw_boxes(
    image: Image.Image,
    boxes: Iterable[LabeledBox],
    long_side: int = LONG_SIDE,
    label_size: int = 0,
) -> Image.Image:
    """Draw boxes on a scaled copy of an image, later ones with thinner lines.

    Args:
        image: the image.
        boxes: (box on 0..1000, color, label or "") each; they are clipped to the image.
            A side that would lie on a line of an earlier box is drawn beside it.
        long_side: pixels of the copy's longer side.
        label_size: height of the labels' letters in pixels; 0 is a 28th of the side.

    Raises:
        ValueError: Pillow does not know a color.
    """
    scale = long_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    picture = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    labeled = list(boxes)
    corners = [_clip_box(box, width, height) for box, _, _ in labeled]
    widths = [max(3, long_side // 64 - 2 * index) for index in range(len(labeled))]
    for index, (_, color, _) in enumerate(labeled):
        x1, y1, x2, y2 = corners[index] = _shift_sides(
            corners[: index + 1], widths, picture.size
        )
        # a white rim, so that the line shows on a ground of its own color
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="white", width=1)
        draw.rectangle((x1, y1, x2, y2), outline=color, width=widths[index])
    labels: list[Rectangle] = []
    for (_, color, label), corner in zip(labeled, corners, strict=True):
        if label:
            font = ImageFont.load_default(size=label_size or max(11, long_side // 28))
            apart = [other for other in corners if not _overlap(other, corner)]
            taken = (labels, apart)  # by a box elsewhere a label would seem to be its
            labels.append(_draw_label(draw, label, color, corner, font, taken))
    return picture


def _shift_sides(
    corners: Sequence[Rectangle], widths: Sequence[int], size: tuple[int, int]
) -> Rectangle:
    """Return the last box, its sides moved off the lines of boxes that it overlaps."""
    *others, box = corners
    line, moved = widths[len(others)], []
    for side, sign in enumerate((1, 1, -1, -1)):  # outwards is less, times the sign
        free = set(range(size[side % 2]))
        for other, width in zip(others, widths, strict=False):
            if _overlap(other, box):
                at = sign * int(other[side])
                free -= {sign * k for k in range(at - line, at + width + 1)}
        ends = ((abs(place - box[side]), sign * place, place) for place in free)
        moved.append(min(ends, default=(0, 0, box[side]))[-1])
    (x1, x2), (y1, y2) = sorted(moved[::2]), sorted(moved[1::2])
    return x1, y1, x2, y2


def _clip_box(box: Sequence[float], width: int, height: int) -> Rectangle:
    """Return a box in whole pixels inside the image, an inverted one turned around."""
    x1, y1, x2, y2 = to_pixels(tuple(box), width, height)
    left, right = sorted(min(max(round(x), 0), width - 1) for x in (x1, x2))
    top, bottom = sorted(min(max(round(y), 0), height - 1) for y in (y1, y2))
    return left, top, right, bottom


def _draw_label(
    draw: ImageDraw.ImageDraw,
    label: str,
    color: str,
    corner: Rectangle,
    font: Any,
    taken: Sequence[Sequence[Rectangle]],
) -> Rectangle:
    """Put a label at the first place by its box where nothing is that is taken.

    `taken` has groups of rectangles, those first that must not be covered.
    """
    width, height = draw.im.size
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    w, h = right - left + 6, bottom - top + 6
    x1, y1, x2, y2 = corner
    places = [(x1, y1 - h), (x1, y2), (x2 - w, y1 - h), (x2 - w, y2)]
    # a little further, where the label of a box nearly at this place is passed
    places += [(x1, y1 - 2.3 * h), (x1, y2 + 1.3 * h), (x1, y1)]
    places += [(x1, y2 + 2.6 * h), (x1, y1 - 3.6 * h)]
    places += [(x, y1 + row * h) for row in range(5) for x in (x2, x1 - w)]
    inside = []
    for x, y in places:
        x = min(max(x, 0), max(0, width - w))
        if 0 <= y <= height - h:
            inside.append((x, y, x + w, y + h))
    inside = inside or [(x1, 0, x1 + w, h)]
    place = min(
        inside,
        key=lambda r: [any(_overlap(r, one) for one in group) for group in taken],
    )
    red, green, blue = ImageColor.getrgb(color)[:3]
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    draw.rectangle(place, fill=color)
    ink = "white" if dark else "black"
    draw.text((place[0] + 3 - left, place[1] + 3 - top), label, fill=ink, font=font)
    return place


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def get_target_index(sample: GroundingSample) -> int | None:
    """Return `find_target_image` counted from 0: the image that holds the answer."""
    number = find_target_image(sample)
    return None if number is None else number - 1


def show_sample(
    sample: GroundingSample,
    predictions: Mapping[str, Box | None] | None = None,
    *,
    columns: int = 3,
    title: bool = True,
    side: float = 3.7,
) -> Figure:
    """Show a sample's images, its answer in green and predictions with their IoU.

    Predictions are boxes on 0..1000 by name, None for a reply without a box. Where it
    is not known which image the boxes belong to, each image has them. An image is
    `side` inches wide.
    """
    target = get_target_index(sample)
    boxes, legend = label_boxes(sample, predictions or {})
    count = len(sample.images)
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    size = 12 if side > 2 else 9  # points; titles stay as wide as their images
    if side < 2:  # no room for labels but letters; the legend has what they say
        letter = {c: chr(64 + k) if k else "" for k, c in enumerate(legend.values())}
        boxes = [(box, color, letter[color]) for box, color, _ in boxes]
        legend = {f"{letter[c]} {text}".strip(): c for text, c in legend.items()}
    letters = max(16, round(7.5 / 72 * LONG_SIDE / side))  # 7.5 points on the page
    shown = []
    for k, path in enumerate(sample.images):
        here = boxes if target in (None, k) else []
        shown.append(draw_boxes(open_image(path, sample.id), here, label_size=letters))
    tallest = max(picture.height / picture.width for picture in shown)
    heading = f"{sample.task}: {clean_question(sample)}" if title else ""
    heading = textwrap.fill(heading, width=round(11.4 * side * columns))
    ncols = min(3, max(1, round(side * columns / 1.9)))
    entries = len(legend) + (target is None)
    lines = 1.6 * len(heading.splitlines()) + math.ceil(entries / ncols)  # of text
    height = rows * (side * min(tallest, 1.4) + 0.025 * size) + 0.24 * lines
    figure = create_figure(side * columns, height)
    for index, picture in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(picture)
        axes.set_axis_off()
        if count > 1 and index == target:
            mark: dict[str, Any] = {"fontweight": "bold", "color": TARGET_COLOR}
            axes.set_title(f"image {index + 1} (target)", fontsize=size, **mark)
        elif count > 1:
            axes.set_title(f"image {index + 1}", fontsize=size)
    handles = [
        Line2D([], [], color=color, linewidth=3, label=label)
        for label, color in legend.items()
    ]
    if target is None:
        handles.append(Line2D([], [], ls="", label="(which image is not recorded)"))
    look: dict[str, Any] = {"ncols": ncols, "frameon": False, "fontsize": min(size, 10)}
    figure.legend(handles=handles, loc="outside lower center", **look)
    if title:
        figure.suptitle(heading, parse_math=False)
        figure.set_layout_engine("constrained", h_pad=0.07)  # off the images' titles
    return figure


def clean_question(sample: GroundingSample) -> str:
    """Return a sample's question without the marks of objects and boxes."""
    return re.sub(r"<\|[^|]*\|>", "", sample.question).strip()


def label_boxes(
    sample: GroundingSample, predictions: Mapping[str, Box | None]
) -> tuple[list[LabeledBox], dict[str, str]]:
    """Return the boxes to draw, target first, and the legend: colors by text."""
    targets = sample.boxes or (sample.answer,)
    boxes: list[LabeledBox] = [(box, TARGET_COLOR, "target") for box in targets]
    legend = {f"target {sample.answer}": TARGET_COLOR}
    for (name, box), spare in zip(predictions.items(), cycle(PREDICTION_COLORS)):
        color = find_color(name, spare)
        if box is None:
            legend[f"{name}: no box"] = color
        else:
            value = iou(box, sample.answer)
            boxes.append((box, color, f"{name} {value:.2f}"))
            legend[f"{name}: IoU {value:.2f}"] = color
    return boxes, legend

"""Boxes on pictures: the one look that every notebook uses.

The target is green, predictions take the other colours. Colours are Okabe and Ito's,
which stay apart for colour-blind readers.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageColor, ImageDraw, ImageFont

from univg_nb.data.boxes import Box, iou, to_pixels
from univg_nb.data.images import open_image
from univg_nb.data.sample import GroundingSample, find_target_image

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, SKY, PURPLE, GREY = "#D55E00", "#56B4E9", "#CC79A7", "#7F7F7F"
TARGET_COLOUR = GREEN
PREDICTION_COLOURS = (RED, BLUE, ORANGE, PURPLE, SKY)
LONG_SIDE = 448  # px; MiniMIG's 256 px pictures are enlarged, photographs reduced

LabelledBox = tuple[Sequence[float], str, str]


def draw_boxes(
    image: Image.Image, boxes: Iterable[LabelledBox], long_side: int = LONG_SIDE
) -> Image.Image:
    """A copy of `image` scaled to `long_side` pixels with boxes drawn on it.

    boxes: (box, colour, label) each; box (x1, y1, x2, y2) on 0..1000, clipped to the
    picture; colour a name or "#rrggbb"; label "" for none. Later boxes lie on top with
    thinner lines. Labels avoid each other as far as there is room. Raises ValueError
    for a colour Pillow does not know.
    """
    scale = long_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    picture = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(11, long_side // 28))
    labelled = list(boxes)
    corners = [_corners(box, width, height) for box, _, _ in labelled]
    for index, corner in enumerate(corners):
        colour = labelled[index][1]
        x1, y1, x2, y2 = corner
        # thinner and thinner, so that boxes on the same place can all be seen
        line = max(3, long_side // 64 - 2 * index)
        # white rim, so that the line shows on a ground of its own colour
        rim = (x1 - 1, y1 - 1, x2 + 1, y2 + 1)
        draw.rectangle(rim, outline="white", width=1)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)
    taken: list[tuple[float, float, float, float]] = []
    for (_, colour, label), corner in zip(labelled, corners, strict=True):
        if label:
            _draw_label(draw, label, colour, corner, font, (width, height), taken)
    return picture


def _corners(box: Sequence[float], width: int, height: int) -> tuple[int, ...]:
    """Box in whole pixels inside the picture; an inverted one is turned round."""
    x1, y1, x2, y2 = to_pixels(tuple(box), width, height)
    xs = sorted(min(max(round(x), 0), width - 1) for x in (x1, x2))
    ys = sorted(min(max(round(y), 0), height - 1) for y in (y1, y2))
    return xs[0], ys[0], xs[1], ys[1]


def _draw_label(
    draw: ImageDraw.ImageDraw,
    label: str,
    colour: str,
    corner: tuple[int, ...],
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Put the label at the first place by its box where no other label is."""
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    w, h = right - left + 6, bottom - top + 6
    x1, y1, x2, y2 = corner
    places = [(x1, y1 - h), (x1, y2), (x2 - w, y1 - h), (x2 - w, y2), (x1, y1)]
    places += [(x1, y2 + row * h) for row in (1, 2)]
    places += [(x1, y1 - row * h) for row in (2, 3)]
    rectangles = []
    for x, y in places:
        x = min(max(x, 0), max(0, size[0] - w))
        rectangles.append((x, y, x + w, y + h))
    inside = [r for r in rectangles if r[1] >= 0 and r[3] <= size[1]]
    free = [r for r in inside if not any(_overlap(r, other) for other in taken)]
    place = (free or inside or [(x1, 0, x1 + w, h)])[0]
    taken.append(place)
    red, green, blue = ImageColor.getrgb(colour)[:3]
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    draw.rectangle(place, fill=colour)
    ink = "white" if dark else "black"
    draw.text((place[0] + 3 - left, place[1] + 3 - top), label, fill=ink, font=font)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def target_image(sample: GroundingSample) -> int | None:
    """Return the index of the image that holds the answer box, or None if unknown.

    This is `data.sample.find_target_image`, counted from 0.
    """
    number = find_target_image(sample)
    return None if number is None else number - 1


def show_sample(
    sample: GroundingSample,
    predictions: Mapping[str, Box | None] | None = None,
    *,
    target: int | None = None,
    columns: int = 3,
    title: bool = True,
) -> Figure:
    """The sample's images, its answer in green and predictions with their IoU.

    predictions: {name: box on 0..1000, or None for a reply without a box}.
    target: image the boxes belong to (from 0); by default `target_image` decides, and
    if it cannot, they are drawn on every image and the caption says so.
    columns: images per row. title=False leaves the question out.
    Returns a Figure closed for pyplot, so a notebook shows it once.
    """
    target = target_image(sample) if target is None else target
    drawn, handles = _boxes_of(sample, predictions or {})
    count = len(sample.images)
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = plt.figure(figsize=(3.7 * columns, 3.9 * rows + 0.9), layout="constrained")
    plt.close(figure)
    for index, path in enumerate(sample.images):
        marked = drawn if target is None or index == target else []
        picture = draw_boxes(open_image(path, sample.id), marked)
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(picture)
        axes.set_axis_off()
        name = f"image {index + 1}" if count > 1 else ""
        if index == target and count > 1:
            axes.set_title(f"{name} (target)", fontweight="bold", color=TARGET_COLOUR)
        else:
            axes.set_title(name)
    if target is None:
        handles.append(Line2D([], [], ls="", label="(which image is not recorded)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    if title:
        question = re.sub(r"<\|[^|]*\|>", "", sample.question).strip()
        heading = textwrap.fill(f"{sample.task}: {question}", width=42 * columns)
        figure.suptitle(heading, parse_math=False)
    return figure


def _boxes_of(
    sample: GroundingSample, predictions: Mapping[str, Box | None]
) -> tuple[list[LabelledBox], list[Line2D]]:
    """What to draw, target first, and a legend line for each."""
    targets = sample.boxes or (sample.answer,)
    drawn: list[LabelledBox] = [(box, TARGET_COLOUR, "target") for box in targets]
    handles = [_handle(TARGET_COLOUR, f"target {sample.answer}")]
    for index, (name, box) in enumerate(predictions.items()):
        colour = PREDICTION_COLOURS[index % len(PREDICTION_COLOURS)]
        if box is None:
            handles.append(_handle(colour, f"{name}: no box"))
            continue
        label = f"{name} {iou(box, sample.answer):.2f}"
        drawn.append((box, colour, label))
        handles.append(_handle(colour, f"{name}: IoU {iou(box, sample.answer):.2f}"))
    return drawn, handles


def _handle(colour: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, linewidth=3, label=label)

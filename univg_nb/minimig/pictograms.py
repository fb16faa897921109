"""The kinds of things in MiniMIG's scenes: how each is drawn, its parts, its use.

Every kind is drawn in a unit square (x to the right, y down, both 0..1) and scaled
afterwards; `assets/minimig/pictograms.yaml` holds the shapes. Each has named parts with
boxes in the same units, and a use, so that a question can name the thing, one of its
parts, or only its purpose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from univg_nb import io

RGB = tuple[int, ...]
Fill = RGB | str  # a color, or the name of a shade
Point = tuple[float, float]
UnitBox = tuple[float, float, float, float]

COLORS: dict[str, RGB] = {
    "red": (222, 48, 48),
    "blue": (48, 96, 224),
    "green": (44, 158, 66),
    "yellow": (246, 205, 40),
    "purple": (150, 62, 190),
    "orange": (245, 134, 28),
}
SUPERSAMPLE = 3  # sprites are drawn this much larger, then reduced: smooth edges


class Pen:
    """Draw shapes given in unit coordinates on a transparent square image.

    Shapes are filled with `fill` and outlined in the dark shade. The three shades are
    "main", "dark" and "light".
    """

    def __init__(self, pixels: int, color: str) -> None:
        self.image = Image.new("RGBA", (pixels, pixels), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)
        self._pixels = pixels
        main = COLORS[color]
        self._dark = tuple(int(c * 0.45) for c in main)
        light = tuple(int(c + (255 - c) * 0.62) for c in main)
        self._shades = {"main": main, "dark": self._dark, "light": light}
        self._outline = max(1, round(pixels * 0.035))

    def _scale(self, *points: Point) -> list[Point]:
        return [(x * self._pixels, y * self._pixels) for x, y in points]

    def _get_color(self, fill: Fill) -> RGB:
        return self._shades[fill] if isinstance(fill, str) else fill

    def _corners(self, box: UnitBox) -> list[Point]:
        return self._scale(box[:2], box[2:])

    def polygon(self, points: Sequence[Point], fill: Fill = "main") -> None:
        """Draw a closed outline through `points`."""
        scaled = self._scale(*points)
        self._draw.polygon(scaled, fill=self._get_color(fill))
        self._draw.line([*scaled, scaled[0]], self._dark, self._outline, joint="curve")

    def rectangle(self, box: UnitBox, fill: Fill = "main", radius: float = 0.0) -> None:
        """Draw a rectangle with its corners rounded by `radius`."""
        style = (self._get_color(fill), self._dark, self._outline)
        corners, pixels = self._corners(box), radius * self._pixels
        self._draw.rounded_rectangle(corners, pixels, *style)

    def ellipse(self, box: UnitBox, fill: Fill = "main") -> None:
        """Draw an ellipse inside `box`."""
        style = (self._get_color(fill), self._dark, self._outline)
        self._draw.ellipse(self._corners(box), *style)

    def union(self, boxes: Sequence[UnitBox]) -> None:
        """Draw overlapping ellipses as one shape, without outlines where they meet."""
        for box in boxes:
            self.ellipse(box)
        inset = self._outline / self._pixels
        for x1, y1, x2, y2 in boxes:
            inside = (x1 + inset, y1 + inset, x2 - inset, y2 - inset)
            self._draw.ellipse(self._corners(inside), self._shades["main"])

    def pie(self, box: UnitBox, start: int, end: int, fill: Fill = "main") -> None:
        """Draw a slice of an ellipse; angles in degrees clockwise from the right."""
        style = (self._get_color(fill), self._dark, self._outline)
        self._draw.pieslice(self._corners(box), start, end, *style)

    def arc(self, box: UnitBox, start: int, end: int, width: float) -> None:
        """Draw a part of an ellipse's edge; the angles as for `pie`."""
        pixels = max(1, round(width * self._pixels))
        self._draw.arc(self._corners(box), start, end, self._dark, pixels)

    def line(self, points: Sequence[Point], width: float, fill: Fill = "dark") -> None:
        """Draw a line through `points`, `width` as a share of the square's side."""
        pixels, color = max(1, round(width * self._pixels)), self._get_color(fill)
        self._draw.line(self._scale(*points), color, pixels, joint="curve")


@dataclass(frozen=True)
class Part:
    """A named part: its box in the unit square and what it is for."""

    box: UnitBox
    purpose: str


@dataclass(frozen=True)
class Kind:
    """What is known of one kind of thing."""

    use: str  # completes "something that ..."
    need: str  # completes "I need to ..."
    parts: dict[str, Part]
    # What is drawn, from back to front: a method of `Pen` and its first argument, then
    # the other arguments by name.
    shapes: tuple[dict[str, Any], ...]
    # Other kinds that a person might accept for the same use or need.
    substitutes: tuple[str, ...] = ()


def _read_kind(parts: dict[str, Any], **fields: Any) -> Kind:
    return Kind(**fields, parts={name: Part(**part) for name, part in parts.items()})


_ASSET = io.read_asset("minimig/pictograms.yaml")
KINDS = {name: _read_kind(**fields) for name, fields in _ASSET.items()}


@lru_cache(maxsize=8192)
def draw_sprite(kind: str, color: str, pixels: int, flip: bool) -> Image.Image:
    """Return the pictogram as an RGBA square of `pixels` a side, mirrored if `flip`."""
    pen = Pen(pixels * SUPERSAMPLE, color)
    for shape in KINDS[kind].shapes:
        (method, place), *options = shape.items()
        getattr(pen, method)(place, **dict(options))
    image = pen.image.reduce(SUPERSAMPLE)
    return ImageOps.mirror(image) if flip else image


@lru_cache(maxsize=64)
def compute_extent(kind: str, flip: bool) -> UnitBox:
    """Return the tight box around the drawn thing, in unit coordinates."""
    box = draw_sprite(kind, "red", 200, flip).getbbox()
    assert box is not None, kind
    x1, y1, x2, y2 = (v / 200 for v in box)
    return (x1, y1, x2, y2)


def compute_part_box(kind: str, part: str, flip: bool) -> UnitBox:
    """Return the box of a part in unit coordinates."""
    x1, y1, x2, y2 = KINDS[kind].parts[part].box
    return (1 - x2, y1, 1 - x1, y2) if flip else (x1, y1, x2, y2)


def serves_use(shown: str, asked: str) -> bool:
    """Return whether a thing of kind `shown` could do what `asked` is used for."""
    return shown == asked or shown in KINDS[asked].substitutes

"""The kinds of things in MiniMIG's scenes: how each is drawn, its parts, its use.

Every kind is drawn by code in a unit square (x to the right, y down, both 0..1) and
scaled afterwards. Each has named parts with boxes in the same units, and a use, so
that a question can name the thing, one of its parts, or only its purpose.
"""

from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageOps

RGB = tuple[int, ...]
Fill = RGB | None
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

    Shapes are filled with `fill` (the main color if it is None) and outlined in the
    dark shade. The three shades are `main`, `dark` and `light`.

    Args:
        pixels: side of the image.
        color: a key of `COLORS`.
    """

    def __init__(self, pixels: int, color: str) -> None:
        self.image = Image.new("RGBA", (pixels, pixels), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)
        self._pixels = pixels
        self.main = COLORS[color]
        self.dark = tuple(int(c * 0.45) for c in self.main)
        self.light = tuple(int(c + (255 - c) * 0.62) for c in self.main)
        self._outline = max(1, round(pixels * 0.035))

    def _scale(self, *points: Point) -> list[Point]:
        return [(x * self._pixels, y * self._pixels) for x, y in points]

    def _corners(self, box: UnitBox) -> list[Point]:
        return self._scale(box[:2], box[2:])

    def polygon(self, points: list[Point], fill: Fill = None) -> None:
        """Draw a closed outline through `points`."""
        scaled = self._scale(*points)
        self._draw.polygon(scaled, fill=fill or self.main)
        self._draw.line([*scaled, scaled[0]], self.dark, self._outline, joint="curve")

    def rectangle(self, box: UnitBox, fill: Fill = None, radius: float = 0.0) -> None:
        """Draw a rectangle with its corners rounded by `radius`."""
        style = (radius * self._pixels, fill or self.main, self.dark, self._outline)
        self._draw.rounded_rectangle(self._corners(box), *style)

    def ellipse(self, box: UnitBox, fill: Fill = None) -> None:
        """Draw an ellipse inside `box`."""
        style = (fill or self.main, self.dark, self._outline)
        self._draw.ellipse(self._corners(box), *style)

    def union(self, *boxes: UnitBox) -> None:
        """Draw overlapping ellipses as one shape, without outlines where they meet."""
        for box in boxes:
            self.ellipse(box)
        inset = self._outline / self._pixels
        for x1, y1, x2, y2 in boxes:
            inside = (x1 + inset, y1 + inset, x2 - inset, y2 - inset)
            self._draw.ellipse(self._corners(inside), self.main)

    def pie(self, box: UnitBox, start: int, end: int, fill: Fill = None) -> None:
        """Draw a slice of an ellipse; angles in degrees clockwise from the right."""
        style = (fill or self.main, self.dark, self._outline)
        self._draw.pieslice(self._corners(box), start, end, *style)

    def arc(self, box: UnitBox, start: int, end: int, width: float = 0.08) -> None:
        """Draw a part of an ellipse's edge; the angles as for `pie`."""
        pixels = max(1, round(width * self._pixels))
        self._draw.arc(self._corners(box), start, end, self.dark, pixels)

    def line(self, points: list[Point], width: float = 0.08, fill: Fill = None) -> None:
        """Draw a line through `points`, `width` as a share of the square's side."""
        pixels = max(1, round(width * self._pixels))
        self._draw.line(self._scale(*points), fill or self.dark, pixels, joint="curve")


def _draw(p: Pen, kind: str) -> None:
    """Draw a kind, from back to front."""
    match kind:
        case "umbrella":
            p.line([(0.5, 0.1), (0.5, 0.86)], 0.07)
            p.arc((0.5, 0.74, 0.74, 0.98), 0, 180, 0.08)
            p.pie((0.02, 0.06, 0.98, 1.02), 180, 360)
            for x in (0.02, 0.34, 0.66):
                p.pie((x, 0.44, x + 0.32, 0.64), 180, 360, p.light)
        case "key":
            p.line([(0.5, 0.4), (0.5, 0.96)], 0.16, p.main)
            p.rectangle((0.5, 0.64, 0.8, 0.75))
            p.rectangle((0.5, 0.85, 0.8, 0.96))
            p.ellipse((0.24, 0.03, 0.76, 0.5))
            p.ellipse((0.4, 0.16, 0.6, 0.36), p.light)
        case "lock":
            p.arc((0.24, 0.04, 0.76, 0.72), 180, 360, 0.12)
            p.line([(0.3, 0.36), (0.3, 0.5)], 0.12)
            p.line([(0.7, 0.36), (0.7, 0.5)], 0.12)
            p.rectangle((0.1, 0.44, 0.9, 0.97), radius=0.08)
            p.ellipse((0.42, 0.56, 0.58, 0.72), p.dark)
            p.line([(0.5, 0.66), (0.5, 0.85)], 0.08)
        case "cup":
            p.arc((0.56, 0.3, 0.98, 0.74), 270, 90, 0.11)
            p.polygon([(0.06, 0.2), (0.74, 0.2), (0.66, 0.9), (0.14, 0.9)])
            p.ellipse((0.06, 0.1, 0.74, 0.3), p.light)
        case "fish":
            p.polygon([(0.68, 0.5), (0.98, 0.2), (0.98, 0.8)], p.light)
            p.ellipse((0.02, 0.22, 0.78, 0.78))
            p.ellipse((0.15, 0.38, 0.26, 0.49), (255, 255, 255))
            p.arc((0.2, 0.3, 0.46, 0.7), 300, 60, 0.05)
        case "boat":
            p.line([(0.46, 0.04), (0.46, 0.7)], 0.06)
            p.polygon([(0.5, 0.06), (0.94, 0.6), (0.5, 0.6)], p.light)
            p.polygon([(0.42, 0.16), (0.42, 0.6), (0.14, 0.6)], p.light)
            p.polygon([(0.02, 0.66), (0.98, 0.66), (0.8, 0.96), (0.2, 0.96)])
        case "tree":
            p.rectangle((0.41, 0.62, 0.59, 0.98), (134, 92, 54))
            p.polygon([(0.5, 0.02), (0.82, 0.36), (0.18, 0.36)])
            p.polygon([(0.5, 0.2), (0.96, 0.72), (0.04, 0.72)])
        case "house":
            p.rectangle((0.12, 0.42, 0.88, 0.97), p.light)
            p.polygon([(0.5, 0.03), (0.99, 0.47), (0.01, 0.47)])
            p.rectangle((0.38, 0.6, 0.62, 0.97), p.dark)
        case "lamp":
            p.line([(0.5, 0.4), (0.5, 0.9)], 0.09)
            p.ellipse((0.4, 0.36, 0.6, 0.58), (255, 246, 170))
            p.polygon([(0.32, 0.04), (0.68, 0.04), (0.94, 0.46), (0.06, 0.46)])
            p.rectangle((0.24, 0.86, 0.76, 0.97), p.dark, radius=0.05)
        case "clock":
            p.line([(0.26, 0.8), (0.16, 0.96)], 0.09)
            p.line([(0.74, 0.8), (0.84, 0.96)], 0.09)
            p.ellipse((0.06, 0.02, 0.38, 0.3), p.dark)
            p.ellipse((0.62, 0.02, 0.94, 0.3), p.dark)
            p.ellipse((0.06, 0.1, 0.94, 0.94))
            p.ellipse((0.19, 0.22, 0.81, 0.82), (255, 255, 255))
            p.line([(0.5, 0.3), (0.5, 0.53), (0.68, 0.62)], 0.06)
        case "car":
            p.polygon([(0.2, 0.48), (0.32, 0.22), (0.7, 0.22), (0.82, 0.48)], p.light)
            p.rectangle((0.01, 0.46, 0.99, 0.74), radius=0.08)
            for x in (0.12, 0.62):
                p.ellipse((x, 0.58, x + 0.27, 0.84), (50, 50, 56))
                p.ellipse((x + 0.08, 0.66, x + 0.19, 0.76), (210, 210, 215))
        case "hammer":
            p.rectangle((0.42, 0.26, 0.58, 0.98), (168, 118, 70))
            p.polygon(
                [(0.62, 0.08), (0.98, 0.03), (0.84, 0.2), (0.98, 0.4), (0.62, 0.34)]
            )
            p.rectangle((0.08, 0.04, 0.66, 0.38), radius=0.04)
        case "apple":
            p.line([(0.5, 0.26), (0.54, 0.06)], 0.07)
            p.polygon(
                [(0.54, 0.16), (0.68, 0.03), (0.86, 0.06), (0.74, 0.19)], (70, 160, 70)
            )
            p.union((0.06, 0.2, 0.6, 0.94), (0.4, 0.2, 0.94, 0.94))
        case "chair":
            p.rectangle((0.14, 0.02, 0.34, 0.6), p.light)
            p.rectangle((0.12, 0.5, 0.9, 0.66))
            p.line([(0.2, 0.64), (0.2, 0.98)], 0.1)
            p.line([(0.82, 0.64), (0.82, 0.98)], 0.1)
        case "candle":
            p.polygon(
                [(0.5, 0.02), (0.64, 0.22), (0.58, 0.36), (0.42, 0.36), (0.36, 0.22)],
                (255, 190, 60),
            )
            p.rectangle((0.36, 0.36, 0.64, 0.88))
            p.polygon([(0.1, 0.82), (0.9, 0.82), (0.74, 0.97), (0.26, 0.97)], p.light)
        case "cart":
            p.line([(0.02, 0.12), (0.2, 0.16), (0.34, 0.66)], 0.08)
            p.polygon([(0.2, 0.26), (0.98, 0.26), (0.86, 0.64), (0.32, 0.64)])
            for x in (0.3, 0.64):
                p.ellipse((x, 0.7, x + 0.26, 0.96), (50, 50, 56))
                p.ellipse((x + 0.08, 0.78, x + 0.18, 0.88), (210, 210, 215))


@dataclass(frozen=True)
class Part:
    """A named part: its box in the unit square and what it is for."""

    box: UnitBox
    purpose: str


@dataclass(frozen=True)
class Kind:
    """What is known of one kind of thing.

    Attributes:
        use: completes "something that ...".
        need: completes "I need to ...".
        parts: named parts.
        substitutes: other kinds that a person might accept for the same use or need.
    """

    use: str
    need: str
    parts: dict[str, Part]
    substitutes: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "umbrella": Kind("keeps you dry", "stay dry in the rain", {
        "roof": Part((0.02, 0.06, 0.98, 0.62), "cover"),
        "handle": Part((0.44, 0.58, 0.76, 0.98), "hold")}, ("house", "tree", "car")),
    "key": Kind("opens a lock", "open a door", {
        "ring": Part((0.24, 0.03, 0.76, 0.5), "hold"),
        "blade": Part((0.42, 0.5, 0.8, 0.97), "turn")}, ("lock", "hammer")),
    "lock": Kind("keeps a door shut", "keep a door shut", {
        "hook": Part((0.22, 0.04, 0.78, 0.46), "hang"),
        "body": Part((0.1, 0.44, 0.9, 0.97), "store")}, ("key",)),
    "cup": Kind("holds a drink", "drink some tea", {
        "handle": Part((0.68, 0.28, 0.98, 0.76), "hold"),
        "bowl": Part((0.06, 0.1, 0.74, 0.9), "store")}),
    "fish": Kind("swims", "see something that swims", {
        "tail": Part((0.68, 0.2, 0.98, 0.8), "push"),
        "body": Part((0.02, 0.22, 0.78, 0.78), "store")}, ("boat",)),
    "boat": Kind("floats", "cross the water", {
        "sail": Part((0.14, 0.04, 0.94, 0.64), "push"),
        "hull": Part((0.02, 0.64, 0.98, 0.96), "store")}, ("fish",)),
    "tree": Kind("gives shade", "rest in the shade", {
        "crown": Part((0.04, 0.02, 0.96, 0.72), "cover"),
        "trunk": Part((0.39, 0.68, 0.61, 0.98), "stand")}, ("umbrella", "house")),
    "house": Kind("is lived in", "go home and sleep", {
        "roof": Part((0.01, 0.03, 0.99, 0.47), "cover"),
        "door": Part((0.36, 0.58, 0.64, 0.97), "enter")}, ("car", "boat")),
    "lamp": Kind("gives light", "see in the dark", {
        "shade": Part((0.06, 0.04, 0.94, 0.48), "cover"),
        "foot": Part((0.24, 0.6, 0.76, 0.97), "stand")}, ("candle",)),
    "clock": Kind("tells the time", "know the time", {
        "face": Part((0.17, 0.2, 0.83, 0.84), "show"),
        "legs": Part((0.12, 0.76, 0.88, 0.98), "stand")}),
    "car": Kind("drives on a road", "drive to town", {
        "wheel": Part((0.1, 0.56, 0.41, 0.86), "roll"),
        "window": Part((0.2, 0.2, 0.82, 0.48), "look")}, ("cart",)),
    "hammer": Kind("drives in a nail", "hit a nail", {
        "handle": Part((0.4, 0.38, 0.6, 0.98), "hold"),
        "head": Part((0.08, 0.03, 0.98, 0.4), "push")}),
    "apple": Kind("can be eaten", "eat something", {
        "leaf": Part((0.48, 0.02, 0.88, 0.26), "cover"),
        "body": Part((0.06, 0.2, 0.94, 0.94), "store")}),
    "chair": Kind("can be sat on", "sit down", {
        "back": Part((0.12, 0.02, 0.36, 0.52), "lean"),
        "legs": Part((0.12, 0.64, 0.9, 0.98), "stand")}),
    "candle": Kind("burns with a flame", "light a fire", {
        "flame": Part((0.34, 0.02, 0.66, 0.38), "show"),
        "foot": Part((0.1, 0.8, 0.9, 0.98), "stand")}, ("lamp",)),
    "cart": Kind("carries heavy loads", "move a heavy load", {
        "wheel": Part((0.28, 0.68, 0.58, 0.98), "roll"),
        "basket": Part((0.18, 0.24, 0.98, 0.66), "store")}, ("car", "boat")),
}  # fmt: skip


@lru_cache(maxsize=8192)
def draw_sprite(kind: str, color: str, pixels: int, flip: bool) -> Image.Image:
    """Return the pictogram as an RGBA square of `pixels` a side.

    Args:
        kind: a key of `KINDS`.
        color: a key of `COLORS`.
        pixels: side of the image.
        flip: whether left and right are exchanged.
    """
    pen = Pen(pixels * SUPERSAMPLE, color)
    _draw(pen, kind)
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

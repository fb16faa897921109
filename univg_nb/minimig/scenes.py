"""Scenes: things placed on a lit ground, and their rendering.

Coordinates are shares of the picture's side (0..1, x to the right, y down); boxes that
leave this module are integers 0..1000, the convention of the whole project.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from univg_nb.data.boxes import Box, compute_intersection, iou
from univg_nb.minimig.pictograms import (
    UnitBox,
    compute_extent,
    compute_part_box,
    draw_sprite,
)

CANVAS = 256  # pixels a side of a rendered scene
SMALL = (0.23, 0.28)  # side of a small thing, as a share of the picture's side
LARGE = (0.36, 0.44)
PLACES = ("clear", "rain", "night", "water", "sun")
SPLITS = ("train", "val", "test")

Label = tuple[str, str]  # (kind, color)


@dataclass(frozen=True)
class Thing:
    """A pictogram in a scene: center (x, y) and side `size` in shares, 0..1."""

    kind: str
    color: str
    x: float
    y: float
    size: float
    flip: bool = False

    @property
    def label(self) -> Label:
        """Kind and color."""
        return self.kind, self.color

    @property
    def name(self) -> str:
        """Color and kind, as in "red umbrella"."""
        return f"{self.color} {self.kind}"

    @property
    def is_large(self) -> bool:
        """Whether it counts as large (sizes between small and large do not occur)."""
        return self.size > 0.32

    def _to_grid(self, unit_box: UnitBox) -> Box:
        left, top = self.x - self.size / 2, self.y - self.size / 2
        corners = (
            left + unit_box[0] * self.size,
            top + unit_box[1] * self.size,
            left + unit_box[2] * self.size,
            top + unit_box[3] * self.size,
        )
        x1, y1, x2, y2 = (min(1000, max(0, round(1000 * v))) for v in corners)
        return (x1, y1, x2, y2)

    @property
    def box(self) -> Box:
        """The tight box around the whole thing, occluded parts included."""
        return self._to_grid(compute_extent(self.kind, self.flip))

    def compute_part_box(self, part: str) -> Box:
        """Return the box of the part of this name."""
        return self._to_grid(compute_part_box(self.kind, part, self.flip))


@dataclass(frozen=True)
class Scene:
    """Things in drawing order (later ones in front) at a place."""

    things: tuple[Thing, ...]
    place: str = "clear"  # one of `PLACES`
    tint: int = 0  # shade of the ground, 0..3

    @property
    def split(self) -> str:
        """The split of this content, by its hash, so that splits are disjoint."""
        text = ";".join(
            f"{t.kind},{t.color},{t.x:.2f},{t.y:.2f},{t.size:.2f}"
            for t in self.sort_by_position()
        )
        digest = hashlib.blake2b(f"{self.place};{text}".encode(), digest_size=8)
        bucket = int.from_bytes(digest.digest()) % 10
        return {8: "val", 9: "test"}.get(bucket, "train")

    def sort_by_position(self) -> list[Thing]:
        """Return the things from left to right."""
        return sorted(self.things, key=lambda t: (t.x, t.y))

    def find(self, label: Label) -> Thing:
        """Return the one thing with this label; a task must not have more or fewer."""
        (thing,) = (t for t in self.things if t.label == label)
        return thing

    def move(self, points: Iterable[tuple[float, float]]) -> "Scene":
        """Return the scene with the centers of its things at these points."""
        things = tuple(
            replace(thing, x=round(x, 3), y=round(y, 3))
            for thing, (x, y) in zip(self.things, points, strict=True)
        )
        return replace(self, things=things)

    def compute_occlusion(self, thing: Thing) -> float:
        """Return the share (0..1) of the thing's box behind later things' boxes."""
        x1, y1, x2, y2 = thing.box
        later = self.things[self.things.index(thing) + 1 :]
        covered = sum(compute_intersection(thing.box, other.box) for other in later)
        return min(1.0, covered / ((x2 - x1) * (y2 - y1)))

    @property
    def max_occlusion(self) -> float:
        """The largest share of a thing that is occluded."""
        return max(map(self.compute_occlusion, self.things), default=0.0)


def make_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """Return a generator that depends on (seed, split, index) and nothing else.

    Raises:
        ValueError: if `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    return np.random.default_rng([seed, SPLITS.index(split), index])


def sample_size(rng: np.random.Generator, large: bool) -> float:
    """Draw a side from the small or the large range, in steps of 1/64."""
    low, high = LARGE if large else SMALL
    return round(float(rng.uniform(low, high)) * 64) / 64


def place_thing(
    rng: np.random.Generator, thing: Thing, others: Sequence[Thing], max_iou: float
) -> Thing:
    """Move `thing` to a random position where it overlaps little with `others`.

    The IoU of its box with another's is at most `max_iou`; after 40 tries the position
    with the smallest IoU is taken. Its own position is ignored.
    """
    best, least = thing, 2.0
    half = thing.size / 2
    for _ in range(40):
        x, y = rng.uniform(half, 1 - half, size=2)
        moved = replace(thing, x=round(float(x), 3), y=round(float(y), 3))
        overlap = max((iou(moved.box, other.box) for other in others), default=0.0)
        if overlap < least:
            best, least = moved, overlap
        if overlap <= max_iou:
            break
    return best


@lru_cache(maxsize=32)
def _render_ground(place: str, tint: int) -> Image.Image:
    """Render the empty ground, on which light falls off to the right and downwards.

    The two gradients matter to the model too: its vision tower has no absolute
    positions, so where a thing stands can be seen only from the picture.
    """
    y, x = np.mgrid[0:CANVAS, 0:CANVAS] / (CANVAS - 1)
    base = np.array(
        [[214, 234, 250], [222, 232, 246], [210, 236, 244], [218, 230, 252]]
    )
    rgb = base[tint][None, None, :] + np.zeros((CANVAS, CANVAS, 3))
    rgb = rgb + x[..., None] * np.array([36.0, -14.0, -64.0])
    rgb = rgb + y[..., None] * np.array([-70.0, -28.0, -36.0])
    if place == "night":
        rgb = rgb * 0.42 + np.array([0.0, 4.0, 34.0])
    if place == "rain":
        rgb = rgb * 0.86 - 6
    image = Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).convert("RGBA")
    return _draw_place(image, place)


def _draw_place(image: Image.Image, place: str) -> Image.Image:
    """Draw what shows the place: drops, moon and stars, waves, or the sun."""
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    if place == "rain":
        for row, y in enumerate(range(8, CANVAS, 32)):
            for x in range(4 + 16 * (row % 2), CANVAS, 32):
                pen.line([(x, y), (x - 6, y + 18)], (70, 100, 190, 210), 4)
    elif place == "night":
        pen.ellipse((196, 10, 244, 58), (250, 240, 190, 255))
        sky = np.asarray(image)[20, 190, :3].tolist()
        pen.ellipse((182, 4, 228, 50), (*sky, 255))
        for row, y in enumerate(range(16, CANVAS, 44)):
            for x in range(14 + 30 * (row % 2), CANVAS, 60):
                pen.ellipse((x, y, x + 6, y + 6), (255, 250, 210, 230))
    elif place == "water":
        for row, y in enumerate(range(20, CANVAS, 36)):
            for x in range(-20 + 20 * (row % 2), CANVAS, 40):
                pen.arc((x, y, x + 40, y + 16), 20, 160, (40, 140, 210, 230), 5)
    elif place == "sun":
        pen.ellipse((-34, -34, 44, 44), (255, 196, 40, 255))
        for angle in np.linspace(0.05, np.pi / 2 - 0.05, 6):
            c, s = float(np.cos(angle)), float(np.sin(angle))
            pen.line([(52 * c, 52 * s), (84 * c, 84 * s)], (255, 196, 40, 255), 7)
    return Image.alpha_composite(image, layer)


def render(scene: Scene, pixels: int = CANVAS) -> Image.Image:
    """Render the scene as an RGB image of `pixels` a side."""
    image = _render_ground(scene.place, scene.tint).copy()
    if pixels != CANVAS:
        image = image.resize((pixels, pixels), Image.Resampling.BILINEAR)
    for thing in scene.things:
        side = round(thing.size * pixels)
        sprite = draw_sprite(thing.kind, thing.color, side, thing.flip)
        left = round((thing.x - thing.size / 2) * pixels)
        top = round((thing.y - thing.size / 2) * pixels)
        image.paste(sprite, (left, top), sprite)
    return image.convert("RGB")

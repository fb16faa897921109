"""Scenes: things placed on a softly lit ground, rendered to a picture.

Coordinates are shares of the picture's side (0..1, x right, y down); boxes that
leave this module are integers 0..1000, the convention of the whole project.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from univg_nb.data.boxes import Box, iou
from univg_nb.minimig.pictograms import COLOURS, KINDS, extent, part_box, sprite

CANVAS = 256  # pixels a side of a rendered scene
SMALL = (0.23, 0.28)  # side of a small thing, as a share of the picture's side
LARGE = (0.36, 0.44)
PLACES = ("clear", "rain", "night", "water", "sun")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Thing:
    """A pictogram in a scene: centre (x, y) and side ``size`` in shares, 0..1."""

    kind: str
    colour: str
    x: float
    y: float
    size: float
    flip: bool = False

    @property
    def name(self) -> str:
        """Colour and kind, as in "red umbrella"."""
        return f"{self.colour} {self.kind}"

    @property
    def large(self) -> bool:
        """Whether it counts as large (the sizes between are never drawn)."""
        return self.size > 0.32

    def _on_canvas(self, unit: tuple[float, float, float, float]) -> Box:
        left, top = self.x - self.size / 2, self.y - self.size / 2
        corners = (
            left + unit[0] * self.size,
            top + unit[1] * self.size,
            left + unit[2] * self.size,
            top + unit[3] * self.size,
        )
        x1, y1, x2, y2 = (min(1000, max(0, round(1000 * v))) for v in corners)
        return (x1, y1, x2, y2)

    @property
    def box(self) -> Box:
        """The tight box around the whole thing, occluded parts included."""
        return self._on_canvas(extent(self.kind, self.flip))

    def part(self, name: str) -> Box:
        """The box of the part called ``name``."""
        return self._on_canvas(part_box(self.kind, name, self.flip))


@dataclass(frozen=True)
class Scene:
    """Things in drawing order (later ones in front) at a place (``PLACES``)."""

    things: tuple[Thing, ...]
    place: str = "clear"
    tint: int = 0  # 0..3, a faint tone of the ground

    def bucket(self) -> int:
        """0..9 from the content; decides the split, so that splits are disjoint."""
        text = ";".join(
            f"{t.kind},{t.colour},{t.x:.2f},{t.y:.2f},{t.size:.2f}"
            for t in sorted(self.things, key=lambda t: (t.x, t.y))
        )
        digest = hashlib.blake2b(f"{self.place};{text}".encode(), digest_size=8)
        return int.from_bytes(digest.digest()) % 10

    def split(self) -> str:
        """ "val" for bucket 8, "test" for bucket 9, "train" for the others."""
        return {8: "val", 9: "test"}.get(self.bucket(), "train")

    def reading_order(self) -> list[Thing]:
        """The things from left to right."""
        return sorted(self.things, key=lambda t: (t.x, t.y))


def rng_for(seed: int, split: str, index: int) -> np.random.Generator:
    """A generator that depends on (seed, split, index) and nothing else."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    return np.random.default_rng([seed, SPLITS.index(split), index])


def random_size(rng: np.random.Generator, large: bool) -> float:
    """A side from the small or the large range, in steps of 1/64."""
    low, high = LARGE if large else SMALL
    return round(float(rng.uniform(low, high)) * 64) / 64


def place_thing(
    rng: np.random.Generator,
    thing: Thing,
    others: Sequence[Thing],
    max_overlap: float = 0.12,
) -> Thing:
    """Moves ``thing`` to a random spot where it hides little of ``others``.

    After 40 tries the spot with the least overlap (in IoU of boxes) is taken.
    """
    best, least = thing, 2.0
    half = thing.size / 2
    for _ in range(40):
        x, y = rng.uniform(half, 1 - half, size=2)
        moved = replace(thing, x=round(float(x), 3), y=round(float(y), 3))
        overlap = max((iou(moved.box, o.box) for o in others), default=0.0)
        if overlap < least:
            best, least = moved, overlap
        if overlap <= max_overlap:
            break
    return best


def random_things(
    rng: np.random.Generator,
    n: int,
    names: Sequence[tuple[str, str]] | None = None,
    others: Sequence[Thing] = (),
    max_overlap: float = 0.12,
    large_share: float | None = None,
) -> list[Thing]:
    """``n`` things with different (kind, colour), placed beside ``others``.

    ``names`` fixes the (kind, colour) pairs; else they are drawn so that
    neighbours often share a kind or a colour, as distractors do.
    """
    if names is None:
        names = random_names(rng, n, {(t.kind, t.colour) for t in others})
    if large_share is None:
        large_share = (0.6, 0.5, 0.45, 0.35, 0.2, 0.1)[min(n + len(others), 6) - 1]
    placed = list(others)
    drawn = []
    for kind, colour in names:
        size = random_size(rng, bool(rng.random() < large_share))
        thing = Thing(kind, colour, 0.5, 0.5, size, bool(rng.random() < 0.5))
        thing = place_thing(rng, thing, placed, max_overlap)
        placed.append(thing)
        drawn.append(thing)
    return drawn


def random_names(
    rng: np.random.Generator, n: int, taken: set[tuple[str, str]] = frozenset()
) -> list[tuple[str, str]]:
    """``n`` different (kind, colour) pairs; half share an attribute with one before."""
    kinds, colours = list(KINDS), list(COLOURS)
    names: list[tuple[str, str]] = []
    while len(names) < n:
        kind, colour = str(rng.choice(kinds)), str(rng.choice(colours))
        if names and rng.random() < 0.5:
            other = names[int(rng.integers(len(names)))]
            if rng.random() < 0.5:
                kind = other[0]
            else:
                colour = other[1]
        if (kind, colour) not in names and (kind, colour) not in taken:
            names.append((kind, colour))
    return names


def random_scene(
    rng: np.random.Generator,
    n: int,
    split: str = "train",
    names: Sequence[tuple[str, str]] | None = None,
    place: str = "clear",
    max_overlap: float = 0.12,
) -> Scene:
    """A scene of ``n`` things whose content belongs to ``split``."""
    while True:
        things = random_things(rng, n, names, max_overlap=max_overlap)
        scene = Scene(tuple(things), place, int(rng.integers(4)))
        if scene.split() == split:
            return scene


@lru_cache(maxsize=32)
def _ground(place: str, tint: int) -> Image.Image:
    """The empty ground: light falls off to the right and downwards.

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
    return _with_place(image, place)


def _with_place(image: Image.Image, place: str) -> Image.Image:
    """Draws what shows the place: drops, moon and stars, waves or the sun."""
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    steps = range(8, CANVAS, 32)
    if place == "rain":
        for row, y in enumerate(steps):
            for x in range(4 + 16 * (row % 2), CANVAS, 32):
                pen.line([(x, y), (x - 6, y + 18)], (70, 100, 190, 210), 4)
    elif place == "night":
        pen.ellipse((196, 10, 244, 58), (250, 240, 190, 255))
        pen.ellipse((182, 4, 228, 50), (*image.getpixel((190, 20))[:3], 255))
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
    """Draws the scene as an RGB picture of ``pixels`` a side."""
    image = _ground(scene.place, scene.tint).copy()
    if pixels != CANVAS:
        image = image.resize((pixels, pixels), Image.Resampling.BILINEAR)
    for thing in scene.things:
        picture = sprite(
            thing.kind, thing.colour, round(thing.size * pixels), thing.flip
        )
        left = round((thing.x - thing.size / 2) * pixels)
        top = round((thing.y - thing.size / 2) * pixels)
        image.paste(picture, (left, top), picture)
    return image.convert("RGB")

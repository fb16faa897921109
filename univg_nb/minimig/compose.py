"""Builds the scenes of a task: distractors, occlusion, other views, moving things.

Every scene that leaves this module belongs to the split asked for (`Scene.split`):
things are nudged by a few thousandths of the picture until it does.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from univg_nb.data.boxes import Box
from univg_nb.minimig.pictograms import COLOURS, KINDS
from univg_nb.minimig.scenes import Scene, Thing, place_thing, random_size

LEVELS = ("easy", "medium", "hard")
# Largest overlap of two boxes (IoU) and largest hidden share of a thing, by level.
OVERLAP = {"easy": 0.02, "medium": 0.08, "hard": 0.2}
HIDDEN = {"easy": 0.06, "medium": 0.15, "hard": 0.4}
NUDGE = 0.015  # in shares of the picture's side

Name = tuple[str, str]  # (kind, colour), as in random_names


@dataclass(frozen=True)
class Draft:
    """What a task makes: pictures, question, answer, chain, before it is filed.

    ``target`` is the thing whose box, or whose part's box, is the answer, and
    ``asked`` the number of the image it stands in, counted from 1.
    """

    scenes: tuple[Scene, ...]
    images: tuple[Image.Image, ...]
    question: str
    answer: Box
    chain: str | None
    target: Thing
    asked: int = 1


def pick(rng: np.random.Generator, options: Sequence):
    """One of ``options``."""
    return options[int(rng.integers(len(options)))]


def count(rng: np.random.Generator, level: str, most: int = 5) -> int:
    """Things in a picture: 2 easy, 3 medium, 4 or 5 hard, never above ``most``."""
    n = {"easy": 2, "medium": 3, "hard": 4}[level]
    if level == "hard" and rng.random() < 0.35:
        n = 5
    return min(n, most)


def any_name(
    rng: np.random.Generator,
    kinds: Sequence[str] = tuple(KINDS),
    colours: Sequence[str] = tuple(COLOURS),
) -> Name:
    """A random (kind, colour)."""
    return pick(rng, kinds), pick(rng, colours)


def distractors(
    rng: np.random.Generator,
    target: Name,
    n: int,
    level: str,
    kinds: Sequence[str] = tuple(KINDS),
    taken: Collection[Name] = (),
    colours: Sequence[str] = tuple(COLOURS),
) -> list[Name]:
    """``n`` names beside ``target``, different from it, ``taken`` and each other.

    easy: none shares its kind or colour; medium: one shares either; hard: one shares
    its kind, one its colour. Kinds and colours come from ``kinds`` and ``colours``
    alone, which need not hold the target's.
    """
    plan = {
        "easy": [],
        "medium": [pick(rng, ("kind", "colour"))],
        "hard": ["kind", "colour"],
    }[level]
    names: list[Name] = []
    for i in range(n):
        shared = plan[i] if i < len(plan) else ""
        if shared == "kind" and target[0] not in kinds:
            shared = "colour"
        elif shared == "colour" and target[1] not in colours:
            shared = "kind"
        while True:
            kind, colour = any_name(rng, kinds, colours)
            kind = target[0] if shared == "kind" else kind
            colour = target[1] if shared == "colour" else colour
            if level == "easy" and (kind == target[0] or colour == target[1]):
                continue
            if (kind, colour) not in {target, *names, *taken}:
                names.append((kind, colour))
                break
    return names


def nudged(rng: np.random.Generator, scene: Scene, by: float = NUDGE) -> Scene:
    """The scene with every thing moved by up to ``by``, none out of the picture."""
    things = []
    for t in scene.things:
        half = t.size / 2
        x, y = (
            round(min(1 - half, max(half, v + rng.uniform(-by, by))), 3)
            for v in (t.x, t.y)
        )
        things.append(replace(t, x=x, y=y))
    return replace(scene, things=tuple(things))


def settle(rng: np.random.Generator, scene: Scene, split: str) -> Scene:
    """The scene, nudged until it is in ``split``, more and more if need be."""
    settled, by = scene, NUDGE
    while settled.split() != split:
        settled = nudged(rng, scene, by)
        by *= 1.02  # one thing alone has few places within the first nudge
    return settled


def hidden_share(scene: Scene, index: int) -> float:
    """Share of the box of thing ``index`` behind later things' boxes, at most 1."""
    x1, y1, x2, y2 = scene.things[index].box
    covered = 0
    for other in scene.things[index + 1 :]:
        a1, b1, a2, b2 = other.box
        width, height = min(x2, a2) - max(x1, a1), min(y2, b2) - max(y1, b1)
        covered += max(0, width) * max(0, height)
    return min(1.0, covered / ((x2 - x1) * (y2 - y1)))


def well_visible(scene: Scene, level: str) -> bool:
    """Whether no thing is hidden more than the level allows."""
    shares = (hidden_share(scene, i) for i in range(len(scene.things)))
    return all(share <= HIDDEN[level] for share in shares)


def lay(
    rng: np.random.Generator,
    names: Sequence[Name],
    level: str,
    place: str = "clear",
    large: Collection[Name] = (),
) -> Scene:
    """Things of these names at random places, not yet settled; ``large`` ones large."""
    share = (0.6, 0.5, 0.45, 0.3, 0.15)[len(names) - 1]
    while True:
        things: list[Thing] = []
        for i in rng.permutation(len(names)):
            kind, colour = names[i]
            big = names[i] in large or rng.random() < share
            flip = bool(rng.random() < 0.5)
            thing = Thing(kind, colour, 0.5, 0.5, random_size(rng, big), flip)
            things.append(place_thing(rng, thing, things, OVERLAP[level]))
        scene = Scene(tuple(things), place, int(rng.integers(4)))
        if well_visible(scene, level):
            return scene


def compose(
    rng: np.random.Generator,
    names: Sequence[Name],
    level: str,
    split: str,
    place: str = "clear",
    large: Collection[Name] = (),
) -> Scene:
    """`lay`, settled in ``split`` and still well visible."""
    while True:
        scene = settle(rng, lay(rng, names, level, place, large), split)
        if well_visible(scene, level):
            return scene


def another_view(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene from elsewhere: mirrored, zoomed and shifted; nothing leaves it."""
    while True:
        mirror = bool(rng.random() < 0.5)
        zoom = float(rng.uniform(0.84, 1.16))
        sizes = [round(t.size * zoom * 64) / 64 for t in scene.things]
        moved = []
        for axis in ("x", "y"):
            flipped = mirror and axis == "x"
            at = [getattr(t, axis) for t in scene.things]
            at = [0.5 + ((1 - v if flipped else v) - 0.5) * zoom for v in at]
            low = max(s / 2 - v for v, s in zip(at, sizes, strict=True))
            high = min(1 - s / 2 - v for v, s in zip(at, sizes, strict=True))
            low, high = max(low, -0.2), min(high, 0.2)
            if low > high:
                break
            shift = float(rng.uniform(low, high))
            moved.append([round(v + shift, 3) for v in at])
        if len(moved) < 2 or not (mirror or abs(zoom - 1) > 0.07 or abs(shift) > 0.07):
            continue
        things = tuple(
            replace(t, x=x, y=y, size=size, flip=t.flip != mirror)
            for t, x, y, size in zip(scene.things, *moved, sizes, strict=True)
        )
        return Scene(things, scene.place, int(rng.integers(4)))


def the_thing(scene: Scene, name: Name) -> Thing:
    """The one thing of this name; more or fewer are a mistake of the task."""
    found = [t for t in scene.things if (t.kind, t.colour) == name]
    assert len(found) == 1, (name, scene)
    return found[0]

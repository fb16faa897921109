"""Building blocks of the tasks: labels, layouts, occlusion, other views, drafts.

Every scene of a draft belongs to the split that was asked for (`Scene.split`): its
things are moved by a few thousandths of the picture until it does.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from PIL import Image

from univg_nb.data.boxes import Box
from univg_nb.minimig.phrases import ORDINALS, QUESTIONS
from univg_nb.minimig.pictograms import COLORS, KINDS
from univg_nb.minimig.scenes import (
    Label,
    Scene,
    Thing,
    compute_intersection,
    place_thing,
    render,
    sample_size,
)

LEVELS = ("easy", "medium", "hard")
# Largest IoU of two boxes and largest occluded share of a thing, by level.
MAX_IOU = {"easy": 0.02, "medium": 0.08, "hard": 0.2}
MAX_OCCLUSION = {"easy": 0.06, "medium": 0.15, "hard": 0.4}
JITTER = 0.015  # in shares of the picture's side

Option = TypeVar("Option")


@dataclass
class Draft:
    """What a task makes of random numbers.

    Attributes:
        scenes: the scenes behind the images.
        question: text of the question.
        chain: the reasoning chain; None for tasks without one.
        target: the thing that is asked for.
        target_image: number of the image that holds it, counted from 1.
        images: what is shown; by default the rendered scenes.
        part: the part of the target that is asked for; "" for the whole.
    """

    scenes: Sequence[Scene]
    question: str
    chain: str | None
    target: Thing
    target_image: int = 1
    images: Sequence[Image.Image] = ()
    part: str = ""

    def __post_init__(self) -> None:
        self.images = self.images or [render(scene) for scene in self.scenes]

    @property
    def answer(self) -> Box:
        """The target box."""
        if self.part:
            return self.target.compute_part_box(self.part)
        return self.target.box


def choose(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    """Return one of `options`, all equally likely."""
    return options[int(rng.integers(len(options)))]


def choose_question(rng: np.random.Generator, task: str, **fields: object) -> str:
    """Return one of the task's wordings with its fields filled in.

    "image 2" is far more frequent than "the second image".

    Args:
        rng: source of random numbers.
        task: a key of `QUESTIONS`.
        fields: values of the fields in braces.
    """
    text = choose(rng, QUESTIONS[task])
    if "{ordinal}" in text and rng.random() < 0.5:
        text = QUESTIONS[task][0]
    if isinstance(number := fields.get("k"), int):
        fields["ordinal"] = ORDINALS[number - 1]
    return text.format(**fields)


def sample_label(
    rng: np.random.Generator,
    kinds: Sequence[str] = tuple(KINDS),
    colors: Sequence[str] = tuple(COLORS),
) -> Label:
    """Draw a kind and a color."""
    return choose(rng, kinds), choose(rng, colors)


def sample_num_things(rng: np.random.Generator, level: str, most: int = 5) -> int:
    """Draw the number of things in a picture: 2 easy, 3 medium, 4 or 5 hard."""
    n = {"easy": 2, "medium": 3, "hard": 4}[level]
    if level == "hard" and rng.random() < 0.35:
        n = 5
    return min(n, most)


def sample_distractors(
    rng: np.random.Generator,
    target: Label,
    n: int,
    level: str,
    kinds: Sequence[str] = tuple(KINDS),
    taken: Collection[Label] = (),
    colors: Sequence[str] = tuple(COLORS),
) -> list[Label]:
    """Draw `n` labels that differ from the target's, from `taken` and from each other.

    On level easy none shares its kind or color, on medium one shares either, on hard
    one shares its kind and one its color.

    Args:
        rng: source of random numbers.
        target: label of the target.
        n: how many labels.
        level: one of `LEVELS`.
        kinds: kinds to choose from; the target's need not be among them.
        taken: labels that may not occur.
        colors: colors to choose from; the target's need not be among them.
    """
    plan = {
        "easy": [],
        "medium": [choose(rng, ("kind", "color"))],
        "hard": ["kind", "color"],
    }[level]
    labels: list[Label] = []
    for i in range(n):
        shared = plan[i] if i < len(plan) else ""
        if shared == "kind" and target[0] not in kinds:
            shared = "color"
        elif shared == "color" and target[1] not in colors:
            shared = "kind"
        while True:
            kind, color = sample_label(rng, kinds, colors)
            kind = target[0] if shared == "kind" else kind
            color = target[1] if shared == "color" else color
            if level == "easy" and (kind == target[0] or color == target[1]):
                continue
            if (kind, color) not in {target, *labels, *taken}:
                labels.append((kind, color))
                break
    return labels


def sample_labels(rng: np.random.Generator, level: str, most: int = 5) -> list[Label]:
    """Draw the labels of a picture, at most `most`; the first is the target's."""
    target = sample_label(rng)
    n = sample_num_things(rng, level, most)
    return [target, *sample_distractors(rng, target, n - 1, level)]


def jitter(rng: np.random.Generator, scene: Scene, by: float = JITTER) -> Scene:
    """Move every thing by up to `by` (a share of the side), none out of the picture."""
    things = []
    for t in scene.things:
        half = t.size / 2
        x, y = (
            round(min(1 - half, max(half, v + rng.uniform(-by, by))), 3)
            for v in (t.x, t.y)
        )
        things.append(replace(t, x=x, y=y))
    return replace(scene, things=tuple(things))


def move_to_split(rng: np.random.Generator, scene: Scene, split: str) -> Scene:
    """Jitter the scene until it belongs to `split`, by more and more if needed."""
    moved, by = scene, JITTER
    while moved.split != split:
        moved = jitter(rng, scene, by)
        by *= 1.02  # a single thing has few positions within the first jitter
    return moved


def compute_occlusion(scene: Scene, index: int) -> float:
    """Return the share (0..1) of thing `index`'s box behind later things' boxes."""
    box = scene.things[index].box
    covered = sum(compute_intersection(box, t.box) for t in scene.things[index + 1 :])
    return min(1.0, covered / ((box[2] - box[0]) * (box[3] - box[1])))


def is_visible(scene: Scene, level: str) -> bool:
    """Return whether no thing is occluded by more than the level allows."""
    shares = (compute_occlusion(scene, i) for i in range(len(scene.things)))
    return all(share <= MAX_OCCLUSION[level] for share in shares)


def sample_scene(
    rng: np.random.Generator,
    labels: Sequence[Label],
    level: str,
    split: str | None = None,
    place: str = "clear",
    large: Collection[Label] = (),
) -> Scene:
    """Place things with these labels at random, all of them visible.

    Args:
        rng: source of random numbers.
        labels: kind and color of each thing.
        level: one of `LEVELS`; limits overlap and occlusion.
        split: the split that the scene must belong to; None for a scene that is
            changed before it is moved to its split.
        place: one of `PLACES`.
        large: labels whose things are large in any case.
    """
    large_share = (0.6, 0.5, 0.45, 0.3, 0.15)[len(labels) - 1]
    while True:
        things: list[Thing] = []
        for i in rng.permutation(len(labels)):
            kind, color = labels[i]
            is_large = labels[i] in large or rng.random() < large_share
            flip = bool(rng.random() < 0.5)
            thing = Thing(kind, color, 0.5, 0.5, sample_size(rng, is_large), flip)
            things.append(place_thing(rng, thing, things, MAX_IOU[level]))
        scene = Scene(tuple(things), place, int(rng.integers(4)))
        if is_visible(scene, level):
            if split is not None:
                scene = move_to_split(rng, scene, split)
            if is_visible(scene, level):
                return scene


def change_view(rng: np.random.Generator, scene: Scene) -> Scene:
    """Mirror, zoom and shift the scene at random; everything stays in the picture."""
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

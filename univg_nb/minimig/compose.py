"""Building blocks of the tasks: a `Sampler` of labels, scenes and views, and `Draft`.

Every scene of a draft belongs to the split that was asked for (`Scene.split`): its
things are moved by a few thousandths of the picture until it does.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from PIL import Image

from univg_nb.data.boxes import Box
from univg_nb.minimig.phrases import ORDINALS, QUESTIONS, describe_position
from univg_nb.minimig.pictograms import COLORS, KINDS
from univg_nb.minimig.scenes import (
    Label,
    Scene,
    Thing,
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
    """What a task makes of random numbers."""

    scenes: Sequence[Scene]  # behind the images
    question: str
    steps: str | None  # the chain without its last sentence; None for no chain
    target: Thing  # what is asked for
    target_image: int = 1  # the image that holds it, counted from 1
    images: Sequence[Image.Image] = ()  # by default the rendered scenes
    part: str = ""  # of the target, that is asked for; "" for the whole

    def __post_init__(self) -> None:
        self.images = self.images or [render(scene) for scene in self.scenes]

    @property
    def answer(self) -> Box:
        """The target box."""
        if self.part:
            return self.target.compute_part_box(self.part)
        return self.target.box

    @property
    def conclusion(self) -> str:
        """What the target is and where, as in "the red cup in image 2, at the top"."""
        x, y, name = self.target.x, self.target.y, self.target.name
        if self.part:
            x1, y1, x2, y2 = self.answer
            x, y = (x1 + x2) / 2000, (y1 + y2) / 2000
            name = f"{self.part} of the {name}"
        return f"the {name} in image {self.target_image}, {describe_position(x, y)}"

    @property
    def chain(self) -> str | None:
        """The reasoning chain, which ends with what and where the target is."""
        if self.steps is None:
            return None
        return f"{self.steps} So the target is {self.conclusion}."


def choose(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    """Return one of `options`, all equally likely."""
    return options[int(rng.integers(len(options)))]


@dataclass(frozen=True)
class Sampler:
    """Draws what a task is made of, at random."""

    rng: np.random.Generator
    level: str  # one of `LEVELS`
    split: str  # train, val or test; `move_to_split` and `sample_scene` keep to it

    def choose(self, options: Sequence[Option]) -> Option:
        """Return one of `options`, all equally likely."""
        return choose(self.rng, options)

    def is_true(self, share: float) -> bool:
        """Return True in this share of the cases."""
        return bool(self.rng.random() < share)

    def choose_question(self, task: str, **fields: object) -> str:
        """Return one of the task's wordings in `QUESTIONS` with its fields filled in.

        "image 2" is far more frequent than "the second image".
        """
        text = self.choose(QUESTIONS[task])
        if "{ordinal}" in text and self.is_true(0.5):
            text = QUESTIONS[task][0]
        if isinstance(number := fields.get("k"), int):
            fields["ordinal"] = ORDINALS[number - 1]
        return text.format(**fields)

    def sample_label(
        self, kinds: Sequence[str] = tuple(KINDS), colors: Sequence[str] = tuple(COLORS)
    ) -> Label:
        """Draw a kind and a color."""
        return self.choose(kinds), self.choose(colors)

    def sample_num_things(self, most: int = 5) -> int:
        """Draw the number of things in a picture: 2 easy, 3 medium, 4 or 5 hard."""
        n = {"easy": 2, "medium": 3, "hard": 4}[self.level]
        if self.level == "hard" and self.is_true(0.35):
            n = 5
        return min(n, most)

    def sample_distractors(
        self,
        target: Label,
        n: int,
        kinds: Sequence[str] = tuple(KINDS),
        colors: Sequence[str] = tuple(COLORS),
        taken: Collection[Label] = (),
    ) -> list[Label]:
        """Draw labels that differ from the target's, from `taken` and from each other.

        On level easy none shares its kind or color, on medium one shares either, on
        hard one shares its kind and one its color. The target's kind and color need not
        be among those to choose from.
        """
        plan = {
            "easy": [],
            "medium": [self.choose(("kind", "color"))],
            "hard": ["kind", "color"],
        }[self.level]
        labels: list[Label] = []
        for i in range(n):
            shared = plan[i] if i < len(plan) else ""
            if shared == "kind" and target[0] not in kinds:
                shared = "color"
            elif shared == "color" and target[1] not in colors:
                shared = "kind"
            while True:
                kind, color = self.sample_label(kinds, colors)
                kind = target[0] if shared == "kind" else kind
                color = target[1] if shared == "color" else color
                if self.level == "easy" and (kind == target[0] or color == target[1]):
                    continue
                if (kind, color) not in {target, *labels, *taken}:
                    labels.append((kind, color))
                    break
        return labels

    def sample_labels(
        self,
        most: int = 5,
        target: Label | None = None,
        kinds: Sequence[str] = tuple(KINDS),
        taken: Collection[Label] = (),
    ) -> list[Label]:
        """Draw at most `most` labels of a picture: the target's, then distractors'.

        A target that is None is drawn; `kinds` and `taken` are for the distractors.
        """
        target = target or self.sample_label()
        n = self.sample_num_things(most)
        return [target, *self.sample_distractors(target, n - 1, kinds, taken=taken)]

    def jitter(self, scene: Scene, by: float = JITTER) -> Scene:
        """Move every thing by up to `by`, in shares; none leaves the picture."""

        def shift(value: float, half: float) -> float:
            return min(1 - half, max(half, value + self.rng.uniform(-by, by)))

        halves = ((t, t.size / 2) for t in scene.things)
        return scene.move((shift(t.x, half), shift(t.y, half)) for t, half in halves)

    def move_to_split(self, scene: Scene) -> Scene:
        """Jitter the scene, by more and more, until it belongs to the split."""
        moved, by = scene, JITTER
        while moved.split != self.split:
            moved = self.jitter(scene, by)
            by *= 1.02  # a single thing has few positions within the first jitter
        return moved

    def is_visible(self, scene: Scene) -> bool:
        """Return whether no thing is occluded by more than the level allows."""
        return scene.max_occlusion <= MAX_OCCLUSION[self.level]

    def sample_scene(
        self,
        labels: Sequence[Label],
        place: str = "clear",
        large: Collection[Label] = (),
        any_split: bool = False,
    ) -> Scene:
        """Place a thing of each label at random, all of them visible.

        Those of the labels `large` are large in any case. `any_split` is for a scene
        that is changed before it is moved to its split.
        """
        large_share = (0.6, 0.5, 0.45, 0.3, 0.15)[len(labels) - 1]
        while True:
            things: list[Thing] = []
            for i in self.rng.permutation(len(labels)):
                kind, color = labels[i]
                is_large = labels[i] in large or self.is_true(large_share)
                flip = self.is_true(0.5)
                size = sample_size(self.rng, is_large)
                thing = Thing(kind, color, 0.5, 0.5, size, flip)
                max_iou = MAX_IOU[self.level]
                things.append(place_thing(self.rng, thing, things, max_iou))
            scene = Scene(tuple(things), place, int(self.rng.integers(4)))
            if self.is_visible(scene):
                scene = scene if any_split else self.move_to_split(scene)
                if self.is_visible(scene):
                    return scene

    def change_view(self, scene: Scene) -> Scene:
        """Mirror, zoom and shift the scene at random; nothing leaves the picture."""
        while True:
            mirror = self.is_true(0.5)
            zoom = float(self.rng.uniform(0.84, 1.16))
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
                shift = float(self.rng.uniform(low, high))
                moved.append([round(v + shift, 3) for v in at])
            if len(moved) < 2:
                continue
            if mirror or abs(zoom - 1) > 0.07 or abs(shift) > 0.07:
                break
        things = tuple(
            replace(t, x=x, y=y, size=size, flip=t.flip != mirror)
            for t, x, y, size in zip(scene.things, *moved, sizes, strict=True)
        )
        return Scene(things, scene.place, int(self.rng.integers(4)))

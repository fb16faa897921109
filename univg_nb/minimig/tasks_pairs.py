"""Tasks on two images: diff, view_diff, refer_grounding, reasoning, correspondence.

Each is a function of (rng, level, split) that returns a `Draft`.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from univg_nb.data.boxes import Box, to_pixels
from univg_nb.minimig.compose import (
    Draft,
    change_view,
    choose,
    choose_question,
    is_visible,
    jitter,
    move_to_split,
    sample_distractors,
    sample_label,
    sample_labels,
    sample_num_things,
    sample_scene,
)
from univg_nb.minimig.phrases import (
    REASONING,
    add_article,
    describe_scene,
    describe_target,
)
from univg_nb.minimig.pictograms import COLORS, KINDS
from univg_nb.minimig.scenes import CANVAS, Label, Scene, Thing, render


def _replace_target(scene: Scene, target: Label, old: Label | None) -> Scene:
    """Return the scene with `old`, or nothing, in the place of `target`."""
    things: list[Thing] = []
    for thing in scene.things:
        if thing.label != target:
            things.append(thing)
        elif old is not None:
            things.append(replace(thing, kind=old[0], color=old[1]))
    return replace(scene, things=tuple(things))


def _sample_change(
    rng: np.random.Generator, level: str
) -> tuple[Scene, Label, Label | None]:
    """Draw a scene, the label that is new in it, and the one before, if any.

    On harder levels the one before may share the new thing's kind or color.
    """
    while True:
        labels = sample_labels(rng, level, most=4)
        old = None
        if rng.random() < 0.5:
            old = sample_distractors(rng, labels[0], 1, level, taken=labels)[0]
        scene = sample_scene(rng, labels, level)
        if is_visible(_replace_target(scene, labels[0], old), level):
            return scene, labels[0], old


def draw_diff(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Draw two images that differ in one thing: added, removed, or replaced."""
    before = after = None
    while before is None or after is None:
        scene, target, old = _sample_change(rng, level)
        # Bounded: a thing that is barely visible may be so wherever it moves.
        for _ in range(300):
            moved = jitter(rng, scene)
            both = (_replace_target(moved, target, old), moved)
            if all(s.split == split and is_visible(s, level) for s in both):
                before, after = both
                break
    # A thing that was removed is asked for where it still is, in image 1.
    removed = old is None and rng.random() < 0.5
    scenes = (after, before) if removed else (before, after)
    target_image, other = (1, 2) if removed else (2, 1)
    thing = after.find(target)
    chain = (
        f"{describe_scene(scenes[0], 1)} {describe_scene(scenes[1], 2)} "
        f"Image {other} has no {thing.name}. {describe_target(thing, target_image)}"
    )
    question = choose_question(rng, "diff")
    return Draft(scenes, question, chain, thing, target_image)


def draw_view_diff(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Draw a scene and another view of it in which one thing is new or replaced."""
    while True:
        scene, target, old = _sample_change(rng, level)
        before = move_to_split(rng, _replace_target(scene, target, old), split)
        after = move_to_split(rng, change_view(rng, scene), split)
        if is_visible(after, level) and is_visible(before, level):
            break
    thing = after.find(target)
    chain = (
        f"{describe_scene(before, 1)} {describe_scene(after, 2)} "
        f"Image 1 has no {thing.name}. {describe_target(thing, 2)}"
    )
    question = choose_question(rng, "view_diff")
    return Draft((before, after), question, chain, thing, 2)


def draw_refer_grounding(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Draw a thing alone and again, in another size, among others in image 2."""
    target = sample_label(rng)
    places = ("clear", "rain", "night", "sun")
    place = choose(rng, places) if level != "easy" else "clear"
    alone = sample_scene(rng, [target], level, split, place, large={target})
    n = sample_num_things(rng, level)
    labels = [target, *sample_distractors(rng, target, n - 1, level)]
    scene = sample_scene(rng, labels, level, split)
    thing = scene.find(target)
    chain = (
        f"{describe_scene(alone, 1)} {describe_scene(scene, 2)} "
        f"Both images have the {thing.name}. {describe_target(thing, 2)}"
    )
    question = choose_question(rng, "refer_grounding")
    return Draft((alone, scene), question, chain, thing, 2)


@dataclass(frozen=True)
class Need:
    """A need that image 1 shows, by its place or by a thing, and what answers it.

    Attributes:
        answers: kinds that answer it; image 2 shows one of them.
        reason: the chain's sentence on why `{}` (the kind with its article) is right.
        group: which questions ask for it, a key of `REASONING`.
        place: place of image 1.
        kind: kind of the thing in image 1; None if the place shows the need.
        rivals: kinds that a person might accept too; neither image shows them.
    """

    answers: tuple[str, ...]
    reason: str
    group: str
    place: str = "clear"
    kind: str | None = None
    rivals: tuple[str, ...] = ()


NEEDS = (
    Need(("umbrella",), "In the rain {} keeps you dry.", "help", "rain",
         rivals=("house", "tree", "car")),
    Need(("lamp", "candle"), "In the dark {} gives light.", "help", "night",
         rivals=("house",)),
    Need(("boat",), "On the water {} floats.", "help", "water", rivals=("fish",)),
    Need(("tree",), "In the hot sun {} gives shade.", "help", "sun",
         rivals=("umbrella", "house", "car")),
    Need(("fish",), "In the water {} swims.", "live", "water"),
    Need(("key",), "To open a lock you need {}.", "with", kind="lock",
         rivals=("house", "hammer")),
    Need(("lock",), "A key opens {}.", "with", kind="key", rivals=("house", "car")),
    Need(("apple",), "On a tree grows {}.", "with", kind="tree",
         rivals=("house", "chair", "cart")),
    Need(("candle",), "A lamp gives light, and so does {}.", "use", kind="lamp"),
    Need(("lamp",), "A candle gives light, and so does {}.", "use", kind="candle"),
    Need(("car",), "A cart has wheels, and so has {}.", "use", kind="cart",
         rivals=("boat",)),
    Need(("cart",), "A car has wheels, and so has {}.", "use", kind="car",
         rivals=("boat",)),
)  # fmt: skip


def draw_reasoning(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Draw a place or a thing, and in image 2 the one thing that it calls for."""
    need = choose(rng, NEEDS)
    target = sample_label(rng, need.answers)
    excluded = {*need.answers, *need.rivals, need.kind}
    neutral = tuple(kind for kind in KINDS if kind not in excluded)
    context = sample_label(rng, (need.kind,) if need.kind else neutral)
    first = sample_scene(rng, [context], level, split, need.place)
    n = sample_num_things(rng, level)
    others = sample_distractors(rng, target, n - 1, level, neutral, taken=[context])
    scene = sample_scene(rng, [target, *others], level, split)
    thing = scene.find(target)
    chain = (
        f"{describe_scene(first, 1)} {need.reason.format(add_article(thing.kind))} "
        f"{describe_scene(scene, 2)} {describe_target(thing, 2)}"
    )
    question = choose(rng, REASONING[need.group])
    return Draft((first, scene), question, chain, thing, 2)


# By purpose, the (kind, part) pairs of one correspondence question. Left out are parts
# whose purpose is not plain to a person, and wheels, of which a picture has two.
CORRESPONDENCES: dict[str, list[tuple[str, str]]] = {
    "cover": [
        ("umbrella", "roof"), ("tree", "crown"), ("house", "roof"), ("lamp", "shade")],
    "hold": [
        ("umbrella", "handle"), ("key", "ring"), ("cup", "handle"),
        ("hammer", "handle")],
    "store": [("cup", "bowl"), ("boat", "hull"), ("cart", "basket")],
    "push": [("fish", "tail"), ("boat", "sail")],
    "stand": [
        ("tree", "trunk"), ("lamp", "foot"), ("clock", "legs"), ("chair", "legs"),
        ("candle", "foot")],
}  # fmt: skip
# Parts that are marked in image 1 but too small to be asked for in image 2.
TOO_SMALL = [
    ("hammer", "handle"), ("tree", "trunk"), ("clock", "legs"), ("candle", "foot")
]  # fmt: skip


def _outline(image: Image.Image, box: Box, width: int = 6) -> Image.Image:
    """Return a copy of the image with a red box drawn around `box`."""
    image = image.copy()
    x1, y1, x2, y2 = to_pixels(box, CANVAS, CANVAS)
    corners = (x1 - width, y1 - width, x2 + width, y2 + width)
    inside = [min(CANVAS - 1, max(0, round(v))) for v in corners]
    ImageDraw.Draw(image).rectangle(inside, outline=(255, 0, 0), width=width)
    return image


def draw_correspondence(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Draw a part outlined in red, and in image 2 the part of the same purpose."""
    purpose = choose(rng, tuple(CORRESPONDENCES))
    parts = CORRESPONDENCES[purpose]
    kind, part = choose(rng, [pair for pair in parts if pair not in TOO_SMALL])
    source_kind, source_part = choose(rng, [p for p in parts if p[0] != kind])
    # A red outline is hard to see on red and orange.
    colors = [color for color in COLORS if color not in ("red", "orange")]
    source = sample_label(rng, (source_kind,), colors)
    # Kinds without any part of this purpose, paired or not.
    neutral = tuple(
        name
        for name, about in KINDS.items()
        if all(p.purpose != purpose for p in about.parts.values())
    )
    first = sample_scene(rng, [source], level, split, large={source})
    target = sample_label(rng, (kind,))
    n = sample_num_things(rng, level, most=4)
    others = sample_distractors(rng, target, n - 1, level, neutral)
    scene = sample_scene(rng, [target, *others], level, split, large={target})
    thing, outlined = scene.find(target), first.things[0]
    x1, y1, x2, y2 = thing.compute_part_box(part)
    center = ((x1 + x2) / 2000, (y1 + y2) / 2000)
    verb = "are" if part.endswith("s") else "is"
    chain = (
        f"The red box is around the {source_part} of {add_article(outlined.name)}, "
        f"used to {purpose}. {describe_scene(scene, 2)} "
        f"The {part} of {add_article(kind)} {verb} used to {purpose} too. "
        f"{describe_target(thing, 2, part, center)}"
    )
    marked_box = outlined.compute_part_box(source_part)
    images = (_outline(render(first), marked_box), render(scene))
    question = choose_question(rng, "correspondence")
    return Draft((first, scene), question, chain, thing, 2, images, part)

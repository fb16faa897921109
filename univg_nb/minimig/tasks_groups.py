"""Tasks on groups of images, from two views to six frames.

Here: common_object, object_tracking, multi_view, region and group_grounding. Each is a
function of (rng, level, split) that returns a `Draft`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from univg_nb.data.boxes import format_box, iou
from univg_nb.minimig.compose import (
    Draft,
    change_view,
    choose,
    choose_question,
    compute_occlusion,
    is_visible,
    move_to_split,
    sample_distractors,
    sample_label,
    sample_labels,
    sample_num_things,
    sample_scene,
)
from univg_nb.minimig.phrases import (
    add_article,
    describe_position,
    describe_scene,
    describe_target,
)
from univg_nb.minimig.pictograms import COLORS, KINDS, UnitBox
from univg_nb.minimig.scenes import (
    CANVAS,
    Label,
    Scene,
    Thing,
    compute_intersection,
    place_thing,
    render,
)

FRAMES = 6


def draw_common_object(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Draw three or four images with one thing in common.

    On harder levels the thing may have another color in each, or every image may hold a
    second thing of its kind.
    """
    images = 4 if level != "easy" and rng.random() < 0.4 else 3
    n = sample_num_things(rng, level, most=2 if images == 4 else 3)
    kind, color = sample_label(rng)
    by_kind = level != "easy" and rng.random() < 0.4
    colors = [color] * images
    if by_kind:
        colors = [str(c) for c in rng.permutation(list(COLORS))[:images]]
    second_of_kind = level != "easy" and not by_kind
    scenes: list[Scene] = []
    used: set[Label] = {(kind, c) for c in colors}
    kinds_used = {kind}
    for color in colors:
        kinds = tuple(k for k in KINDS if k not in kinds_used)
        if second_of_kind and rng.random() < 0.5:
            kinds = (*kinds, kind)
        label = (kind, color)
        others = sample_distractors(rng, label, n - 1, level, kinds, taken=used)
        used.update(others)
        kinds_used.update(k for k, _ in others)
        scenes.append(sample_scene(rng, [label, *others], level, split))
    k = int(rng.integers(images)) + 1
    thing = scenes[k - 1].find((kind, colors[k - 1]))
    shared = add_article(kind) if by_kind else f"the {thing.name}"
    chain = (
        f"{describe_scene(scenes[0], 1)} {describe_scene(scenes[1], 2)} "
        f"All images share {shared}. {describe_target(thing, k)}"
    )
    question = choose_question(rng, "common_object", k=k)
    return Draft(scenes, question, chain, thing, k)


def _sample_frames(
    rng: np.random.Generator, level: str, split: str
) -> tuple[list[Scene], Label]:
    """Draw frames of things that each move along a line, and the one to track."""
    while True:
        labels = sample_labels(rng, level, most=4)
        start = sample_scene(rng, labels, level)
        ends: list[Thing] = []
        for thing in start.things:
            ends.append(place_thing(rng, thing, ends, 0.2))
        first = start.find(labels[0])
        last = ends[start.things.index(first)]
        if abs(first.x - last.x) + abs(first.y - last.y) < 0.3:
            continue
        frames = []
        for step in np.linspace(0, 1, FRAMES):
            things = tuple(
                replace(
                    s,
                    x=round(s.x + float(step) * (e.x - s.x), 3),
                    y=round(s.y + float(step) * (e.y - s.y), 3),
                )
                for s, e in zip(start.things, ends, strict=True)
            )
            frames.append(move_to_split(rng, replace(start, things=things), split))
        if is_visible(frames[0], level):
            return frames, labels[0]


def _has_clear_box(scene: Scene, label: Label) -> bool:
    """Return whether the thing's box cannot be taken for another's."""
    thing = scene.find(label)
    return all(iou(thing.box, t.box) < 0.25 for t in scene.things if t is not thing)


def _make_tracking_draft(
    rng: np.random.Generator, task: str, scenes: Sequence[Scene], label: Label, k: int
) -> Draft:
    """Give the box of a thing in image 1 as text; ask for the thing in image `k`."""
    boxed, thing = scenes[0].find(label), scenes[k - 1].find(label)
    chain = (
        f"{describe_scene(scenes[0], 1)} The box {describe_position(boxed.x, boxed.y)} "
        f"is around the {thing.name}. {describe_target(thing, k)}"
    )
    question = choose_question(rng, task, k=k, box=format_box(boxed.box))
    return Draft(scenes, question, chain, thing, k)


def draw_object_tracking(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Draw six frames; frame k is asked for the thing that is boxed in frame 1."""
    while True:
        frames, label = _sample_frames(rng, level, split)
        k = int(rng.integers(2, FRAMES + 1))
        index = frames[k - 1].things.index(frames[k - 1].find(label))
        # Things pass behind each other, but the target stays visible.
        visible = compute_occlusion(frames[k - 1], index) <= 0.35
        if visible and _has_clear_box(frames[0], label):
            return _make_tracking_draft(rng, "object_tracking", frames, label, k)


def draw_multi_view(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Draw two to four views of a scene; view k is asked for the thing boxed in 1."""
    views = {"easy": 2, "medium": 3, "hard": 4}[level]
    while True:
        labels = sample_labels(rng, level)
        scene = sample_scene(rng, labels, level)
        scenes = [
            move_to_split(rng, change_view(rng, scene) if view else scene, split)
            for view in range(views)
        ]
        visible = all(is_visible(s, level) for s in scenes)
        if visible and _has_clear_box(scenes[0], labels[0]):
            k = int(rng.integers(2, views + 1))
            return _make_tracking_draft(rng, "multi_view", scenes, labels[0], k)


def _compute_crop(thing: Thing) -> UnitBox:
    """Return a square around the thing inside the picture, in shares of its side."""
    x1, y1, x2, y2 = (v / 1000 for v in thing.box)
    side = 1.2 * max(x2 - x1, y2 - y1)
    left = min(1 - side, max(0.0, (x1 + x2 - side) / 2))
    top = min(1 - side, max(0.0, (y1 + y2 - side) / 2))
    return (left, top, left + side, top + side)


def _has_clear_crop(scene: Scene, thing: Thing) -> bool:
    """Return whether a crop around the thing shows little of any other."""
    crop = _compute_crop(thing)
    max_area = 0.2 * ((crop[2] - crop[0]) * (crop[3] - crop[1]))
    boxes = ([v / 1000 for v in t.box] for t in scene.things if t is not thing)
    return crop[0] >= 0 and all(
        compute_intersection(crop, box) <= max_area for box in boxes
    )


def draw_region(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Draw an image and one or two crops of it; image 1 is asked for crop k's thing."""
    crops = 1 if level == "easy" else 2
    while True:
        labels = sample_labels(rng, level)
        scene = sample_scene(rng, labels, level, split)
        cropped = [scene.things[int(i)] for i in rng.permutation(len(labels))][:crops]
        if all(_has_clear_crop(scene, thing) for thing in cropped):
            break
    images = [render(scene)]
    for thing in cropped:
        x1, y1, x2, y2 = (v * CANVAS for v in _compute_crop(thing))
        size, box = (CANVAS, CANVAS), (x1, y1, x2, y2)
        images.append(images[0].resize(size, Image.Resampling.BICUBIC, box=box))
    k = int(rng.integers(crops)) + 2
    thing = cropped[k - 2]
    chain = (
        f"{describe_scene(scene, 1)} {describe_scene(Scene((thing,)), k)} "
        f"{describe_target(thing, 1)}"
    )
    question = choose_question(rng, "region", k=k)
    return Draft([scene], question, chain, thing, 1, images)


def draw_group_grounding(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Draw three or four images and a phrase that fits one thing in one of them."""
    target = sample_label(rng)
    form = choose(rng, ("name", "name", "kind", "color"))
    # The chain lists what the images show: not all of them can hold many things.
    many = level != "easy" and form == "name" and rng.random() < 0.4
    images = 4 if many else 3
    n = sample_num_things(rng, level, most=3 if images == 3 and form == "name" else 2)
    k = int(rng.integers(images)) + 1
    # Nothing else may fit the phrase, in any of the images.
    kinds = tuple(x for x in KINDS if form != "kind" or x != target[0])
    colors = tuple(x for x in COLORS if form != "color" or x != target[1])
    scenes = []
    for image in range(1, images + 1):
        present = [target] if image == k else []
        labels = sample_distractors(
            rng, target, n - len(present), level, kinds, colors=colors
        )
        scenes.append(sample_scene(rng, [*present, *labels], level, split))
    thing = scenes[k - 1].find(target)
    noun = {"name": thing.name, "kind": thing.kind, "color": f"{thing.color} thing"}[
        form
    ]
    chain = " ".join(describe_scene(s, i) for i, s in enumerate(scenes[:k], 1))
    if form != "name":
        chain += f" Image {k} has {add_article(noun)}."
    chain += f" {describe_target(thing, k)}"
    question = choose_question(rng, "group_grounding", phrase=f"the {noun}")
    return Draft(scenes, question, chain, thing, k)

"""Tasks on groups of images, from two views to six frames.

Here: common_object, object_tracking, multi_view, region and group_grounding. Each is a
function of a `Sampler` that returns a `Draft`.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from univg_nb.data.boxes import compute_intersection, format_box, iou
from univg_nb.minimig import phrases
from univg_nb.minimig.compose import Draft, Sampler
from univg_nb.minimig.pictograms import COLORS, KINDS, UnitBox
from univg_nb.minimig.scenes import CANVAS, Label, Scene, Thing, place_thing, render

FRAMES = 6


def draw_common_object(sampler: Sampler) -> Draft:
    """Draw three or four images with one thing in common.

    On harder levels the thing may have another color in each, or every image may hold a
    second thing of its kind.
    """
    images = 4 if sampler.level != "easy" and sampler.is_true(0.4) else 3
    n = sampler.sample_num_things(most=2 if images == 4 else 3)
    kind, color = sampler.sample_label()
    by_kind = sampler.level != "easy" and sampler.is_true(0.4)
    colors = [color] * images
    if by_kind:
        colors = [str(c) for c in sampler.rng.permutation(list(COLORS))[:images]]
    second_of_kind = sampler.level != "easy" and not by_kind
    scenes: list[Scene] = []
    used: set[Label] = {(kind, c) for c in colors}
    kinds_used = {kind}
    for color in colors:
        kinds = tuple(k for k in KINDS if k not in kinds_used)
        if second_of_kind and sampler.is_true(0.5):
            kinds = (*kinds, kind)
        label = (kind, color)
        others = sampler.sample_distractors(label, n - 1, kinds, taken=used)
        used.update(others)
        kinds_used.update(k for k, _ in others)
        scenes.append(sampler.sample_scene([label, *others]))
    k = int(sampler.rng.integers(images)) + 1
    thing = scenes[k - 1].find((kind, colors[k - 1]))
    shared = phrases.add_article(kind) if by_kind else f"the {thing.name}"
    steps = f"{phrases.describe_scenes(scenes[:2])} All images share {shared}."
    question = sampler.choose_question("common_object", k=k)
    return Draft(scenes, question, steps, thing, k)


def _has_clear_box(scene: Scene, label: Label) -> bool:
    """Return whether the thing's box cannot be taken for another's."""
    thing = scene.find(label)
    return all(iou(thing.box, t.box) < 0.25 for t in scene.things if t is not thing)


def _make_tracking_draft(
    sampler: Sampler, task: str, scenes: Sequence[Scene], label: Label, k: int
) -> Draft:
    """Give the box of a thing in image 1 as text; ask for the thing in image `k`."""
    boxed, thing = scenes[0].find(label), scenes[k - 1].find(label)
    position = phrases.describe_position(boxed.x, boxed.y)
    steps = phrases.describe_scene(scenes[0], 1)
    steps += f" The box {position} is around the {thing.name}."
    question = sampler.choose_question(task, k=k, box=format_box(boxed.box))
    return Draft(scenes, question, steps, thing, k)


def draw_object_tracking(sampler: Sampler) -> Draft:
    """Draw six frames of things that each move along a line.

    Frame k is asked for the thing that is boxed in frame 1.
    """
    while True:
        labels = sampler.sample_labels(most=4)
        start = sampler.sample_scene(labels, any_split=True)
        ends: list[Thing] = []
        for thing in start.things:
            ends.append(place_thing(sampler.rng, thing, ends, 0.2))
        first = start.find(labels[0])
        last = ends[start.things.index(first)]
        if abs(first.x - last.x) + abs(first.y - last.y) < 0.3:
            continue
        frames = []
        for share in np.linspace(0, 1, FRAMES).tolist():
            points = [
                (s.x + share * (e.x - s.x), s.y + share * (e.y - s.y))
                for s, e in zip(start.things, ends, strict=True)
            ]
            frames.append(sampler.move_to_split(start.move(points)))
        if not sampler.is_visible(frames[0]):
            continue
        k = int(sampler.rng.integers(2, FRAMES + 1))
        # Things pass behind each other, but the target stays visible.
        asked = frames[k - 1]
        visible = asked.compute_occlusion(asked.find(labels[0])) <= 0.35
        if visible and _has_clear_box(frames[0], labels[0]):
            break
    return _make_tracking_draft(sampler, "object_tracking", frames, labels[0], k)


def draw_multi_view(sampler: Sampler) -> Draft:
    """Draw two to four views of a scene; view k is asked for the thing boxed in 1."""
    views = {"easy": 2, "medium": 3, "hard": 4}[sampler.level]
    while True:
        labels = sampler.sample_labels()
        scene = sampler.sample_scene(labels, any_split=True)
        scenes = [
            sampler.move_to_split(sampler.change_view(scene) if view else scene)
            for view in range(views)
        ]
        visible = all(sampler.is_visible(s) for s in scenes)
        if visible and _has_clear_box(scenes[0], labels[0]):
            k = int(sampler.rng.integers(2, views + 1))
            return _make_tracking_draft(sampler, "multi_view", scenes, labels[0], k)


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


def draw_region(sampler: Sampler) -> Draft:
    """Draw an image and one or two crops of it; image 1 is asked for crop k's thing."""
    crops = 1 if sampler.level == "easy" else 2
    while True:
        labels = sampler.sample_labels()
        scene = sampler.sample_scene(labels)
        order = sampler.rng.permutation(len(labels))[:crops]
        cropped = [scene.things[int(i)] for i in order]
        if all(_has_clear_crop(scene, thing) for thing in cropped):
            break
    images = [render(scene)]
    for thing in cropped:
        x1, y1, x2, y2 = (v * CANVAS for v in _compute_crop(thing))
        size, box = (CANVAS, CANVAS), (x1, y1, x2, y2)
        images.append(images[0].resize(size, Image.Resampling.BICUBIC, box=box))
    k = int(sampler.rng.integers(crops)) + 2
    thing = cropped[k - 2]
    crop = phrases.describe_scene(Scene((thing,)), k)
    steps = f"{phrases.describe_scene(scene, 1)} {crop}"
    question = sampler.choose_question("region", k=k)
    return Draft([scene], question, steps, thing, 1, images)


def draw_group_grounding(sampler: Sampler) -> Draft:
    """Draw three or four images and a phrase that fits one thing in one of them."""
    target = sampler.sample_label()
    form = sampler.choose(("name", "name", "kind", "color"))
    # The chain lists what the images show: not all of them can hold many things.
    many = sampler.level != "easy" and form == "name" and sampler.is_true(0.4)
    images = 4 if many else 3
    n = sampler.sample_num_things(most=3 if images == 3 and form == "name" else 2)
    k = int(sampler.rng.integers(images)) + 1
    # Nothing else may fit the phrase, in any of the images.
    kinds = tuple(x for x in KINDS if form != "kind" or x != target[0])
    colors = tuple(x for x in COLORS if form != "color" or x != target[1])
    scenes = []
    for image in range(1, images + 1):
        present = [target] if image == k else []
        num_others = n - len(present)
        others = sampler.sample_distractors(target, num_others, kinds, colors)
        scenes.append(sampler.sample_scene([*present, *others]))
    thing = scenes[k - 1].find(target)
    nouns = {"name": thing.name, "kind": thing.kind, "color": f"{thing.color} thing"}
    noun = nouns[form]
    steps = f"Which image shows {phrases.add_article(noun)}?"
    for number, scene in enumerate(scenes[: k - 1], 1):
        steps += f" {phrases.describe_scene(scene, number)[:-1]}, no {noun}."
    steps += f" {phrases.describe_scene(scenes[k - 1], k)}"
    if form != "name":
        steps += f" It has {phrases.add_article(noun)}."
    question = sampler.choose_question("group_grounding", phrase=f"the {nouns[form]}")
    return Draft(scenes, question, steps, thing, k)

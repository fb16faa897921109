"""Tasks on groups of images: common_object, object_tracking, multi_view, region,
group_grounding. Each takes (rng, level, split) and returns a `Draft`."""

from dataclasses import replace

import numpy as np
from PIL import Image

from univg_nb.data.boxes import format_box, iou
from univg_nb.minimig import words
from univg_nb.minimig.compose import (
    Draft,
    Name,
    another_view,
    any_name,
    compose,
    count,
    distractors,
    hidden_share,
    lay,
    pick,
    settle,
    the_thing,
    well_visible,
)
from univg_nb.minimig.phrases import ORDINALS, QUESTIONS
from univg_nb.minimig.pictograms import COLOURS, KINDS
from univg_nb.minimig.scenes import CANVAS, Scene, Thing, place_thing, render
from univg_nb.minimig.tasks_pairs import conclusion

FRAMES = 6


def _question(rng: np.random.Generator, task: str, **fields) -> str:
    """One wording, filled; "image 2" is far more frequent than "the second image"."""
    texts = QUESTIONS[task]
    text = pick(rng, texts)
    if "{ordinal}" in text and rng.random() < 0.5:
        text = texts[0]
    if "k" in fields:
        fields["ordinal"] = ORDINALS[fields["k"] - 1]
    return text.format(**fields)


def common_object(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Three or four pictures share one thing; harder: one kind in several colours."""
    images = 4 if level != "easy" and rng.random() < 0.4 else 3
    n = count(rng, level, most=2 if images == 4 else 3)
    target = any_name(rng)
    by_kind = level != "easy" and rng.random() < 0.4
    colours = [target[1]] * images
    if by_kind:
        colours = [str(c) for c in rng.permutation(list(COLOURS))[:images]]
    others = tuple(k for k in KINDS if k != target[0])
    shared_kind = level != "easy" and not by_kind  # a second one in another colour
    scenes: list[Scene] = []
    used: set[Name] = {(target[0], c) for c in colours}
    kinds_used: set[str] = set()
    for colour in colours:
        name = (target[0], colour)
        kinds = tuple(k for k in others if k not in kinds_used)
        if shared_kind and rng.random() < 0.5:
            kinds = (*kinds, target[0])
        beside = distractors(rng, name, n - 1, level, kinds, taken=used)
        used.update(beside)
        kinds_used.update(k for k, _ in beside if k != target[0])
        scenes.append(compose(rng, [name, *beside], level, split))
    k = int(rng.integers(images)) + 1
    thing = the_thing(scenes[k - 1], (target[0], colours[k - 1]))
    shared = words.article(target[0]) if by_kind else f"the {thing.name}"
    chain = (
        f"{words.description(scenes[0], 1)} {words.description(scenes[1], 2)} "
        f"All images share {shared}. {conclusion(thing, k)}"
    )
    pictures = tuple(render(s) for s in scenes)
    question = _question(rng, "common_object", k=k)
    return Draft(tuple(scenes), pictures, question, thing.box, chain, thing, k)


def _moving(
    rng: np.random.Generator, level: str, split: str
) -> tuple[list[Scene], Name]:
    """Frames of things that each move along a line, and the thing to follow."""
    while True:
        target = any_name(rng)
        names = [target, *distractors(rng, target, count(rng, level, 4) - 1, level)]
        start = lay(rng, names, level)
        ends: list[Thing] = []
        for thing in start.things:
            ends.append(place_thing(rng, thing, ends, 0.2))
        a, b = the_thing(start, target), ends[_index(start, target)]
        if abs(a.x - b.x) + abs(a.y - b.y) < 0.3:
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
            frames.append(settle(rng, replace(start, things=things), split))
        if well_visible(frames[0], level):
            return frames, target


def _index(scene: Scene, name: Name) -> int:
    """Where the thing of this name stands in the drawing order."""
    return scene.things.index(the_thing(scene, name))


def _boxed_well(scene: Scene, name: Name) -> bool:
    """Whether the thing's box cannot be taken for another's."""
    thing = the_thing(scene, name)
    return all(iou(thing.box, t.box) < 0.25 for t in scene.things if t is not thing)


def _follow(
    rng: np.random.Generator, task: str, scenes: list[Scene], name: Name, k: int
) -> Draft:
    """A question with a box of image 1 in words; the same thing in image ``k``."""
    boxed, thing = the_thing(scenes[0], name), the_thing(scenes[k - 1], name)
    chain = (
        f"{words.description(scenes[0], 1)} The box {words.where(boxed)} is around "
        f"the {thing.name}. {conclusion(thing, k)}"
    )
    question = _question(rng, task, k=k, box=format_box(boxed.box))
    pictures = tuple(render(s) for s in scenes)
    return Draft(tuple(scenes), pictures, question, thing.box, chain, thing, k)


def object_tracking(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Six frames of moving things; the one boxed in frame 1 is asked in frame k."""
    while True:
        frames, name = _moving(rng, level, split)
        k = int(rng.integers(2, FRAMES + 1))
        index = _index(frames[k - 1], name)
        # Things pass behind each other, but the one asked for stays visible.
        if _boxed_well(frames[0], name) and hidden_share(frames[k - 1], index) <= 0.35:
            return _follow(rng, "object_tracking", frames, name, k)


def multi_view(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Two to four views of a scene; the thing boxed in view 1 is asked in view k."""
    views = {"easy": 2, "medium": 3, "hard": 4}[level]
    while True:
        target = any_name(rng)
        names = [target, *distractors(rng, target, count(rng, level) - 1, level)]
        scene = lay(rng, names, level)
        scenes = [settle(rng, scene, split)]
        scenes += [
            settle(rng, another_view(rng, scene), split) for _ in range(views - 1)
        ]
        clear = all(well_visible(s, level) for s in scenes)
        if clear and _boxed_well(scenes[0], target):
            k = int(rng.integers(2, views + 1))
            return _follow(rng, "multi_view", scenes, target, k)


def _cut(scene: Scene, thing: Thing) -> tuple[float, float, float, float]:
    """A square around the thing inside the picture, in shares: x1, y1, x2, y2."""
    x1, y1, x2, y2 = (v / 1000 for v in thing.box)
    side = 1.2 * max(x2 - x1, y2 - y1)
    left = min(1 - side, max(0.0, (x1 + x2 - side) / 2))
    top = min(1 - side, max(0.0, (y1 + y2 - side) / 2))
    return (left, top, left + side, top + side)


def _crops_well(scene: Scene, thing: Thing) -> bool:
    """Whether a cut around the thing shows little of any other."""
    x1, y1, x2, y2 = cut = _cut(scene, thing)
    area = (x2 - x1) * (y2 - y1)
    for other in scene.things:
        if other is thing:
            continue
        a1, b1, a2, b2 = (v / 1000 for v in other.box)
        width, height = min(x2, a2) - max(x1, a1), min(y2, b2) - max(y1, b1)
        if max(0.0, width) * max(0.0, height) > 0.2 * area:
            return False
    return cut[0] >= 0


def region(rng: np.random.Generator, level: str, split: str) -> Draft:
    """A source image and one or two crops of things in it; find crop k's thing."""
    crops = 1 if level == "easy" else 2
    while True:
        target = any_name(rng)
        names = [target, *distractors(rng, target, count(rng, level) - 1, level)]
        scene = compose(rng, names, level, split)
        order = [scene.things[int(i)] for i in rng.permutation(len(names))][:crops]
        if all(_crops_well(scene, t) for t in order):
            break
    source = render(scene)
    pictures = [source]
    for thing in order:
        box = tuple(v * CANVAS for v in _cut(scene, thing))
        pictures.append(
            source.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC, box=box)
        )
    k = int(rng.integers(crops)) + 2
    thing = order[k - 2]
    shown = Scene((thing,))
    chain = (
        f"{words.description(scene, 1)} {words.description(shown, k)} "
        f"{conclusion(thing, 1)}"
    )
    question = _question(rng, "region", k=k)
    return Draft((scene,), tuple(pictures), question, thing.box, chain, thing, 1)


def group_grounding(rng: np.random.Generator, level: str, split: str) -> Draft:
    """A phrase that fits one thing in one of three or four pictures."""
    target = any_name(rng)
    form = pick(rng, ("name", "name", "kind", "colour"))
    # The chain lists what the pictures show: not all may be many at once.
    many = level != "easy" and form == "name" and rng.random() < 0.4
    images = 4 if many else 3
    n = count(rng, level, most=3 if images == 3 and form == "name" else 2)
    k = int(rng.integers(images)) + 1
    # Nothing else may fit the phrase, in any of the pictures.
    kinds = tuple(x for x in KINDS if form != "kind" or x != target[0])
    colours = tuple(x for x in COLOURS if form != "colour" or x != target[1])
    scenes = []
    for image in range(1, images + 1):
        names = distractors(
            rng, target, n - (image == k), level, kinds, (), colours
        )  # fmt: skip
        names = [target, *names] if image == k else names
        scenes.append(compose(rng, names, level, split))
    thing = the_thing(scenes[k - 1], target)
    noun = {
        "name": thing.name, "kind": thing.kind, "colour": f"{thing.colour} thing"
    }[form]  # fmt: skip
    seen = " ".join(words.description(s, i) for i, s in enumerate(scenes[:k], 1))
    if form != "name":
        seen += f" Image {k} has {words.article(noun)}."
    chain = f"{seen} {conclusion(thing, k)}"
    question = _question(rng, "group_grounding", phrase=f"the {noun}")
    pictures = tuple(render(s) for s in scenes)
    return Draft(tuple(scenes), pictures, question, thing.box, chain, thing, k)

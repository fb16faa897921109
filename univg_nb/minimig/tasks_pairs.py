"""Tasks on a pair of images: diff, view_diff, refer_grounding, reasoning,
correspondence. Each takes (rng, level, split) and returns a `Draft`."""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from univg_nb.data.boxes import Box, to_pixels
from univg_nb.minimig import words
from univg_nb.minimig.compose import (
    Draft,
    Name,
    another_view,
    any_name,
    compose,
    count,
    distractors,
    lay,
    nudged,
    pick,
    settle,
    the_thing,
    well_visible,
)
from univg_nb.minimig.needs import NEEDS
from univg_nb.minimig.phrases import QUESTIONS, REASONING
from univg_nb.minimig.pictograms import COLOURS, KINDS
from univg_nb.minimig.scenes import CANVAS, Scene, Thing, render

OUTLINE = (255, 0, 0)  # "marked with a red box"


def conclusion(
    thing: Thing, image: int, part: str = "", at: Thing | None = None
) -> str:
    """The chain's last sentence: what the target is, in which image, roughly where."""
    name = f"{part} of the {thing.name}" if part else thing.name
    return f"So the target is the {name} in image {image}, {words.where(at or thing)}."


def _before(scene: Scene, target: Name, old: Name | None) -> Scene:
    """The scene with ``old`` in the place of ``target``, or with nothing there."""
    things = []
    for t in scene.things:
        if (t.kind, t.colour) != target:
            things.append(t)
        elif old is not None:
            things.append(replace(t, kind=old[0], colour=old[1]))
    return replace(scene, things=tuple(things))


def _a_change(rng: np.random.Generator, level: str) -> tuple[Scene, Name, Name | None]:
    """A scene, the thing in it that is new, and what stood there before, if anything.

    On harder levels what stood there may share the new thing's kind or colour.
    """
    while True:
        target = any_name(rng)
        names = [target, *distractors(rng, target, count(rng, level, 4) - 1, level)]
        old = None
        if rng.random() < 0.5:
            old = distractors(rng, target, 1, level, taken=names)[0]
        scene = lay(rng, names, level)
        if well_visible(_before(scene, target, old), level):
            return scene, target, old


def _static_pair(
    rng: np.random.Generator, level: str, split: str
) -> tuple[Scene, Scene, Name, Name | None]:
    """A scene, the same before the change, and the names that changed."""
    while True:
        scene, target, old = _a_change(rng, level)
        # Bounded: a thing that only just shows may show too little wherever it moves.
        for _ in range(300):
            after = nudged(rng, scene)
            before = _before(after, target, old)
            both = (after, before)
            if all(s.split() == split and well_visible(s, level) for s in both):
                return after, before, target, old


def diff(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Two pictures that differ in one thing: come, gone, or replaced by another."""
    after, before, target, old = _static_pair(rng, level, split)
    # A thing that is gone is looked for where it still stands, in image 1.
    gone = old is None and rng.random() < 0.5
    scenes = (after, before) if gone else (before, after)
    asked, other = (1, 2) if gone else (2, 1)
    thing = the_thing(after, target)
    chain = (
        f"{words.description(scenes[0], 1)} {words.description(scenes[1], 2)} "
        f"Image {other} has no {thing.name}. {conclusion(thing, asked)}"
    )
    return _draft(rng, "diff", scenes, thing, asked, chain)


def _draft(
    rng: np.random.Generator,
    task: str,
    scenes: tuple[Scene, ...],
    thing: Thing,
    asked: int,
    chain: str,
) -> Draft:
    question = pick(rng, QUESTIONS[task])
    images = tuple(render(s) for s in scenes)
    return Draft(scenes, images, question, thing.box, chain, thing, asked)


def view_diff(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Image 2 is another view of image 1 with one thing more, or one replaced."""
    while True:
        scene, target, old = _a_change(rng, level)
        before = settle(rng, _before(scene, target, old), split)
        after = settle(rng, another_view(rng, scene), split)
        if well_visible(after, level) and well_visible(before, level):
            break
    thing = the_thing(after, target)
    chain = (
        f"{words.description(before, 1)} {words.description(after, 2)} "
        f"Image 1 has no {thing.name}. {conclusion(thing, 2)}"
    )
    return _draft(rng, "view_diff", (before, after), thing, 2, chain)


def refer_grounding(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Image 1 shows one thing; image 2 has it again, in another size, among others."""
    target = any_name(rng)
    place = pick(rng, ("clear", "rain", "night", "sun")) if level != "easy" else "clear"
    alone = compose(rng, [target], level, split, place, large={target})
    names = [target, *distractors(rng, target, count(rng, level) - 1, level)]
    scene = compose(rng, names, level, split)
    thing = the_thing(scene, target)
    chain = (
        f"{words.description(alone, 1)} {words.description(scene, 2)} "
        f"Both images have the {thing.name}. {conclusion(thing, 2)}"
    )
    return _draft(rng, "refer_grounding", (alone, scene), thing, 2, chain)


def reasoning(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Image 1 shows a place or a thing, image 2 has one thing that serves it."""
    need = NEEDS[pick(rng, tuple(NEEDS))]
    target = any_name(rng, need.answers)
    barred = {*need.answers, *need.rivals, need.kind}
    neutral = tuple(k for k in KINDS if k not in barred)
    context = any_name(rng, (need.kind,) if need.kind else neutral)
    first = compose(rng, [context], level, split, need.place)
    others = distractors(
        rng, target, count(rng, level) - 1, level, neutral, taken=[context]
    )
    scene = compose(rng, [target, *others], level, split)
    thing = the_thing(scene, target)
    assert sum(t.kind in need.answers for t in scene.things) == 1
    chain = (
        f"{words.description(first, 1)} "
        f"{need.reason.format(words.article(thing.kind))} "
        f"{words.description(scene, 2)} {conclusion(thing, 2)}"
    )
    images = (render(first), render(scene))
    question = pick(rng, REASONING[need.group])
    return Draft((first, scene), images, question, thing.box, chain, thing, 2)


# Parts that are not paired: their purpose is less plain to a person than to the
# table, or (wheels) a picture has two of them and the table one.
UNPAIRED = {
    ("fish", "body"),
    ("apple", "body"),
    ("apple", "leaf"),
    ("lock", "body"),
    ("hammer", "head"),
    ("car", "wheel"),
    ("cart", "wheel"),
    ("clock", "face"),
    ("candle", "flame"),
}
LEAST_PART = 0.27  # a target's smaller side as a share of the thing's side


def paired_parts() -> dict[str, tuple[list[Name], list[Name]]]:
    """By purpose, the (kind, part) that may be marked and those that may be asked for.

    Only purposes with two kinds or more, at least one of them large enough to ask for.
    """
    found: dict[str, tuple[list[Name], list[Name]]] = {}
    for kind, about in KINDS.items():
        for name, part in about.parts.items():
            if (kind, name) in UNPAIRED:
                continue
            marked, asked = found.setdefault(part.purpose, ([], []))
            marked.append((kind, name))
            x1, y1, x2, y2 = part.box
            if min(x2 - x1, y2 - y1) >= LEAST_PART:
                asked.append((kind, name))
    return {
        purpose: both
        for purpose, both in found.items()
        if len({kind for kind, _ in both[0]}) > 1 and both[1]
    }


PAIRED = paired_parts()


def _has_part_to(purpose: str, kind: str) -> bool:
    """Whether things of this kind have a part for the purpose, paired or not."""
    return any(part.purpose == purpose for part in KINDS[kind].parts.values())


def correspondence(rng: np.random.Generator, level: str, split: str) -> Draft:
    """A part outlined in red in image 1; the part of equal purpose in image 2."""
    purpose = pick(rng, tuple(PAIRED))
    marked, asked = PAIRED[purpose]
    kind, part = pick(rng, asked)
    source_kind, source_part = pick(rng, [m for m in marked if m[0] != kind])
    # A red outline is hard to see on red and orange.
    plain = [c for c in COLOURS if c not in ("red", "orange")]
    source = any_name(rng, (source_kind,), plain)
    same = {k for k in KINDS if _has_part_to(purpose, k)}
    neutral = tuple(k for k in KINDS if k not in same)
    first = compose(rng, [source], level, split, large={source})
    target = any_name(rng, (kind,))
    others = distractors(rng, target, count(rng, level, 4) - 1, level, neutral)
    scene = compose(rng, [target, *others], level, split, large={target})
    thing, outlined = the_thing(scene, target), first.things[0]
    answer = thing.part(part)
    assert sum(t.kind in same for t in scene.things) == 1
    x1, y1, x2, y2 = answer
    verb = "are" if part.endswith("s") else "is"
    at = replace(thing, x=(x1 + x2) / 2000, y=(y1 + y2) / 2000)
    chain = (
        f"The red box is around the {source_part} of "
        f"{words.article(outlined.name)}, used to {purpose}. "
        f"{words.description(scene, 2)} "
        f"The {part} of {words.article(kind)} {verb} used to {purpose} too. "
        f"{conclusion(thing, 2, part, at)}"
    )
    images = (outline(render(first), outlined.part(source_part)), render(scene))
    question = pick(rng, QUESTIONS["correspondence"])
    return Draft((first, scene), images, question, answer, chain, thing, 2)


def outline(image: Image.Image, box: Box, width: int = 6) -> Image.Image:
    """A copy of the picture with a red box drawn around ``box``."""
    image = image.copy()
    x1, y1, x2, y2 = to_pixels(box, CANVAS, CANVAS)
    corners = (x1 - width, y1 - width, x2 + width, y2 + width)
    inside = tuple(min(CANVAS - 1, max(0, round(v))) for v in corners)
    ImageDraw.Draw(image).rectangle(inside, outline=OUTLINE, width=width)
    return image

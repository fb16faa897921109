"""Tasks on two images: diff, view_diff, refer_grounding, reasoning, correspondence.

Each is a function of a `Sampler` that returns a `Draft`. What can be asked is listed in
`assets/minimig/pairs.yaml`.
"""

from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from univg_nb import io
from univg_nb.data.boxes import Box, to_pixels
from univg_nb.minimig import phrases
from univg_nb.minimig.compose import Draft, Sampler
from univg_nb.minimig.pictograms import COLORS, KINDS
from univg_nb.minimig.scenes import CANVAS, Label, Scene, render


def _replace_target(scene: Scene, target: Label, old: Label | None) -> Scene:
    """Return the scene with `old`, or nothing, in the place of `target`."""
    if old is None:
        things = [t for t in scene.things if t.label != target]
    else:
        thing = scene.find(target)
        new = replace(thing, kind=old[0], color=old[1])
        things = [new if t is thing else t for t in scene.things]
    return replace(scene, things=tuple(things))


def _sample_change(sampler: Sampler) -> tuple[Scene, Label, Label | None]:
    """Draw a scene, the label that is new in it, and the one before, if any.

    On harder levels the one before may share the new thing's kind or color.
    """
    while True:
        labels = sampler.sample_labels(most=4)
        old = None
        if sampler.is_true(0.5):
            old = sampler.sample_distractors(labels[0], 1, taken=labels)[0]
        scene = sampler.sample_scene(labels, any_split=True)
        if sampler.is_visible(_replace_target(scene, labels[0], old)):
            return scene, labels[0], old


def draw_diff(sampler: Sampler) -> Draft:
    """Draw two images that differ in one thing: added, removed, or replaced."""
    before = after = None
    while before is None or after is None:
        scene, target, old = _sample_change(sampler)
        # Bounded: a thing that is barely visible may be so wherever it moves.
        for _ in range(300):
            moved = sampler.jitter(scene)
            both = (_replace_target(moved, target, old), moved)
            if all(s.split == sampler.split and sampler.is_visible(s) for s in both):
                before, after = both
                break
    # A thing that was removed is asked for where it still is, in image 1.
    removed = old is None and sampler.is_true(0.5)
    scenes = (after, before) if removed else (before, after)
    target_image, other = (1, 2) if removed else (2, 1)
    thing = after.find(target)
    steps = f"{phrases.describe_scenes(scenes)} Image {other} has no {thing.name}."
    question = sampler.choose_question("diff")
    return Draft(scenes, question, steps, thing, target_image)


def draw_view_diff(sampler: Sampler) -> Draft:
    """Draw a scene and another view of it in which one thing is new or replaced."""
    while True:
        scene, target, old = _sample_change(sampler)
        before = sampler.move_to_split(_replace_target(scene, target, old))
        after = sampler.move_to_split(sampler.change_view(scene))
        if sampler.is_visible(after) and sampler.is_visible(before):
            break
    thing = after.find(target)
    scenes = (before, after)
    steps = f"{phrases.describe_scenes(scenes)} Image 1 has no {thing.name}."
    question = sampler.choose_question("view_diff")
    return Draft(scenes, question, steps, thing, 2)


def draw_refer_grounding(sampler: Sampler) -> Draft:
    """Draw a thing alone and again, in another size, among others in image 2."""
    target = sampler.sample_label()
    places = ("clear", "rain", "night", "sun")
    place = sampler.choose(places) if sampler.level != "easy" else "clear"
    alone = sampler.sample_scene([target], place, large={target})
    scene = sampler.sample_scene(sampler.sample_labels(target=target))
    thing = scene.find(target)
    scenes = (alone, scene)
    steps = f"{phrases.describe_scenes(scenes)} Both images have the {thing.name}."
    question = sampler.choose_question("refer_grounding")
    return Draft(scenes, question, steps, thing, 2)


@dataclass(frozen=True)
class Need:
    """A need that image 1 shows, by its place or by a thing, and what answers it."""

    answers: tuple[str, ...]  # kinds that answer it; image 2 shows one of them
    reason: str  # the chain's sentence on why `{}` (kind with article) is right
    group: str  # which questions ask for it, a key of `REASONING`
    place: str = "clear"  # of image 1
    kind: str | None = None  # of the thing in image 1; None if the place shows the need
    rivals: tuple[str, ...] = ()  # a person might accept them: neither image has one


_PAIRS = io.read_asset("minimig/pairs.yaml")
NEEDS = tuple(Need(**need) for need in _PAIRS["needs"])
CORRESPONDENCES: dict[str, tuple[tuple[str, str], ...]] = _PAIRS["correspondences"]
TOO_SMALL: tuple[tuple[str, str], ...] = _PAIRS["too_small"]


def sample_need(sampler: Sampler) -> tuple[Need, Label, Label, tuple[str, ...]]:
    """Draw a need, what answers it, and what shows it.

    Returns:
        The need; the label of the thing that answers it; that of the thing that shows
        it or, if its place does, of any; and the kinds that nobody would accept.
    """
    need = sampler.choose(NEEDS)
    target = sampler.sample_label(need.answers)
    excluded = {*need.answers, *need.rivals, need.kind}
    neutral = tuple(kind for kind in KINDS if kind not in excluded)
    context = sampler.sample_label((need.kind,) if need.kind else neutral)
    return need, target, context, neutral


def draw_reasoning(sampler: Sampler) -> Draft:
    """Draw a place or a thing, and in image 2 the one thing that it calls for."""
    need, target, context, neutral = sample_need(sampler)
    first = sampler.sample_scene([context], need.place)
    labels = sampler.sample_labels(5, target, neutral, taken=[context])
    scene = sampler.sample_scene(labels)
    thing = scene.find(target)
    reason = need.reason.format(phrases.add_article(thing.kind))
    first_image, second_image = map(phrases.describe_scene, (first, scene), (1, 2))
    steps = f"{first_image} {reason} {second_image}"
    question = sampler.choose(phrases.REASONING[need.group])
    return Draft((first, scene), question, steps, thing, 2)


def _outline(image: Image.Image, box: Box, width: int = 6) -> Image.Image:
    """Return a copy of the image with a red box drawn around `box`."""
    image = image.copy()
    x1, y1, x2, y2 = to_pixels(box, CANVAS, CANVAS)
    corners = (x1 - width, y1 - width, x2 + width, y2 + width)
    inside = [min(CANVAS - 1, max(0, round(v))) for v in corners]
    ImageDraw.Draw(image).rectangle(inside, outline=(255, 0, 0), width=width)
    return image


def draw_correspondence(sampler: Sampler) -> Draft:
    """Draw a part outlined in red, and in image 2 the part of the same purpose."""
    purpose = sampler.choose(tuple(CORRESPONDENCES))
    parts = CORRESPONDENCES[purpose]
    kind, part = sampler.choose([pair for pair in parts if pair not in TOO_SMALL])
    source_kind, source_part = sampler.choose([p for p in parts if p[0] != kind])
    # A red outline is hard to see on red and orange.
    colors = [color for color in COLORS if color not in ("red", "orange")]
    source = sampler.sample_label((source_kind,), colors)
    # Kinds without any part of this purpose, paired or not.
    neutral = tuple(
        name
        for name, about in KINDS.items()
        if all(p.purpose != purpose for p in about.parts.values())
    )
    first = sampler.sample_scene([source], large={source})
    target = sampler.sample_label((kind,))
    labels = sampler.sample_labels(4, target, neutral)
    scene = sampler.sample_scene(labels, large={target})
    marked = first.things[0]
    marked_name = phrases.add_article(marked.name)
    verb = "are" if part.endswith("s") else "is"
    steps = (
        f"The red box is around the {source_part} of {marked_name}, "
        f"used to {purpose}. {phrases.describe_scene(scene, 2)} "
        f"The {part} of {phrases.add_article(kind)} {verb} used to {purpose} too."
    )
    outlined = _outline(render(first), marked.compute_part_box(source_part))
    images = (outlined, render(scene))
    question = sampler.choose_question("correspondence")
    scenes, thing = (first, scene), scene.find(target)
    return Draft(scenes, question, steps, thing, 2, images, part)

"""What the base model is taught: to see, to name, to describe, to point.

These lessons take the place of Qwen2-VL's pre-training. They show pictures of the
MiniMIG world with questions on what is in them, sometimes several pictures at once.
They contain none of the ten tasks and no reasoning chain.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from univg_nb.data.boxes import Box, format_box
from univg_nb.data.prompts import DIRECT_SUFFIX
from univg_nb.minimig.compose import choose
from univg_nb.minimig.phrases import (
    FIND,
    PLACE_WORDS,
    add_article,
    describe_position,
    describe_scene,
    list_referring_phrases,
)
from univg_nb.minimig.pictograms import COLORS, KINDS
from univg_nb.minimig.scenes import (
    PLACES,
    Label,
    Scene,
    Thing,
    place_thing,
    sample_size,
)

# Wordings and chains of the tasks, read only to choose the tokenizer's words.
SENTENCES = Path(__file__).parent.parent / "assets" / "sentences.txt"


class Look(NamedTuple):
    """Where the characters `start` to `end` of a text look.

    Attributes:
        start: first character.
        end: character after the last.
        image: index of the picture, from 0.
        box: what to look at in it, 0..1000.
    """

    start: int
    end: int
    image: int
    box: Box


class Turn(NamedTuple):
    """A question and its reply, with where their parts look.

    Attributes:
        question: what the user asks.
        reply: what the model should say.
        looks: for the parts of the reply.
        asks: for the phrase in the question that names what is looked for.
    """

    question: str
    reply: str
    looks: tuple[Look, ...] = ()
    asks: tuple[Look, ...] = ()


@dataclass(frozen=True)
class Lesson:
    """Pictures and the dialogue about them, in order."""

    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]


# A question about one picture: (rng, scene, its number from 1, how many pictures).
Ask = Callable[[np.random.Generator, Scene, int, int], Turn | None]


def _name_image(number: int, num_images: int, rng: np.random.Generator) -> str:
    if num_images > 1:
        return f" in image {number}"
    return " in the image" if rng.random() < 0.3 else ""


def make_turn(
    question: str, reply: str, number: int, box: Box, phrase: str = ""
) -> Turn:
    """Return a turn whose whole reply is read off one place of a picture.

    Args:
        question: what the user asks.
        reply: what the model should say.
        number: number of the picture, from 1.
        box: the place in it.
        phrase: the words of the question that name what is there.
    """
    looks = (Look(0, len(reply), number - 1, box),)
    if not phrase:
        return Turn(question, reply, looks)
    start = question.index(phrase)
    asked = Look(start, start + len(phrase), number - 1, box)
    return Turn(question, reply, looks, (asked,))


def _make_pointing_turn(
    rng: np.random.Generator, phrase: str, box: Box, number: int, num_images: int
) -> Turn:
    """Return a turn that asks for a box in one of several wordings."""
    image = _name_image(number, num_images, rng)
    question = choose(rng, FIND).format(phrase, image)
    if rng.random() < 0.3:
        question += DIRECT_SUFFIX
    reply = f"<|box_start|>{format_box(box)}<|box_end|>"
    return make_turn(question, reply, number, box, phrase)


def list_looks(
    reply: str, names: Sequence[str], scene: Scene, number: int, start: int = 0
) -> tuple[Look, ...]:
    """Return the looks of a reply that names the things from left to right.

    Args:
        reply: the reply.
        names: the names in it, in order.
        scene: what picture `number` shows.
        number: number of the picture, from 1.
        start: character of the reply at which the list begins.
    """
    looks = []
    for name, thing in zip(names, scene.sort_by_position(), strict=True):
        begin = reply.index(name, start)
        start = begin + len(name)
        looks.append(Look(begin, start, number - 1, thing.box))
    return tuple(looks)


def ask_box(
    rng: np.random.Generator, scene: Scene, number: int, num_images: int
) -> Turn | None:
    """Refer to one thing; the reply is its box."""
    thing = choose(rng, scene.things)
    phrases = list_referring_phrases(thing, scene.things)
    if not phrases:
        return None
    # The full name most often; phrases by position or size alone are rarer.
    phrase = phrases[0] if rng.random() < 0.75 else choose(rng, phrases)
    return _make_pointing_turn(rng, phrase, thing.box, number, num_images)


def ask_part_box(
    rng: np.random.Generator, scene: Scene, number: int, num_images: int
) -> Turn:
    """Refer to a part of a thing; the reply is the part's box."""
    thing = choose(rng, scene.things)
    part = choose(rng, list(KINDS[thing.kind].parts))
    phrase, box = f"{part} of the {thing.name}", thing.compute_part_box(part)
    return _make_pointing_turn(rng, phrase, box, number, num_images)


def ask_name(
    rng: np.random.Generator, scene: Scene, number: int, num_images: int
) -> Turn:
    """Give a box as text; the reply names the thing in it."""
    thing = choose(rng, scene.things)
    image = _name_image(number, num_images, rng)
    question = choose(rng, ("What is at {}{}?", "Name the thing at {}{}."))
    question = question.format(format_box(thing.box), image)
    return make_turn(question, add_article(thing.name) + ".", number, thing.box)


def ask_description(
    rng: np.random.Generator, scene: Scene, number: int, num_images: int
) -> Turn:
    """Ask what a picture shows."""
    image = f"image {number}" if num_images > 1 or rng.random() < 0.5 else "the image"
    question = choose(rng, ("Describe {}.", "What is in {}?", "What does {} show?"))
    reply = describe_scene(scene, number)
    names = [add_article(thing.name) for thing in scene.sort_by_position()]
    looks = list_looks(reply, names, scene, number)
    return Turn(question.format(image), reply, looks)


def ask_all_boxes(
    rng: np.random.Generator, scene: Scene, number: int, num_images: int
) -> Turn:
    """Ask for every thing with its box, from left to right."""
    image = f"image {number}" if num_images > 1 else "the image"
    parts = [f"{t.name} {format_box(t.box)}" for t in scene.sort_by_position()]
    reply = "; ".join(parts) + "."
    looks = list_looks(reply, parts, scene, number)
    return Turn(f"List all things in {image} with their boxes.", reply, looks)


def ask_weather(
    rng: np.random.Generator, scene: Scene, number: int, num_images: int
) -> Turn:
    """Ask for the weather or the place of a picture."""
    image = _name_image(number, num_images, rng)
    return Turn(f"How is the weather{image}?", PLACE_WORDS[scene.place] + ".")


def ask_position(
    rng: np.random.Generator, scene: Scene, number: int, num_images: int
) -> Turn:
    """Ask in words where a thing is."""
    thing = choose(rng, scene.things)
    image = _name_image(number, num_images, rng).replace(" in ", " of ")
    question = f"In which part{image} is the {thing.name}?"
    reply = describe_position(thing.x, thing.y) + "."
    return make_turn(question, reply, number, thing.box, thing.name)


def ask_presence(
    rng: np.random.Generator, scene: Scene, number: int, num_images: int
) -> Turn:
    """Ask whether a picture shows a thing."""
    present = {thing.label for thing in scene.things}
    if rng.random() < 0.5:
        kind, color = choose(rng, sorted(present))
    else:  # share an attribute with something that is there
        kind, color = choose(rng, sorted(present))
        if rng.random() < 0.5:
            kind = choose(rng, list(KINDS))
        else:
            color = choose(rng, list(COLORS))
    image = _name_image(number, num_images, rng) or " in the image"
    question = f"Is there {add_article(f'{color} {kind}')}{image}?"
    for thing in scene.things:
        if thing.label == (kind, color):
            return make_turn(question, "yes.", number, thing.box, thing.name)
    return Turn(question, "no.")


def ask_knowledge(rng: np.random.Generator) -> Turn:
    """Ask what things are for; no picture is needed."""
    kind = choose(rng, list(KINDS))
    about, named = KINDS[kind], add_article(kind)
    part = choose(rng, list(about.parts))
    purpose = about.parts[part].purpose
    options = (
        (f"What {about.use}?", f"{named}."),
        (f"I want to {about.need}. What do I need?", f"{named}."),
        (f"What is {named} for?", f"it {about.use}."),
        (f"Which parts has {named}?", " and ".join(about.parts) + "."),
        (f"What is the {part} of {named} for?", f"to {purpose}."),
        (f"Which part of {named} is made to {purpose}?", f"the {part}."),
    )
    return Turn(*choose(rng, options))


def ask_image(rng: np.random.Generator, scenes: Sequence[Scene]) -> Turn | None:
    """Ask for the only picture that shows a thing; None if several show it."""
    number = int(rng.integers(len(scenes)))
    thing = choose(rng, scenes[number].things)
    shown = [any(t.name == thing.name for t in s.things) for s in scenes]
    if sum(shown) != 1:
        return None
    question, reply = f"Which image shows {add_article(thing.name)}?", number + 1
    return make_turn(question, f"image {reply}.", reply, thing.box, thing.name)


# Shares of the questions about one picture.
QUESTION_SHARES: tuple[tuple[float, Ask], ...] = (
    (0.52, ask_box),
    (0.07, ask_part_box),
    (0.11, ask_name),
    (0.10, ask_description),
    (0.07, ask_all_boxes),
    (0.03, ask_weather),
    (0.05, ask_position),
    (0.05, ask_presence),
)


def sample_labels(
    rng: np.random.Generator, n: int, taken: Collection[Label] = ()
) -> list[Label]:
    """Draw `n` different labels not in `taken`; half share something with another."""
    kinds, colors = list(KINDS), list(COLORS)
    labels: list[Label] = []
    while len(labels) < n:
        kind, color = str(rng.choice(kinds)), str(rng.choice(colors))
        if labels and rng.random() < 0.5:
            other = labels[int(rng.integers(len(labels)))]
            if rng.random() < 0.5:
                kind = other[0]
            else:
                color = other[1]
        if (kind, color) not in labels and (kind, color) not in taken:
            labels.append((kind, color))
    return labels


def sample_scene(
    rng: np.random.Generator,
    max_things: int,
    split: str,
    labels: Sequence[Label] | None = None,
) -> Scene:
    """Draw a scene, a third of the time not at "clear".

    Args:
        rng: source of random numbers.
        max_things: largest number of things.
        split: the split that the scene must belong to.
        labels: kind and color of the things; drawn if None.
    """
    n = len(labels) if labels else int(rng.integers(1, max_things + 1))
    place = choose(rng, PLACES) if rng.random() < 0.33 else "clear"
    max_iou = 0.12 if rng.random() < 0.8 else 0.3
    large_share = (0.6, 0.5, 0.45, 0.35, 0.2)[n - 1]
    while True:
        things: list[Thing] = []
        for kind, color in labels or sample_labels(rng, n):
            size = sample_size(rng, bool(rng.random() < large_share))
            thing = Thing(kind, color, 0.5, 0.5, size, bool(rng.random() < 0.5))
            things.append(place_thing(rng, thing, things, max_iou))
        scene = Scene(tuple(things), place, int(rng.integers(4)))
        if scene.split == split:
            return scene


def sample_related_scenes(
    rng: np.random.Generator,
    num_images: int,
    max_things: int,
    split: str,
    kept_share: float = 0.5,
) -> tuple[Scene, ...]:
    """Draw scenes that share things, so that the image named must be looked at.

    Args:
        rng: source of random numbers.
        num_images: how many scenes.
        max_things: largest number of things in a scene.
        split: the split that the scenes must belong to.
        kept_share: share of an earlier scene's things that a scene shows again.
    """
    scenes = [sample_scene(rng, max_things, split)]
    for _ in range(num_images - 1):
        earlier = choose(rng, scenes)
        kept = [t.label for t in earlier.things if rng.random() < kept_share]
        fresh = int(rng.integers(0 if kept else 1, max(2, max_things - len(kept))))
        fresh = min(fresh, max_things - len(kept))
        labels = kept + sample_labels(rng, fresh, set(kept))
        scenes.append(sample_scene(rng, max_things, split, labels))
    return tuple(scenes)


def sample_lesson(
    rng: np.random.Generator,
    max_things: int = 5,
    split: str = "train",
    several: float = 0.35,
    turns: int = 6,
) -> Lesson:
    """Draw one lesson.

    Args:
        rng: source of random numbers.
        max_things: largest number of things in a scene.
        split: the split that the scenes must belong to.
        several: share of lessons with two to six pictures.
        turns: number of questions.
    """
    many = rng.random() < several
    num_images = int(rng.choice((2, 2, 3, 3, 4, 5, 6))) if many else 1
    scenes = sample_related_scenes(rng, num_images, max_things, split)
    shares = np.array([share for share, _ in QUESTION_SHARES])
    asked: list[Turn] = []
    while len(asked) < turns:
        chance = rng.random()
        turn: Turn | None
        if chance < 0.06:
            turn = ask_knowledge(rng)
        elif chance < 0.12 and len(scenes) > 1:
            turn = ask_image(rng, scenes)
        else:
            choice = int(rng.choice(len(shares), p=shares / shares.sum()))
            number = int(rng.integers(len(scenes)))
            ask = QUESTION_SHARES[choice][1]
            turn = ask(rng, scenes[number], number + 1, len(scenes))
        if turn is not None:
            asked.append(turn)
    return Lesson(scenes, tuple(asked))


def generate_corpus(num_lessons: int = 4000) -> Iterator[str]:
    """Yield sentences for the tokenizer: lessons, wordings and chains of the tasks."""
    rng = np.random.default_rng(0)
    for _ in range(num_lessons):
        for turn in sample_lesson(rng).turns:
            yield turn.question
            yield turn.reply
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    for _ in range(60):
        yield from sentences

"""What the shipped base model is taught: to see, to name, to describe, to point.

These lessons play the part of Qwen2-VL's pre-training. They show pictures of the
MiniMIG world with questions on what stands in them, sometimes several pictures at
once. They contain none of the ten tasks and no reasoning chain.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from univg_nb.data.boxes import Box, format_box
from univg_nb.data.prompts import DIRECT_SUFFIX
from univg_nb.minimig import words
from univg_nb.minimig.phrases import FIND
from univg_nb.minimig.pictograms import COLOURS, KINDS
from univg_nb.minimig.scenes import PLACES, Scene, Thing, random_names, random_scene


class Look(NamedTuple):
    """Where to look for the characters ``start`` to ``end`` of a reply.

    image: index of the picture, from 0; box: what to look at in it, 0..1000.
    """

    start: int
    end: int
    image: int
    box: Box


class Turn(NamedTuple):
    """A question, its reply, and where the parts of the reply are to be seen.

    asks: the same for the phrase in the question that names what is looked for.
    """

    question: str
    reply: str
    looks: tuple[Look, ...] = ()
    asks: tuple[Look, ...] = ()


# Wordings and chains of the tasks, read only to choose the tokenizer's words.
SENTENCES = Path(__file__).parent.parent / "assets" / "sentences.txt"


@dataclass(frozen=True)
class Lesson:
    """Pictures and the dialogue about them, in order."""

    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]


def pick(rng: np.random.Generator, options):
    """One of ``options``."""
    return options[int(rng.integers(len(options)))]


def spoken_box(box: Box) -> str:
    """A box as Qwen2-VL writes it, between its box tokens."""
    return f"<|box_start|>{format_box(box)}<|box_end|>"


def _in_image(number: int, of: int, rng: np.random.Generator) -> str:
    if of > 1:
        return f" in image {number}"
    return " in the image" if rng.random() < 0.3 else ""


def find(rng: np.random.Generator, scene: Scene, number: int, of: int) -> Turn | None:
    """Refer to one thing; the reply is its box."""
    thing = pick(rng, scene.things)
    phrases = words.referring_phrases(thing, scene.things)
    if not phrases:
        return None
    # The full name most often; what only position or size tells apart less so.
    phrase = phrases[0] if rng.random() < 0.75 else pick(rng, phrases)
    return _pointing(rng, phrase, thing.box, number, of)


def _pointing(
    rng: np.random.Generator, phrase: str, box: Box, number: int, of: int
) -> Turn:
    place = _in_image(number, of, rng)
    question = pick(rng, FIND).format(phrase, place)
    if rng.random() < 0.3:
        question += DIRECT_SUFFIX
    return looking(question, spoken_box(box), number, box, phrase)


def looking(question: str, reply: str, number: int, box: Box, phrase: str = "") -> Turn:
    """A turn whose whole reply is read off one place of image ``number`` (from 1).

    phrase: the words of the question that name what stands there.
    """
    looks = (Look(0, len(reply), number - 1, box),)
    if not phrase:
        return Turn(question, reply, looks)
    start = question.index(phrase)
    asked = Look(start, start + len(phrase), number - 1, box)
    return Turn(question, reply, looks, (asked,))


def listing_looks(
    reply: str, names: list[str], scene: Scene, number: int, at: int = 0
) -> tuple[Look, ...]:
    """Looks for a reply that, from ``at`` on, names the things from left to right."""
    looks = []
    for name, thing in zip(names, scene.reading_order(), strict=True):
        start = reply.index(name, at)
        at = start + len(name)
        looks.append(Look(start, at, number - 1, thing.box))
    return tuple(looks)


def find_part(rng: np.random.Generator, scene: Scene, number: int, of: int) -> Turn:
    """Refer to a part of a thing; the reply is the part's box."""
    thing = pick(rng, scene.things)
    part = pick(rng, list(KINDS[thing.kind].parts))
    phrase = f"{part} of the {thing.name}"
    return _pointing(rng, phrase, thing.part(part), number, of)


def name_at(rng: np.random.Generator, scene: Scene, number: int, of: int) -> Turn:
    """The reverse: a box in words, the reply names the thing in it."""
    thing = pick(rng, scene.things)
    place = _in_image(number, of, rng)
    question = pick(rng, ("What is at {}{}?", "Name the thing at {}{}."))
    reply = words.article(thing.name) + "."
    question = question.format(format_box(thing.box), place)
    return looking(question, reply, number, thing.box)


def describe(rng: np.random.Generator, scene: Scene, number: int, of: int) -> Turn:
    """Say what a picture shows."""
    place = f"image {number}" if of > 1 or rng.random() < 0.5 else "the image"
    question = pick(rng, ("Describe {}.", "What is in {}?", "What does {} show?"))
    reply = words.description(scene, number)
    names = [words.article(t.name) for t in scene.reading_order()]
    looks = listing_looks(reply, names, scene, number)
    return Turn(question.format(place), reply, looks)


def list_boxes(rng: np.random.Generator, scene: Scene, number: int, of: int) -> Turn:
    """Name every thing with its box, from left to right."""
    place = f"image {number}" if of > 1 else "the image"
    parts = [f"{t.name} {format_box(t.box)}" for t in scene.reading_order()]
    reply = "; ".join(parts) + "."
    looks = listing_looks(reply, parts, scene, number)
    return Turn(f"List all things in {place} with their boxes.", reply, looks)


def tell_place(rng: np.random.Generator, scene: Scene, number: int, of: int) -> Turn:
    """Say how the weather is, or where the picture plays."""
    place = _in_image(number, of, rng)
    return Turn(f"How is the weather{place}?", words.PLACE_WORDS[scene.place] + ".")


def tell_where(rng: np.random.Generator, scene: Scene, number: int, of: int) -> Turn:
    """Say in words where a thing stands."""
    thing = pick(rng, scene.things)
    place = _in_image(number, of, rng)
    question = f"In which part{place.replace(' in ', ' of ')} is the {thing.name}?"
    return looking(question, words.where(thing) + ".", number, thing.box, thing.name)


def is_there(rng: np.random.Generator, scene: Scene, number: int, of: int) -> Turn:
    """Yes or no: does a picture show this?"""
    present = {(t.kind, t.colour) for t in scene.things}
    if rng.random() < 0.5:
        kind, colour = pick(rng, sorted(present))
    else:  # share an attribute with something that is there
        kind, colour = pick(rng, sorted(present))
        if rng.random() < 0.5:
            kind = pick(rng, list(KINDS))
        else:
            colour = pick(rng, list(COLOURS))
    place = _in_image(number, of, rng) or " in the image"
    question = f"Is there {words.article(f'{colour} {kind}')}{place}?"
    for thing in scene.things:
        if (thing.kind, thing.colour) == (kind, colour):
            return looking(question, "yes.", number, thing.box, thing.name)
    return Turn(question, "no.")


def knowledge(rng: np.random.Generator) -> Turn:
    """What things are for; no picture is needed."""
    kind = pick(rng, list(KINDS))
    about = KINDS[kind]
    part = pick(rng, list(about.parts))
    options = (
        (f"What {about.use}?", words.article(kind) + "."),
        (f"I want to {about.need}. What do I need?", words.article(kind) + "."),
        (f"What is {words.article(kind)} for?", f"it {about.use}."),
        (f"Which parts has {words.article(kind)}?", " and ".join(about.parts) + "."),
        (
            f"What is the {part} of {words.article(kind)} for?",
            f"to {about.parts[part].purpose}.",
        ),
        (
            f"Which part of {words.article(kind)} is made to "
            f"{about.parts[part].purpose}?",
            f"the {part}.",
        ),
    )
    return Turn(*pick(rng, options))


def which_image(rng: np.random.Generator, scenes: tuple[Scene, ...]) -> Turn | None:
    """Name the only picture that shows a thing."""
    number = int(rng.integers(len(scenes)))
    thing = pick(rng, scenes[number].things)
    shown = [any(t.name == thing.name for t in s.things) for s in scenes]
    if sum(shown) != 1:
        return None
    question = f"Which image shows {words.article(thing.name)}?"
    return looking(question, f"image {number + 1}.", number + 1, thing.box, thing.name)


ABOUT_ONE: tuple[tuple[float, Callable], ...] = (
    (0.52, find),
    (0.07, find_part),
    (0.11, name_at),
    (0.10, describe),
    (0.07, list_boxes),
    (0.03, tell_place),
    (0.05, tell_where),
    (0.05, is_there),
)


def scene_for(
    rng: np.random.Generator, most: int, split: str, names=None, least: int = 1
) -> Scene:
    """A scene of ``least`` to ``most`` things, a third of the time not at "clear"."""
    n = len(names) if names else int(rng.integers(least, most + 1))
    place = pick(rng, PLACES) if rng.random() < 0.33 else "clear"
    overlap = 0.12 if rng.random() < 0.8 else 0.3
    return random_scene(rng, n, split, names, place, overlap)


def lesson(
    rng: np.random.Generator,
    most: int = 5,
    split: str = "train",
    several: float = 0.35,
    turns: int = 6,
) -> Lesson:
    """One lesson on scenes of up to ``most`` things.

    ``several`` is the share of lessons with two to six pictures; ``turns`` the
    number of questions asked about them.
    """
    of = int(rng.choice((2, 2, 3, 3, 4, 5, 6))) if rng.random() < several else 1
    scenes = related_scenes(rng, of, most, split)
    return Lesson(scenes, tuple(_turns(rng, scenes, turns)))


def related_scenes(
    rng: np.random.Generator, of: int, most: int, split: str, kept_share: float = 0.5
) -> tuple[Scene, ...]:
    """``of`` scenes that share things, so that the image named must be looked at.

    ``kept_share`` of an earlier scene's things stand in the next one again.
    """
    scenes = [scene_for(rng, most, split)]
    for _ in range(of - 1):
        earlier = pick(rng, scenes)
        kept = [(t.kind, t.colour) for t in earlier.things if rng.random() < kept_share]
        fresh = int(rng.integers(0 if kept else 1, max(2, most - len(kept))))
        names = kept + random_names(rng, min(fresh, most - len(kept)), set(kept))
        scenes.append(scene_for(rng, most, split, names))
    return tuple(scenes)


def _turns(
    rng: np.random.Generator, scenes: tuple[Scene, ...], turns: int
) -> Iterator[Turn]:
    shares = np.array([share for share, _ in ABOUT_ONE])
    asked = 0
    while asked < turns:
        chance = rng.random()
        if chance < 0.06:
            turn = knowledge(rng)
        elif chance < 0.12 and len(scenes) > 1:
            turn = which_image(rng, scenes)
        else:
            ask = ABOUT_ONE[int(rng.choice(len(shares), p=shares / shares.sum()))][1]
            number = int(rng.integers(len(scenes)))
            turn = ask(rng, scenes[number], number + 1, len(scenes))
        if turn is not None:
            asked += 1
            yield turn


def corpus(n: int = 4000) -> Iterator[str]:
    """Sentences for the tokenizer: lessons, task wordings and chains."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        for turn in lesson(rng).turns:
            yield turn.question
            yield turn.reply
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    for _ in range(60):
        yield from sentences


def thing_names() -> list[tuple[str, str]]:
    """All (kind, colour) pairs of the world."""
    return [(kind, colour) for kind in KINDS for colour in COLOURS]


__all__ = ["Lesson", "Thing", "corpus", "lesson", "spoken_box", "thing_names"]

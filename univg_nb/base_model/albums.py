"""Lessons on several pictures at once, the last thing the base model is taught.

A real Qwen2-VL tells image 1 from image 5 and says what each shows; without that no
chain of reasoning over several images can be learned. As in `lessons`, nothing here
compares pictures, and no task and no chain occurs.
"""

from dataclasses import replace

import numpy as np

from univg_nb.base_model.lessons import (
    Lesson,
    Turn,
    describe,
    find,
    find_part,
    is_there,
    knowledge,
    listing_looks,
    name_at,
    pick,
    related_scenes,
    scene_for,
    tell_place,
    tell_where,
    which_image,
)
from univg_nb.minimig import words
from univg_nb.minimig.phrases import ORDINALS
from univg_nb.minimig.scenes import Scene

CLOSE = (0.55, 0.9)  # side of a thing seen from close by, as a share of the picture's

ASKED = (
    (0.40, describe),
    (0.28, find),
    (0.10, name_at),
    (0.03, find_part),
    (0.03, tell_place),
    (0.04, tell_where),
    (0.02, is_there),
)
ALL, WHICH, KNOWLEDGE = 0.12, 0.03, 0.03  # shares of the turns that are not in ASKED


def close_up(rng: np.random.Generator, split: str) -> Scene:
    """One thing that fills much of the picture."""
    while True:
        thing = scene_for(rng, 1, split).things[0]
        size = round(float(rng.uniform(*CLOSE)) * 64) / 64
        x, y = (round(float(v), 3) for v in rng.uniform(size / 2, 1 - size / 2, 2))
        scene = Scene((replace(thing, x=x, y=y, size=size),), "clear")
        if scene.split() == split:
            return scene


def describe_all(rng: np.random.Generator, scenes: tuple[Scene, ...]) -> Turn:
    """Say what each picture shows, in order."""
    question = pick(rng, ("Describe all images.", "What do the images show?"))
    reply, looks = "", ()
    for number, scene in enumerate(scenes, 1):
        begins = len(reply)
        reply += f"{words.description(scene, number)} "
        names = [words.article(t.name) for t in scene.reading_order()]
        looks += listing_looks(reply, names, scene, number, begins)
    return Turn(question, reply.rstrip(), looks)


def with_ordinal(rng: np.random.Generator, turn: Turn, number: int) -> Turn:
    """The question with "the second image" for "image 2", now and then."""
    text, said = f"image {number}", f"the {ORDINALS[number - 1]} image"
    # What the question's phrase looks at is counted in characters before these words.
    before = max((look.end for look in turn.asks), default=0)
    if rng.random() < 0.1 and turn.question.find(text) >= before:
        return turn._replace(question=turn.question.replace(text, said))
    return turn


def _turn(rng: np.random.Generator, scenes: tuple[Scene, ...]) -> Turn | None:
    shares = np.array([ALL, WHICH, KNOWLEDGE, *(share for share, _ in ASKED)])
    choice = int(rng.choice(len(shares), p=shares / shares.sum()))
    if choice == 0:
        return describe_all(rng, scenes) if 1 < len(scenes) < 5 else None
    if choice == 1:
        return which_image(rng, scenes) if len(scenes) > 1 else None
    if choice == 2:
        return knowledge(rng)
    number = int(rng.integers(len(scenes))) + 1
    turn = ASKED[choice - 3][1](rng, scenes[number - 1], number, len(scenes))
    return turn and with_ordinal(rng, turn, number)


def album(rng: np.random.Generator, split: str = "train", turns: int = 5) -> Lesson:
    """One lesson on one to six pictures; in a third, the same things stand in all."""
    of = int(rng.choice((1, 2, 2, 2, 3, 3, 3, 4, 5, 6)))
    kept = pick(rng, (0.3, 0.5, 1.0))
    scenes = related_scenes(rng, of, 5 if of < 3 else 4, split, kept)
    scenes = tuple(close_up(rng, split) if rng.random() < 0.1 else s for s in scenes)
    asked: list[Turn] = []
    while len(asked) < turns:
        if (turn := _turn(rng, scenes)) is not None:
            asked.append(turn)
    return Lesson(scenes, tuple(asked))

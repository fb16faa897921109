"""Lessons on several pictures at once, the last thing the base model is taught.

A real Qwen2-VL tells image 1 from image 5 and says what each shows; without that no
chain of reasoning over several images can be learned. As in `lessons`, nothing here
compares pictures, and no task and no chain occurs.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from univg_nb.base_model.lessons import (
    Ask,
    Lesson,
    Look,
    Turn,
    ask_box,
    ask_description,
    ask_image,
    ask_knowledge,
    ask_name,
    ask_part_box,
    ask_position,
    ask_presence,
    ask_weather,
    list_looks,
    sample_related_scenes,
    sample_scene,
)
from univg_nb.minimig.compose import choose
from univg_nb.minimig.phrases import ORDINALS, add_article, describe_scenes
from univg_nb.minimig.scenes import Scene

CLOSE = (0.55, 0.9)  # side of a thing seen from close by, as a share of the picture's

# Shares of the turns: about one picture, and about all, about which one, about none.
QUESTION_SHARES: tuple[tuple[float, Ask], ...] = (
    (0.40, ask_description),
    (0.28, ask_box),
    (0.10, ask_name),
    (0.03, ask_part_box),
    (0.03, ask_weather),
    (0.04, ask_position),
    (0.02, ask_presence),
)
ALL_SHARE, IMAGE_SHARE, KNOWLEDGE_SHARE = 0.12, 0.03, 0.03


def sample_close_up(rng: np.random.Generator, split: str) -> Scene:
    """Draw a scene of one thing that fills much of the picture."""
    while True:
        thing = sample_scene(rng, 1, split).things[0]
        size = round(float(rng.uniform(*CLOSE)) * 64) / 64
        x, y = (round(float(v), 3) for v in rng.uniform(size / 2, 1 - size / 2, 2))
        scene = Scene((replace(thing, x=x, y=y, size=size),), "clear")
        if scene.split == split:
            return scene


def ask_all_descriptions(rng: np.random.Generator, scenes: Sequence[Scene]) -> Turn:
    """Ask what each picture shows, in order."""
    question = choose(rng, ("Describe all images.", "What do the images show?"))
    reply = describe_scenes(scenes)
    looks: tuple[Look, ...] = ()
    for number, scene in enumerate(scenes, 1):
        names = [add_article(thing.name) for thing in scene.sort_by_position()]
        start = reply.index(f"Image {number} shows ")
        looks += list_looks(reply, names, scene, number, start)
    return Turn(question, reply, looks)


def use_ordinal(rng: np.random.Generator, turn: Turn, number: int) -> Turn:
    """Write "the second image" for "image 2" in one question of ten.

    Args:
        rng: source of random numbers.
        turn: a turn about one picture.
        number: number of the picture, from 1.
    """
    text, ordinal = f"image {number}", f"the {ORDINALS[number - 1]} image"
    # The question's looks are counted in characters, so these words must follow them.
    start = max((look.end for look in turn.asks), default=0)
    if rng.random() < 0.1 and turn.question.find(text) >= start:
        return turn._replace(question=turn.question.replace(text, ordinal))
    return turn


def _sample_turn(rng: np.random.Generator, scenes: tuple[Scene, ...]) -> Turn | None:
    shares = [ALL_SHARE, IMAGE_SHARE, KNOWLEDGE_SHARE]
    shares += [share for share, _ in QUESTION_SHARES]
    choice = int(rng.choice(len(shares), p=np.array(shares) / np.array(shares).sum()))
    if choice == 0:
        return ask_all_descriptions(rng, scenes) if 1 < len(scenes) < 5 else None
    if choice == 1:
        return ask_image(rng, scenes) if len(scenes) > 1 else None
    if choice == 2:
        return ask_knowledge(rng)
    number = int(rng.integers(len(scenes))) + 1
    turn = QUESTION_SHARES[choice - 3][1](rng, scenes[number - 1], number, len(scenes))
    return turn and use_ordinal(rng, turn, number)


def sample_album(
    rng: np.random.Generator, split: str = "train", turns: int = 5
) -> Lesson:
    """Draw one lesson on one to six pictures; in a third, all show the same things.

    Args:
        rng: source of random numbers.
        split: the split that the scenes must belong to.
        turns: number of questions.
    """
    num_images = int(rng.choice((1, 2, 2, 2, 3, 3, 3, 4, 5, 6)))
    kept_share = choose(rng, (0.3, 0.5, 1.0))
    max_things = 5 if num_images < 3 else 4
    scenes = sample_related_scenes(rng, num_images, max_things, split, kept_share)
    scenes = tuple(
        sample_close_up(rng, split) if rng.random() < 0.1 else scene for scene in scenes
    )
    asked: list[Turn] = []
    while len(asked) < turns:
        if (turn := _sample_turn(rng, scenes)) is not None:
            asked.append(turn)
    return Lesson(scenes, tuple(asked))

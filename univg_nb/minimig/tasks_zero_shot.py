"""One-picture and video families: referring grounding, and the two zero-shot ones.

``single`` plays RefCOCO's part: a plain phrase, no chain asked for. ``lisa`` names the
thing only by what it is for; ``video`` has five frames, the box is that of the third.
No wording of the latter two occurs in training.
"""

from dataclasses import replace

import numpy as np

from univg_nb.data.zero_shot_formats import INSTRUCTION, SCORED_FRAME, VIDEO_INSTRUCTION
from univg_nb.minimig import words
from univg_nb.minimig.compose import (
    Draft,
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
from univg_nb.minimig.needs import answers_use
from univg_nb.minimig.phrases import (
    DIRECTIONS,
    FIND,
    IMPLICIT_NEED,
    IMPLICIT_USE,
    MOTION,
)
from univg_nb.minimig.pictograms import KINDS
from univg_nb.minimig.scenes import Scene, Thing, render

FRAMES = 5
NO_TOOLS = ("fish", "tree", "apple", "house")
STEP = 0.075  # how far a thing moves from frame to frame, in shares


def single(rng: np.random.Generator, level: str, split: str) -> Draft:
    """One picture, a phrase that names one thing in it."""
    while True:
        target = any_name(rng)
        names = [target, *distractors(rng, target, count(rng, level) - 1, level)]
        scene = compose(rng, names, level, split)
        thing = the_thing(scene, target)
        phrases = words.referring_phrases(thing, scene.things)
        phrase = phrases[0] if rng.random() < 0.6 else pick(rng, phrases)
        question = pick(rng, FIND).format(phrase, "")
        return Draft((scene,), (render(scene),), question, thing.box, None, thing)


def _implicit(rng: np.random.Generator, kind: str) -> str:
    """An instruction that names a kind by its use or by the need it serves."""
    # The last wording speaks of a tool.
    needs = IMPLICIT_NEED[:-1] if kind in NO_TOOLS else IMPLICIT_NEED
    text = pick(rng, IMPLICIT_USE + needs)
    return text.format(use=KINDS[kind].use, need=KINDS[kind].need)


def lisa(rng: np.random.Generator, level: str, split: str) -> Draft:
    """One picture of three to five things, an instruction by use."""
    target = any_name(rng)
    kinds = tuple(k for k in KINDS if not answers_use(target[0], k))
    n = {"easy": 3, "medium": 4, "hard": 5}[level]
    names = [target, *distractors(rng, target, n - 1, level, kinds)]
    scene = compose(rng, names, level, split)
    thing = the_thing(scene, target)
    assert sum(answers_use(target[0], t.kind) for t in scene.things) == 1
    question = INSTRUCTION[0] + _implicit(rng, target[0]) + INSTRUCTION[1]
    return Draft((scene,), (render(scene),), question, thing.box, None, thing)


def _frames(
    rng: np.random.Generator, middle: Scene, ways: list[str], split: str
) -> list[Scene]:
    """The frames around ``middle``; thing i moves in direction ``ways[i]``.

    Things whose path would leave the picture are first moved to where it does not.
    """
    room = STEP * (FRAMES // 2)
    starts: list[Thing] = []
    for thing, way in zip(middle.things, ways, strict=True):
        at = {}
        for axis, go in zip("xy", DIRECTIONS[way], strict=True):
            margin = thing.size / 2 + room * abs(go)
            at[axis] = min(1 - margin, max(margin, getattr(thing, axis)))
        starts.append(replace(thing, **at))
    frames = []
    for frame in range(FRAMES):
        things = []
        for thing, way in zip(starts, ways, strict=True):
            dx, dy = (STEP * (frame - SCORED_FRAME) * go for go in DIRECTIONS[way])
            x, y = round(thing.x + dx, 3), round(thing.y + dy, 3)
            things.append(replace(thing, x=x, y=y))
        frames.append(settle(rng, replace(middle, things=tuple(things)), split))
    return frames


def video(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Five frames of moving things; asked by use, or by the way the thing moves."""
    while True:
        target = any_name(rng)
        by_use = rng.random() < 0.5
        kinds = tuple(k for k in KINDS if not (by_use and answers_use(target[0], k)))
        n = count(rng, level, most=4)
        names = [target, *distractors(rng, target, n - 1, level, kinds)]
        scene = lay(rng, names, level)
        index = scene.things.index(the_thing(scene, target))
        way = pick(rng, tuple(DIRECTIONS))
        other_ways = tuple(d for d in DIRECTIONS if d != way)
        ways = [pick(rng, other_ways) for _ in scene.things]
        ways[index] = way
        frames = _frames(rng, scene, ways, split)
        middle = frames[SCORED_FRAME]
        thing = middle.things[index]
        if hidden_share(middle, index) > 0.35 or not well_visible(frames[0], "hard"):
            continue
        if by_use:
            text = _implicit(rng, thing.kind)
        else:
            same = sum(t.kind == thing.kind for t in middle.things) > 1
            noun = thing.kind if same else "thing"
            text = pick(rng, MOTION).format(noun=noun, direction=way)
        question = VIDEO_INSTRUCTION[0] + text + VIDEO_INSTRUCTION[1]
        images = tuple(render(f) for f in frames)
        asked = SCORED_FRAME + 1
        return Draft(tuple(frames), images, question, thing.box, None, thing, asked)

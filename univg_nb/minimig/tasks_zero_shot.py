"""Tasks beside the ten: referring grounding in one picture, and two zero-shot families.

`single` corresponds to RefCOCO: a plain phrase, no chain asked for. `lisa` names the
thing only by what it is for; `video` has five frames, the box is that of the third. No
wording of the latter two occurs in training. Each task is a function of (rng, level,
split) that returns a `Draft`.
"""

from dataclasses import replace

import numpy as np

from univg_nb.data.zero_shot_formats import INSTRUCTION, SCORED_FRAME, VIDEO_INSTRUCTION
from univg_nb.minimig.compose import (
    Draft,
    choose,
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
    DIRECTIONS,
    FIND,
    IMPLICIT_NEED,
    IMPLICIT_USE,
    MOTION,
    list_referring_phrases,
)
from univg_nb.minimig.pictograms import KINDS, serves_use
from univg_nb.minimig.scenes import Scene, Thing

FRAMES = 5
NO_TOOLS = ("fish", "tree", "apple", "house")
STEP = 0.075  # how far a thing moves from frame to frame, in shares


def draw_single(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Draw one picture and a phrase that fits one thing in it."""
    labels = sample_labels(rng, level)
    scene = sample_scene(rng, labels, level, split)
    thing = scene.find(labels[0])
    phrases = list_referring_phrases(thing, scene.things)
    phrase = phrases[0] if rng.random() < 0.6 else choose(rng, phrases)
    return Draft([scene], choose(rng, FIND).format(phrase, ""), None, thing)


def _choose_implicit(rng: np.random.Generator, kind: str) -> str:
    """Return an instruction that names a kind by its use or by the need it serves."""
    # The last wording speaks of a tool.
    needs = IMPLICIT_NEED[:-1] if kind in NO_TOOLS else IMPLICIT_NEED
    text = choose(rng, IMPLICIT_USE + needs)
    return text.format(use=KINDS[kind].use, need=KINDS[kind].need)


def draw_lisa(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Draw one picture of three to five things and an instruction by use."""
    target = sample_label(rng)
    kinds = tuple(kind for kind in KINDS if not serves_use(kind, target[0]))
    n = {"easy": 3, "medium": 4, "hard": 5}[level]
    labels = [target, *sample_distractors(rng, target, n - 1, level, kinds)]
    scene = sample_scene(rng, labels, level, split)
    question = INSTRUCTION[0] + _choose_implicit(rng, target[0]) + INSTRUCTION[1]
    return Draft([scene], question, None, scene.find(target))


def _sample_frames(
    rng: np.random.Generator, middle: Scene, directions: list[str], split: str
) -> list[Scene]:
    """Return the frames around `middle`; thing i moves in `directions[i]`.

    Things whose path would leave the picture are first moved to where it does not.
    """
    path = STEP * (FRAMES // 2)
    starts: list[Thing] = []
    for thing, direction in zip(middle.things, directions, strict=True):
        at = {}
        for axis, sign in zip("xy", DIRECTIONS[direction], strict=True):
            margin = thing.size / 2 + path * abs(sign)
            at[axis] = min(1 - margin, max(margin, getattr(thing, axis)))
        starts.append(replace(thing, **at))
    frames = []
    for frame in range(FRAMES):
        things = []
        for thing, direction in zip(starts, directions, strict=True):
            dx, dy = (STEP * (frame - SCORED_FRAME) * s for s in DIRECTIONS[direction])
            x, y = round(thing.x + dx, 3), round(thing.y + dy, 3)
            things.append(replace(thing, x=x, y=y))
        frames.append(move_to_split(rng, replace(middle, things=tuple(things)), split))
    return frames


def draw_video(rng: np.random.Generator, level: str, split: str) -> Draft:
    """Draw five frames of moving things, and an instruction by use or by direction."""
    while True:
        target = sample_label(rng)
        by_use = rng.random() < 0.5
        kinds = tuple(k for k in KINDS if not (by_use and serves_use(k, target[0])))
        n = sample_num_things(rng, level, most=4)
        labels = [target, *sample_distractors(rng, target, n - 1, level, kinds)]
        scene = sample_scene(rng, labels, level)
        index = scene.things.index(scene.find(target))
        direction = choose(rng, tuple(DIRECTIONS))
        others = [d for d in DIRECTIONS if d != direction]
        directions = [choose(rng, others) for _ in scene.things]
        directions[index] = direction
        frames = _sample_frames(rng, scene, directions, split)
        middle = frames[SCORED_FRAME]
        if compute_occlusion(middle, index) <= 0.35 and is_visible(frames[0], "hard"):
            break
    thing = middle.things[index]
    if by_use:
        text = _choose_implicit(rng, thing.kind)
    else:
        shared = sum(t.kind == thing.kind for t in middle.things) > 1
        noun = thing.kind if shared else "thing"
        text = choose(rng, MOTION).format(noun=noun, direction=direction)
    question = VIDEO_INSTRUCTION[0] + text + VIDEO_INSTRUCTION[1]
    return Draft(frames, question, None, thing, SCORED_FRAME + 1)

"""Tasks beside the ten: referring grounding in one picture, and two zero-shot families.

`single` corresponds to RefCOCO: a plain phrase, no chain asked for; `single_cot` is one
picture with a chain (the released option `single_img_with_cot`), asked for by phrase,
by need or by use. `lisa` names the thing only by what it is for; `video` has five
frames, the box is that of the third. No wording of `lisa` and `video` occurs in
training. Each task is a function of a `Sampler` that returns a `Draft`.
"""

from dataclasses import replace

from univg_nb.data.zero_shot_formats import INSTRUCTION, SCORED_FRAME, VIDEO_INSTRUCTION
from univg_nb.minimig import phrases
from univg_nb.minimig.compose import MAX_OCCLUSION, Draft, Sampler
from univg_nb.minimig.pictograms import KINDS, serves_use
from univg_nb.minimig.scenes import Scene
from univg_nb.minimig.tasks_pairs import sample_need

FRAMES = 5
NO_TOOLS = ("fish", "tree", "apple", "house")
STEP = 0.075  # how far a thing moves from frame to frame, in shares


def draw_single(sampler: Sampler) -> Draft:
    """Draw one picture and a phrase that fits one thing in it."""
    labels = sampler.sample_labels()
    scene = sampler.sample_scene(labels)
    thing = scene.find(labels[0])
    fitting = phrases.list_referring_phrases(thing, scene.things)
    phrase = fitting[0] if sampler.is_true(0.6) else sampler.choose(fitting)
    return Draft([scene], sampler.choose(phrases.FIND).format(phrase, ""), None, thing)


def _draw_by_phrase(sampler: Sampler) -> Draft:
    """Draw a picture as `single` does, with a chain that tells the picture over."""
    draft = draw_single(sampler)
    return replace(draft, steps=phrases.describe_scenes(draft.scenes))


def _draw_by_need(sampler: Sampler) -> Draft:
    """Draw a picture whose place, or one thing in it, calls for another thing in it."""
    need, target, context, neutral = sample_need(sampler)
    labels = sampler.sample_labels(4, target, neutral, taken=[context])
    scene = sampler.sample_scene([context, *labels], need.place)
    thing = scene.find(target)
    reason = need.reason.format(phrases.add_article(thing.kind))
    wording = sampler.choose(phrases.SINGLE_REASONING[need.group])
    question = wording.format(kind=context[0])
    steps = f"{phrases.describe_scene(scene, 1)} {reason}"
    return Draft([scene], question, steps, thing)


def _draw_by_use(sampler: Sampler) -> Draft:
    """Draw a picture; ask for a thing by its use, in other words than `lisa` does."""
    target = sampler.sample_label()
    kinds = tuple(kind for kind in KINDS if not serves_use(kind, target[0]))
    scene = sampler.sample_scene(sampler.sample_labels(5, target, kinds))
    about, named = KINDS[target[0]], phrases.add_article(target[0])
    if sampler.is_true(0.5):
        question = sampler.choose(phrases.SINGLE_USE).format(use=about.use)
        reason = f"{named.capitalize()} {about.use}."
    else:
        question = sampler.choose(phrases.SINGLE_NEED).format(need=about.need)
        reason = f"To {about.need} you need {named}."
    steps = f"{phrases.describe_scene(scene, 1)} {reason}"
    return Draft([scene], question, steps, scene.find(target))


def draw_single_cot(sampler: Sampler) -> Draft:
    """Draw one picture and a question with a chain: by phrase, by need or by use."""
    draw = sampler.choose((_draw_by_phrase, _draw_by_need, _draw_by_use))
    return draw(sampler)


def _choose_implicit(sampler: Sampler, kind: str) -> str:
    """Return an instruction that names a kind by its use or by the need it serves."""
    # The last wording speaks of a tool.
    needs = phrases.IMPLICIT_NEED[:-1] if kind in NO_TOOLS else phrases.IMPLICIT_NEED
    text = sampler.choose(phrases.IMPLICIT_USE + needs)
    return text.format(use=KINDS[kind].use, need=KINDS[kind].need)


def draw_lisa(sampler: Sampler) -> Draft:
    """Draw one picture of three to five things and an instruction by use."""
    target = sampler.sample_label()
    kinds = tuple(kind for kind in KINDS if not serves_use(kind, target[0]))
    n = {"easy": 3, "medium": 4, "hard": 5}[sampler.level]
    labels = [target, *sampler.sample_distractors(target, n - 1, kinds)]
    scene = sampler.sample_scene(labels)
    question = INSTRUCTION[0] + _choose_implicit(sampler, target[0]) + INSTRUCTION[1]
    return Draft([scene], question, None, scene.find(target))


def _sample_frames(
    sampler: Sampler, middle: Scene, directions: list[str]
) -> list[Scene]:
    """Return the frames around `middle`; thing i moves in `directions[i]`.

    Things whose path would leave the picture are first moved to where it does not.
    """
    path = STEP * (FRAMES // 2)
    signs = [phrases.DIRECTIONS[direction] for direction in directions]
    starts = []
    for thing, (right, down) in zip(middle.things, signs, strict=True):
        x_margin, y_margin = (thing.size / 2 + path * abs(s) for s in (right, down))
        x = min(1 - x_margin, max(x_margin, thing.x))
        y = min(1 - y_margin, max(y_margin, thing.y))
        starts.append((x, y, right, down))
    frames = []
    for frame in range(FRAMES):
        step = STEP * (frame - SCORED_FRAME)
        points = [(x + step * right, y + step * down) for x, y, right, down in starts]
        frames.append(sampler.move_to_split(middle.move(points)))
    return frames


def draw_video(sampler: Sampler) -> Draft:
    """Draw five frames of moving things, and an instruction by use or by direction."""
    while True:
        target = sampler.sample_label()
        by_use = sampler.is_true(0.5)
        kinds = tuple(k for k in KINDS if not (by_use and serves_use(k, target[0])))
        labels = sampler.sample_labels(4, target, kinds)
        scene = sampler.sample_scene(labels, any_split=True)
        index = scene.things.index(scene.find(target))
        direction = sampler.choose(tuple(phrases.DIRECTIONS))
        others = [d for d in phrases.DIRECTIONS if d != direction]
        directions = [sampler.choose(others) for _ in scene.things]
        directions[index] = direction
        frames = _sample_frames(sampler, scene, directions)
        middle = frames[SCORED_FRAME]
        thing = middle.things[index]
        visible = middle.compute_occlusion(thing) <= 0.35
        if visible and frames[0].max_occlusion <= MAX_OCCLUSION["hard"]:
            break
    if by_use:
        text = _choose_implicit(sampler, thing.kind)
    else:
        shared = sum(t.kind == thing.kind for t in middle.things) > 1
        noun = thing.kind if shared else "thing"
        text = sampler.choose(phrases.MOTION).format(noun=noun, direction=direction)
    question = VIDEO_INSTRUCTION[0] + text + VIDEO_INSTRUCTION[1]
    return Draft(frames, question, None, thing, SCORED_FRAME + 1)

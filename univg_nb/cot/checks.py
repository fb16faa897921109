"""Making reasoning chains: what a teacher is asked, and the checks of its replies.

The steps of the paper (PF sec. 2.1): a teacher that is given the true box writes three
candidates, a second call selects one. The wording is ours: of the authors' prompts
most were never published. Requests are sent by `univg_nb.cot.teacher`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from univg_nb.data.boxes import find_boxes, format_box
from univg_nb.data.sample import GroundingSample, find_target_image, image_numbers

MIN_CHARS = 20  # less is no reasoning
MAX_CHARS = 2000  # about 500 tokens; the released stage 2 cuts replies at 256
KINDS = ("format", "answer", "coordinates", "length", "language", "image", "place")

# ---------------------------------------------------------------- what is asked

TEACHER = """You are given {count} images and a question about them.
Question: {question}
The true box is {answer}, in thousandths of the image's width and height.
{others}Behave as if you had not been told the box. Look at every image, and write
step by step how one gets from the question to the thing that is meant.
{steps}
End with a sentence that names the target, the number of its image (as in "image 2")
and roughly where in it the target is. Write in English, in at most 150 words. Do not
write coordinates that the question does not contain. Reply with nothing but
<think>your steps</think><answer>{answer}</answer>"""

# For the seven parts of MGrounding-630k, by the names of their folders (PF sec. 2.1).
STEPS = {
    "common_object": "Name the main things in each image, find out which one is in all "
    "of them, then look for it in the image that is asked about.",
    "difference": "Go through the images area by area and compare them. Say what has "
    "come, gone or changed, leave aside what only the viewpoint or the light changes, "
    "and place the difference.",
    "free_form": "Say what the question wants to know and which image gives the clue. "
    "Draw the conclusion in words, then look for what fits it.",
    "group_grounding": "Take the description apart: what kind of thing, which "
    "features, beside what. Test it on each image in turn, and say why the others drop "
    "out.",
    "object_tracking": "Describe the thing at the given box in its first image well "
    "enough to know it again. Follow how it moves and changes from image to image, up "
    "to the one that is asked about.",
    "referring_grounding": "Describe the thing that the reference image shows: kind, "
    "colour, shape, marks. Then find the thing with these features in the other image, "
    "beside similar ones.",
    "region_locating": "Describe what the cut-out shows and what its edges cut off, "
    "then look for this content in the whole picture.",
}
_FAMILY = {
    "diff": "difference",
    "view_diff": "difference",
    "multi_view": "object_tracking",
    "region": "region_locating",
    "refer_grounding": "referring_grounding",
    "group": "group_grounding",
}

SELECTOR = """You are given {count} images, a question about them, and replies to it.
Question: {question}
The true box is {answer}, in thousandths of the image's width and height.
{replies}
Which reply reasons best? Look at the images: every statement must be true of them,
each step must follow, the reasoning must lead to the thing in the true box, and it
must not sound as if the box had been known. Reply with nothing but its number."""


def family(task: str) -> str:
    """The part of MGrounding-630k whose steps suit a task; any other is free_form."""
    name = re.sub(r"[\s-]++", "_", task.strip().lower())
    name = _FAMILY.get(name, name)
    return name if name in STEPS else "free_form"


def teacher_prompt(sample: GroundingSample, others: str = "") -> str:
    """What the teacher reads beside the images; ``others`` as from `other_turns`."""
    return TEACHER.format(
        count=len(sample.images),
        question=sample.question,
        answer=format_box(sample.answer),
        others=f"What else was asked about them: {others}\n" if others else "",
        steps=STEPS[family(sample.task)],
    )


def other_turns(samples: Iterable[GroundingSample]) -> dict[str, str]:
    """By sample id, the other questions and answers of its MGrounding dialogue.

    A multi-turn row's samples have ids "row/turn" (see `samples`); samples that stand
    alone are left out. Turns without a box are not samples and so not among them.
    """
    rows: dict[str, list[GroundingSample]] = {}
    for sample in samples:
        row, slash, turn = sample.id.rpartition("/")
        if slash and turn.isdigit():
            rows.setdefault(row, []).append(sample)
    return {
        one.id: " ".join(
            f"{s.question} {format_box(s.answer)}" for s in row if s != one
        )
        for row in rows.values()
        if len(row) > 1
        for one in row
    }


def selector_prompt(sample: GroundingSample, replies: Sequence[str]) -> str:
    """What the selector reads beside the images; replies are numbered from 1."""
    listed = [f"Reply {n}: {text}" for n, text in enumerate(replies, start=1)]
    return SELECTOR.format(
        count=len(sample.images),
        question=sample.question,
        answer=format_box(sample.answer),
        replies="\n".join(listed),
    )


def selected(text: str, count: int) -> int | None:
    """Index (from 0) of the reply the selector names; None if it names none of them."""
    named = {int(n) for n in re.findall(r"(?<!\d)\d{1,3}(?!\d)", text)}
    possible = named & set(range(1, count + 1))
    return possible.pop() - 1 if named == possible and len(named) == 1 else None


# ---------------------------------------------------------------- checks

# Possessive quantifiers: linear time on whatever a teacher sends.
_REPLY = re.compile(
    r"\s*+<think>((?:(?!</?think>|</?answer>).)*+)</think>\s*+"
    r"<answer>\(\d++,\s*+\d++\),\s*+\(\d++,\s*+\d++\)</answer>\s*+",
    re.DOTALL,
)
# Two numbers that stand as a point, or four in a list, decimals too.
_POINT = re.compile(r"[(\[]\s*+(\d++(?:\.\d++)?+)\s*+,\s*+(\d++(?:\.\d++)?+)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
# A place in the picture ("at the top left", "on the right side of the image"), not one
# beside another thing ("to the left of the cup", "the left cup").
_PLACE = re.compile(
    r"\b(?:at|in|on|near|towards?) (?:the )?(?:far |very )?"
    r"((?:top|bottom|upper|lower|left|right)(?:[ -](?:left|right))?)"
    r"(?:[ -]hand)?(?: (?:side|corner|half|part|edge))?"
    r"(?=[.,;)]|$| (?:of|in) (?:the |this )?(?:image|picture|photo|frame))",
    re.IGNORECASE,
)
# Words that every English text of some length has, and few other languages.
_ENGLISH = frozenset(
    "a an and are as at both for from has have in is it its no not of on one so that "
    "the them there these they this to two where which with".split()
)
_WORD = re.compile(r"\w++")
_ENGLISH_SHARE = 0.12
_TOLERANCE = 50  # thousandths: "left" of a thing a little right of the middle


class ChainProblem(NamedTuple):
    """One failed check: a short kind to count by, and what was seen."""

    kind: str
    detail: str


def check_chain(sample: GroundingSample, reply: str) -> list[ChainProblem]:
    """Problems of a reply as a training target; an empty list if it passes.

    The checks know the question, the number of images and the true box, never what the
    images show. Kinds (`KINDS`):

    - ``format``: not exactly ``<think>…</think><answer>(x1,y1),(x2,y2)</answer>``
    - ``answer``: the box in ``<answer>`` is missing or not the ground truth, digit for
      digit (the teacher was given it and had only to copy it)
    - ``coordinates``: the thinking names a point that the question does not give: the
      teacher tells the answer it was asked to hide. Any part of the ground truth counts
    - ``length``: thinking under MIN_CHARS or over MAX_CHARS characters
    - ``language``: not English, by its small words, while the question is
    - ``image``: of several images none is named, or one that is not there, or the last
      sentence that names any leaves out the one that is asked for (`find_target_image`;
      where question and task leave it open, a wrong image goes unseen)
    - ``place``: that sentence puts the target at the left, right, top or bottom of its
      image, and the box is in the other half. Only there: a side confused earlier in
      the chain, or one relative to another thing, goes unseen

    Never raises on a reply. The sample must be one that wants a chain (``cot=True``).
    """
    if not sample.cot:
        raise ValueError(
            f"sample {sample.id} is single-image (cot=False) and takes no chain; "
            "leave it out of chain construction"
        )
    thinking = thinking_of(reply)
    found = {
        "format": "" if _REPLY.fullmatch(reply) else f"reply is {reply[:80]!r}",
        "answer": _answer(sample, reply),
        "coordinates": _leak(sample, thinking),
        "length": _length(thinking),
        "language": _language(sample, thinking),
        "image": _image(sample, thinking),
        "place": _place(sample, thinking),
    }
    return [ChainProblem(kind, detail) for kind, detail in found.items() if detail]


def thinking_of(reply: str) -> str:
    """What stands in <think>, as far as it goes; the reply before <answer> if none."""
    before, opened, after = reply.partition("<think>")
    text = after if opened else before
    return text.partition("</think>")[0].partition("<answer>")[0]


def _answer(sample: GroundingSample, reply: str) -> str:
    answer = reply.partition("<answer>")[2].partition("</answer>")[0]
    if find_boxes(answer) == [sample.answer]:
        return ""
    return f"{answer[:60]!r} against {format_box(sample.answer)}"


def _points(text: str) -> set[tuple[float, float]]:
    return {(float(x[:32]), float(y[:32])) for x, y in _POINT.findall(text)}


def _leak(sample: GroundingSample, thinking: str) -> str:
    leaked = _points(thinking) - _points(sample.question)
    return f"points {sorted(leaked)[:4]} in the thinking" if leaked else ""


def _length(thinking: str) -> str:
    count = len(thinking.strip())
    if MIN_CHARS <= count <= MAX_CHARS:
        return ""
    return f"{count} characters, {MIN_CHARS} to {MAX_CHARS} asked"


def _english_share(text: str) -> float:
    words = _WORD.findall(text.lower())
    return sum(word in _ENGLISH for word in words) / max(1, len(words))


def _language(sample: GroundingSample, thinking: str) -> str:
    """Nothing to say of a thinking too short to tell, or of a question in other words.

    A script without blanks makes few, long words, none of them English.
    """
    if len(thinking.strip()) < MIN_CHARS:
        return ""
    share = _english_share(thinking)
    if share >= _ENGLISH_SHARE or _english_share(sample.question) < _ENGLISH_SHARE:
        return ""
    return f"{share:.0%} of the words are small English ones: {thinking.strip()[:60]!r}"


def _conclusion(thinking: str) -> str:
    """The last sentence that names an image; "" if none does."""
    for sentence in reversed(_SENTENCE_END.split(thinking)):
        if image_numbers(sentence):
            return sentence
    return ""


def _image(sample: GroundingSample, thinking: str) -> str:
    count = len(sample.images)
    if count == 1 or len(thinking.strip()) < MIN_CHARS:
        return ""
    missing = [n for n in image_numbers(thinking) if not 1 <= n <= count]
    if missing:
        return f"names image {missing[0]} of {count}"
    last = _conclusion(thinking)
    if not last:
        return f"names none of {count} images"
    asked = find_target_image(sample)
    if asked is None or asked in image_numbers(last):
        return ""
    return f"asked is image {asked}, the chain ends {last[-60:]!r}"


def _place(sample: GroundingSample, thinking: str) -> str:
    last = _conclusion(thinking) if len(sample.images) > 1 else thinking
    if len(set(image_numbers(last))) > 1:
        return ""  # which of the two the place belongs to cannot be told
    x1, y1, x2, y2 = sample.answer
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    low, high = 500 - _TOLERANCE, 500 + _TOLERANCE
    wrong = {
        "left": x > high,
        "right": x < low,
        "top": y > high,
        "upper": y > high,
        "bottom": y < low,
        "lower": y < low,
    }
    for place in _PLACE.findall(last):
        if any(wrong[word] for word in re.split("[ -]", place.lower())):
            return f"{place!r} of a box around ({x:g},{y:g})"
    return ""

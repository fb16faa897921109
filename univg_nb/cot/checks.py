"""Reasoning chains: what a teacher is asked, and the checks of its replies.

As in the paper (docs/paper_facts.md#chains), a teacher that is given the true box
writes three candidates, and a second call selects one. The prompts are in
`assets/cot_prompts.yaml`; `univg_nb.cot.teacher` sends the requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from univg_nb import io
from univg_nb.data.boxes import find_boxes, format_box
from univg_nb.data.sample import GroundingSample, find_target_image, image_numbers

MIN_CHARS = 20  # less is no reasoning
MAX_CHARS = 2000  # about 500 tokens; the released stage 2 cuts replies at 256
_MAX_REPLY = 5 * MAX_CHARS  # the rest of a longer reply is not read
KINDS = ("format", "answer", "coordinates", "length", "language", "image", "place")

_PROMPTS = io.read_asset("cot_prompts.yaml")
TEACHER: str = _PROMPTS["teacher"]
SELECTOR: str = _PROMPTS["selector"]
STEPS: dict[str, str] = _PROMPTS["steps"]  # by the parts of MGrounding-630k


def get_part(task: str) -> str:
    """Return the part of MGrounding-630k whose steps suit a task; else "free_form"."""
    name = re.sub(r"[\s-]+", "_", task.strip().lower())
    name = _PROMPTS["parts"].get(name, name)
    return name if name in STEPS else "free_form"


def _list_fields(sample: GroundingSample) -> dict[str, Any]:
    box = format_box(sample.answer)
    return {"count": len(sample.images), "question": sample.question, "answer": box}


def make_teacher_prompt(sample: GroundingSample, others: str = "") -> str:
    """Return the text that the teacher gets with the images; it has the true box.

    `others` are other turns of its dialogue, as from `collect_other_turns`.
    """
    others = f"What else was asked about them: {others}\n" if others else ""
    steps = STEPS[get_part(sample.task)]
    return TEACHER.format(**_list_fields(sample), others=others, steps=steps)


def collect_other_turns(samples: Iterable[GroundingSample]) -> dict[str, str]:
    """Return, by sample id, the other questions and answers of its dialogue.

    In MGrounding-630k the samples of one dialogue have ids "row/turn". Samples of rows
    with one turn are left out of the result; turns without a box are not samples.
    """
    # An id may end in a number without being a turn's: a dialogue has the same images.
    rows: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
    for sample in samples:
        row, slash, turn = sample.id.rpartition("/")
        if slash and turn.isdigit():
            text = f"{sample.question} {format_box(sample.answer)}"
            rows.setdefault((row, sample.images), {})[sample.id] = text
    return {
        id: " ".join(text for other, text in row.items() if other != id)
        for row in rows.values()
        if len(row) > 1
        for id in row
    }


def make_selector_prompt(sample: GroundingSample, replies: Sequence[str]) -> str:
    """Return the text that the selector gets with the images: `replies` from 1 on."""
    listed = [f"Reply {n}: {text}" for n, text in enumerate(replies, start=1)]
    return SELECTOR.format(**_list_fields(sample), replies="\n".join(listed))


def parse_selection(text: str, count: int) -> int | None:
    """Return the index (from 0) of the one of `count` replies that the selector names.

    None if its text names none of them, several, or a number that is not there.
    """
    named = set(re.findall(r"\d+", text))
    number = named.pop() if len(named) == 1 else ""
    numbers = [str(n) for n in range(1, count + 1)]
    return numbers.index(number) if number in numbers else None


_REPLY = re.compile(
    r"\s*<think>((?:(?!</?think>|</?answer>).)*)</think>\s*"
    r"<answer>\(\d+,\s*\d+\),\s*\(\d+,\s*\d+\)</answer>\s*",
    re.DOTALL,
)
# Two numbers written as a point, or four in a list, decimals too.
_POINT = re.compile(r"[(\[]\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)")
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
_ENGLISH = re.compile(
    r"\b(?:an?|and|are|as|at|both|for|from|has|have|i[nst]|its|no|not|of|on|one|so|that|"
    r"the|them|there|these|they|this|to|two|where|which|with)\b",
    re.IGNORECASE,
)
_ENGLISH_SHARE = 0.12
_TOLERANCE = 50  # thousandths: "left" of a thing slightly right of the middle


class ChainProblem(NamedTuple):
    """One failed check: its kind (one of `KINDS`), and what was seen."""

    kind: str
    detail: str


def require_chain(sample: GroundingSample) -> None:
    """Raise ValueError for a single-image sample, which takes no chain."""
    if not sample.cot:
        raise ValueError(
            f"sample {sample.id} is single-image (cot=False) and takes no chain; "
            "leave it out of chain construction"
        )


def check_chain(sample: GroundingSample, reply: str) -> list[ChainProblem]:
    """Return the problems of a reply as a training target; none if it passes.

    The checks know the question, the number of images, the target's image and the true
    box, but never what the images show. Kinds (`KINDS`):

    - `format`: not exactly `<think>...</think><answer>(x1,y1),(x2,y2)</answer>`.
    - `answer`: the box in `<answer>` is missing or differs from the true one, which the
      teacher was given and had to copy.
    - `coordinates`: the thinking contains a point that the question does not: it tells
      the answer that the teacher was asked to hide. Any part of the true box counts.
    - `length`: thinking under MIN_CHARS or over MAX_CHARS characters.
    - `language`: not English, judged by small words, while the question is.
    - `image`: of several images none is named, or one that is not there, or the last
      sentence that names any leaves out the target's (`find_target_image`; where that
      is unknown, a wrong image is not seen).
    - `place`: that sentence puts the target at the left, right, top or bottom of its
      image, and the box is in the other half. A side confused earlier in the chain, or
      one relative to another thing, is not seen.

    Raises ValueError if the sample takes no chain; never because of the reply.
    """
    require_chain(sample)
    reply = reply[:_MAX_REPLY]
    thinking = extract_thinking(reply)
    answer = reply.partition("<answer>")[2].partition("</answer>")[0]
    leaked = _find_points(thinking) - _find_points(sample.question)
    length = len(thinking.strip())
    found = dict.fromkeys(KINDS, "")
    if not _REPLY.fullmatch(reply):
        found["format"] = f"reply is {reply[:80]!r}"
    if find_boxes(answer) != [sample.answer]:
        found["answer"] = f"{answer[:60]!r} against {format_box(sample.answer)}"
    if leaked:
        found["coordinates"] = f"points {sorted(leaked)[:4]} in the thinking"
    if not MIN_CHARS <= length <= MAX_CHARS:
        found["length"] = f"{length} characters, {MIN_CHARS} to {MAX_CHARS} asked"
    if length >= MIN_CHARS:
        found["language"] = _check_language(sample, thinking)
        found["image"] = _check_image(sample, thinking)
    found["place"] = _check_place(sample, thinking)
    return [ChainProblem(kind, detail) for kind, detail in found.items() if detail]


def extract_thinking(reply: str) -> str:
    """Return the text in <think>, closed or not, or without it all before <answer>."""
    before, opened, after = reply.partition("<think>")
    text = after if opened else before
    return text.partition("</think>")[0].partition("<answer>")[0]


def _find_points(text: str) -> set[tuple[float, float]]:
    return {(float(x), float(y)) for x, y in _POINT.findall(text)}


def _check_language(sample: GroundingSample, thinking: str) -> str:
    """Compare the shares of small English words in thinking and question.

    A script without blanks makes few, long words, none of them English.
    """
    share, question_share = (
        len(_ENGLISH.findall(text)) / max(1, len(re.findall(r"\w+", text)))
        for text in (thinking, sample.question)
    )
    if share >= _ENGLISH_SHARE or question_share < _ENGLISH_SHARE:
        return ""
    return f"{share:.0%} of the words are small English ones: {thinking.strip()[:60]!r}"


def _find_conclusion(thinking: str) -> str:
    """Return the last sentence that names an image; "" if none does."""
    sentences = reversed(_SENTENCE_END.split(thinking))
    return next((s for s in sentences if image_numbers(s)), "")


def _check_image(sample: GroundingSample, thinking: str) -> str:
    count = len(sample.images)
    if count == 1:
        return ""
    missing = [n for n in image_numbers(thinking) if not 1 <= n <= count]
    if missing:
        return f"names image {missing[0]} of {count}"
    conclusion = _find_conclusion(thinking)
    if not conclusion:
        return f"names none of {count} images"
    target = find_target_image(sample)
    if target is None or target in image_numbers(conclusion):
        return ""
    return f"the target is in image {target}, the chain ends {conclusion[-60:]!r}"


def _check_place(sample: GroundingSample, thinking: str) -> str:
    conclusion = _find_conclusion(thinking) if len(sample.images) > 1 else thinking
    if len(set(image_numbers(conclusion))) > 1:
        return ""  # it is unknown which of the images the place belongs to
    x1, y1, x2, y2 = sample.answer
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    low, high = 500 - _TOLERANCE, 500 + _TOLERANCE
    wrong = {"left": x > high, "right": x < low}
    wrong |= {"top": y > high, "upper": y > high, "bottom": y < low, "lower": y < low}
    for place in _PLACE.findall(conclusion):
        if any(wrong[word] for word in re.split("[ -]", place.lower())):
            return f"{place!r} of a box around ({x:g},{y:g})"
    return ""

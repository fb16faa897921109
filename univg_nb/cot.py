"""Checks of a reasoning chain that a teacher wrote (PF sec. 2.1)."""

from __future__ import annotations

import re
from typing import NamedTuple

from univg_nb.boxes import find_boxes, format_box
from univg_nb.rows import GroundingSample

MIN_CHARS = 20  # less is no reasoning
MAX_CHARS = 2000  # about 500 tokens; the released stage 2 cuts replies at 256

# Possessive quantifiers: linear time on whatever a teacher sends.
_REPLY = re.compile(
    r"\s*+<think>((?:(?!</?think>|</?answer>).)*+)</think>\s*+"
    r"<answer>\(\d++,\s*+\d++\),\s*+\(\d++,\s*+\d++\)</answer>\s*+",
    re.DOTALL,
)
# Two numbers that stand as a point, or four in a list, decimals too.
_POINT = re.compile(r"[(\[]\s*+(\d++(?:\.\d++)?+)\s*+,\s*+(\d++(?:\.\d++)?+)")


class ChainProblem(NamedTuple):
    """One failed check: a short kind to count by, and what was seen."""

    kind: str
    detail: str


def _points(text: str) -> set[tuple[float, float]]:
    return {(float(x[:32]), float(y[:32])) for x, y in _POINT.findall(text)}


def _thinking(reply: str) -> str:
    """What stands in <think>, as far as it goes; the reply before <answer> if none."""
    before, opened, after = reply.partition("<think>")
    text = after if opened else before
    return text.partition("</think>")[0].partition("<answer>")[0]


def check_chain(sample: GroundingSample, reply: str) -> list[ChainProblem]:
    """Problems of a reply as a training target; an empty list if it passes.

    Kinds:

    - ``format``: not exactly ``<think>…</think><answer>(x1,y1),(x2,y2)</answer>``
    - ``answer``: the box in ``<answer>`` is missing or not the ground truth, digit for
      digit (the teacher was given it and had only to copy it)
    - ``coordinates``: the thinking names a point that the question does not give: the
      teacher tells the answer it was asked to hide. Any part of the ground truth counts
    - ``length``: thinking under MIN_CHARS or over MAX_CHARS characters

    Never raises on a reply. The sample must be one that wants a chain (``cot=True``).
    """
    if not sample.cot:
        raise ValueError(
            f"sample {sample.id} is single-image (cot=False) and takes no chain; "
            "leave it out of chain construction"
        )
    problems = []
    if not _REPLY.fullmatch(reply):
        problems.append(ChainProblem("format", f"reply is {reply[:80]!r}"))
    answer = reply.partition("<answer>")[2].partition("</answer>")[0]
    boxes = find_boxes(answer)
    if boxes != [sample.answer]:
        detail = f"{answer[:60]!r} against {format_box(sample.answer)}"
        problems.append(ChainProblem("answer", detail))
    thinking = _thinking(reply)
    leaked = _points(thinking) - _points(sample.question)
    if leaked:
        detail = f"points {sorted(leaked)[:4]} in the thinking"
        problems.append(ChainProblem("coordinates", detail))
    if not MIN_CHARS <= len(thinking.strip()) <= MAX_CHARS:
        detail = f"{len(thinking.strip())} characters, {MIN_CHARS} to {MAX_CHARS} asked"
        problems.append(ChainProblem("length", detail))
    return problems

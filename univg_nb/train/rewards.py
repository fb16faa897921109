"""The two rewards of stage 2: IoU with the answer, and a well-formed reply.

The values equal the released ones (docs/paper_facts.md#rewards). The `cot` flag of each
item decides which format it is held to; the released code looked at the first item of
the batch and judged all by it (docs/paper_facts.md#t1).

Both functions have TRL's signature for rewards: keyword arguments, one list entry for
each completion, and further columns that are ignored.
"""

import re
from collections.abc import Sequence
from typing import Any

from univg_nb.data import boxes

Completion = str | Sequence[dict[str, Any]]  # messages, of which the last is the reply

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = re.compile(r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)")
_THINK_THEN_ANSWER = re.compile(
    r"<think>.*?</think>\s*<answer>" + _BOX.pattern + r"</answer>$", re.DOTALL
)


def _get_text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def rewarded_box(text: str, cot: bool) -> list[float] | None:
    """Read the box that the reward judges: the FIRST one inside the FIRST answer tag.

    Without a requested chain (`cot`) it is the first box anywhere. This is the training
    rule; scoring uses `boxes.parse_box`, which takes the last. The coordinates are as
    written, also beyond 1000 or inverted.
    """
    if cot:
        answer = _ANSWER.search(text)
        if answer is None:
            return None
        text = answer.group(1)
    found = _BOX.search(text)  # as floats, for which no number is too long
    return None if found is None else [float(number) for number in found.groups()]


def pixel_inclusive_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute the IoU in 0..1 of two boxes as the released reward counts it.

    Its pixel-inclusive arithmetic is plain IoU, except that an overlap at most one unit
    (of 1000) wide or high counts 0.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 1 or height <= 1:
        return 0.0
    return boxes.iou(a, b)


def iou_reward(
    completions: Sequence[Completion],
    answer: Sequence[Sequence[float]],
    cot: Sequence[bool],
    **_: Any,
) -> list[float]:
    """Compute the accuracy reward of each completion.

    Args:
        completions: N replies.
        answer: N boxes (x1, y1, x2, y2) on 0..1000.
        cot: N flags, False for items that were asked for a bare box.

    Returns:
        N values in 0..1; a reply without a readable box gets 0.

    Raises:
        ValueError: if a column has another length.
    """
    rewards = []
    for completion, target, chain in zip(completions, answer, cot, strict=True):
        box = rewarded_box(_get_text(completion), chain)
        rewards.append(0.0 if box is None else pixel_inclusive_iou(box, target))
    return rewards


def format_reward(
    completions: Sequence[Completion], cot: Sequence[bool], **_: Any
) -> list[float]:
    """Compute the format reward of each completion, 0.0 or 1.0.

    Args:
        completions: N replies.
        cot: N flags. True: a think pass, then an answer tag that holds one box and
            nothing else, at the end of the reply. Text before `<think>` and an empty
            pass are allowed, blanks just inside the answer tag are not. False: a box
            anywhere.

    Raises:
        ValueError: if `cot` has another length.
    """
    patterns = [_THINK_THEN_ANSWER if chain else _BOX for chain in cot]
    pairs = zip(patterns, map(_get_text, completions), strict=True)
    return [1.0 if pattern.search(text) else 0.0 for pattern, text in pairs]

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

Completion = str | Sequence[dict[str, Any]]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = re.compile(r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)")
_THINK_THEN_ANSWER = re.compile(
    r"<think>.*?</think>\s*<answer>" + _BOX.pattern + r"</answer>$", re.DOTALL
)
_MAX_DIGITS = 12


def _get_text(completion: Completion) -> str:
    """Return the text of a string, or of messages whose last one is the reply."""
    if isinstance(completion, str):
        return completion
    if completion and isinstance(completion[-1], dict):
        content = completion[-1].get("content")
        if isinstance(content, str):
            return content
    raise ValueError(
        f"completion {completion!r} is neither a string nor a list of "
        '{"role": "assistant", "content": str} messages'
    )


def rewarded_box(text: str, cot: bool) -> tuple[int, int, int, int] | None:
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
    found = _BOX.search(text)
    # A box with a number this long has an IoU below 1e-9, and Python refuses to
    # convert the very long ones.
    if found is None or any(len(n.lstrip("0")) > _MAX_DIGITS for n in found.groups()):
        return None
    x1, y1, x2, y2 = map(int, found.groups())
    return x1, y1, x2, y2


def pixel_inclusive_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute the IoU in 0..1 of two boxes as the released reward counts it.

    Its pixel-inclusive arithmetic is plain IoU, except that an overlap at most one unit
    (of 1000) wide or high counts 0.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 1 or height <= 1:
        return 0.0
    return boxes.iou((a[0], a[1], a[2], a[3]), (b[0], b[1], b[2], b[3]))


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
    _check_lengths(completions, answer=answer, cot=cot)
    texts = map(_get_text, completions)
    found = [rewarded_box(*pair) for pair in zip(texts, cot, strict=True)]
    return [
        0.0 if box is None else pixel_inclusive_iou(box, target)
        for box, target in zip(found, answer, strict=True)
    ]


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
    _check_lengths(completions, cot=cot)
    patterns = [_THINK_THEN_ANSWER if chain_asked else _BOX for chain_asked in cot]
    return [
        float(pattern.search(_get_text(completion)) is not None)
        for pattern, completion in zip(patterns, completions, strict=True)
    ]


def _check_lengths(completions: Sequence[Completion], **columns: Sequence) -> None:
    for name, values in columns.items():
        if len(values) != len(completions):
            raise ValueError(
                f"{len(completions)} completions but {len(values)} values of {name!r}: "
                "the training rows need that column, one value per row"
            )

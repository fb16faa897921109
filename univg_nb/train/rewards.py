"""The two rewards of stage 2: IoU with the answer, and a well-formed reply.

Per-item values equal the released ones (PF sec. 4). Each item's own `cot` flag decides
which format it is held to; the released code looked at the first item of the batch and
judged all by it (PF sec. 9, T1).

Both functions have the signature TRL calls (`trl/trainer/grpo_trainer.py`,
`_calculate_rewards`): keyword arguments, one list entry per completion, and extra
columns that are ignored.
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


def completion_text(completion: Completion) -> str:
    """Text of one completion: a string, or chat messages whose last one is the reply.

    Raises ValueError when it is neither.
    """
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
    """The box the reward judges: the FIRST box inside the FIRST answer tag.

    Without a requested chain (`cot=False`, the single-image items) it is the first box
    anywhere. This is the training rule; scoring uses `boxes.parse_box`, which takes the
    last. Coordinates come as written, also beyond 1000 or inverted. None: no box.
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
    """IoU in 0..1 as the released reward counts it.

    Its pixel-inclusive arithmetic is plain IoU except that an overlap at most one unit
    (of 1000) wide or high counts 0 (PF sec. 4); so `boxes.iou` does the rest.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 1 or height <= 1:
        return 0.0
    return boxes.iou(tuple(a), tuple(b))


def iou_reward(
    completions: Sequence[Completion],
    answer: Sequence[Sequence[float]],
    cot: Sequence[bool],
    **_: Any,
) -> list[float]:
    """Accuracy reward, one float in 0..1 per completion; no readable box gives 0.

    completions: N replies; answer: N boxes (x1, y1, x2, y2) on 0..1000; cot: N flags,
    False for items that were asked for a bare box. Source: PF sec. 4, R_acc.
    """
    _check_lengths(completions, answer=answer, cot=cot)
    rewards = []
    for completion, target, chain_asked in zip(completions, answer, cot, strict=True):
        box = rewarded_box(completion_text(completion), chain_asked)
        rewards.append(0.0 if box is None else pixel_inclusive_iou(box, target))
    return rewards


def format_reward(
    completions: Sequence[Completion], cot: Sequence[bool], **_: Any
) -> list[float]:
    """Format reward, 0.0 or 1.0 per completion.

    With `cot`: a think pass, then an answer tag that holds one box and nothing else,
    ending the reply. Junk before `<think>` and an empty pass are allowed, blanks just
    inside the answer tag are not. Without: a box anywhere. Source: PF sec. 4, R_fmt.
    """
    _check_lengths(completions, cot=cot)
    patterns = [_THINK_THEN_ANSWER if chain_asked else _BOX for chain_asked in cot]
    return [
        float(pattern.search(completion_text(completion)) is not None)
        for pattern, completion in zip(patterns, completions, strict=True)
    ]


def _check_lengths(completions: Sequence[Completion], **columns: Sequence) -> None:
    for name, values in columns.items():
        if len(values) != len(completions):
            raise ValueError(
                f"{len(completions)} completions but {len(values)} values of {name!r}: "
                "the training rows need that column, one value per row"
            )

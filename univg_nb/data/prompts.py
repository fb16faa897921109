"""What the model is asked and what it should reply (PF sec. 9, 2.2)."""

from __future__ import annotations

from typing import Any

from univg_nb.data.boxes import Box, format_box
from univg_nb.data.sample import GroundingSample

__all__ = [
    "COT_SUFFIX",
    "DIRECT_SUFFIX",
    "SINGLE_IMAGE_PREFIX",
    "STYLES",
    "messages",
    "reply_text",
    "user_text",
]

# The request the baselines get, spelling included: their published numbers rest on it.
DIRECT_SUFFIX = (
    " Format:<|box_start|>(x1,y1),(x2,y2)<|box_end|>. Don't generate addtional words."
)
STYLES = ("univg", "direct", "plain")


def user_text(sample: GroundingSample, style: str = "univg") -> str:
    """The text of the user turn, images not included.

    Styles: ``univg`` asks for think and answer, or, for a sample with ``cot=False``,
    puts the single-image sentence in front; ``direct`` is the baselines' request for a
    box alone; ``plain`` is the question as it is. The sample itself is never changed
    (PF sec. 9, E5). Raises ValueError for an unknown style.
    """
    if style == "univg":
        return prompt_text(sample.question, sample.cot)
    if style == "direct":
        return sample.question + DIRECT_SUFFIX
    if style == "plain":
        return sample.question
    raise ValueError(f"prompt style {style!r} is unknown; use one of {STYLES}")


def messages(sample: GroundingSample, style: str = "univg") -> list[dict[str, Any]]:
    """The chat: one user turn, an image part for each image, then the text.

    Image parts are placeholders; the pictures go to the processor separately, opened by
    `images.open_image`. No system turn: the chat template adds the model's own.
    """
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in sample.images]
    parts.append({"type": "text", "text": user_text(sample, style)})
    return [{"role": "user", "content": parts}]


def reply_text(sample: GroundingSample, cot: bool = True) -> str:
    """The reply to learn.

    ``<think>chain</think><answer>(x1,y1),(x2,y2)</answer>``; with ``cot=False`` (the
    control without chains) the answer alone; for a single-image sample a bare box.
    Raises ValueError where a chain is wanted and the sample has none.
    """
    if not sample.cot:
        return format_box(sample.answer)
    if cot and sample.chain is None:
        raise ValueError(
            f"sample {sample.id} ({sample.source}) has no chain; add one (notebook 02) "
            "or train the control with cot=False"
        )
    return target_text(sample.answer, True, sample.chain if cot else None)


# Wording of the released prompts (PF sec. 9 and 2.2); a checkpoint expects it verbatim.
COT_SUFFIX = (
    " First output the thinking process in <think> </think> tags and then output the "
    "bounding box in <answer> </answer> tags."
)
SINGLE_IMAGE_PREFIX = "This is a single image grounding task with simple reference. "


def prompt_text(question: str, cot: bool) -> str:
    """The user text of training and evaluation, per sample (PF sec. 9, 2.2)."""
    return question + COT_SUFFIX if cot else SINGLE_IMAGE_PREFIX + question


def target_text(answer: Box, cot: bool, chain: str | None) -> str:
    """The reply to learn: chain and answer, answer alone, or a bare box."""
    if not cot:
        return format_box(answer)
    think = "" if chain is None else f"<think>{chain}</think>"
    return f"{think}<answer>{format_box(answer)}</answer>"

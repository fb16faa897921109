"""What the model is asked, and what it should reply (docs/paper_facts.md#prompts)."""

from typing import Any

from univg_nb.data.boxes import format_box
from univg_nb.data.sample import GroundingSample

# The wording of the released prompts; a checkpoint expects it verbatim.
COT_SUFFIX = (
    " First output the thinking process in <think> </think> tags and then output the "
    "bounding box in <answer> </answer> tags."
)
SINGLE_IMAGE_PREFIX = "This is a single image grounding task with simple reference. "
# The request to the baselines, spelling included: their published numbers rest on it.
DIRECT_SUFFIX = (
    " Format:<|box_start|>(x1,y1),(x2,y2)<|box_end|>. Don't generate addtional words."
)
STYLES = ("univg", "direct", "plain")


def user_text(sample: GroundingSample, style: str = "univg") -> str:
    """Return the text of the user turn, without images.

    The style "univg" asks for think and answer or, for a sample with `cot=False`, puts
    the single-image sentence first; "direct" is the baselines' request for a box alone;
    "plain" is the question as it is. Another style raises ValueError.
    """
    if style == "univg" and not sample.cot:
        return SINGLE_IMAGE_PREFIX + sample.question
    suffixes = {"univg": COT_SUFFIX, "direct": DIRECT_SUFFIX, "plain": ""}
    if style not in suffixes:
        raise ValueError(f"prompt style {style!r} is unknown; use one of {STYLES}")
    return sample.question + suffixes[style]


def messages(sample: GroundingSample, style: str = "univg") -> list[dict[str, Any]]:
    """Return the chat: one user turn with a part for each image, then `user_text`.

    Image parts are placeholders; the pictures go to the processor separately, opened by
    `images.open_image`. There is no system turn: the chat template adds the model's.
    """
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in sample.images]
    parts.append({"type": "text", "text": user_text(sample, style)})
    return [{"role": "user", "content": parts}]


def open_thinking(text: str) -> str:
    """Return a server's reply with the `<think>` that its prompt may have ended in.

    A local model writes the tag itself (`loading.leave_tag_to_reply`).
    """
    head, closed, _ = text.partition("</think>")
    return f"<think>{text}" if closed and "<think>" not in head else text


def reply_text(sample: GroundingSample, cot: bool = True) -> str:
    """Return the reply to learn: `<think>...</think><answer>(x1,y1),(x2,y2)</answer>`.

    A sample in single-image mode gets a bare box; `cot=False` leaves the chain out (the
    control without chains). Raises ValueError if the sample lacks a wanted chain.
    """
    if not sample.cot:
        return format_box(sample.answer)
    answer = f"<answer>{format_box(sample.answer)}</answer>"
    if not cot:
        return answer
    if sample.chain is None:
        raise ValueError(
            f"sample {sample.id} ({sample.source}) has no chain; add one (notebook 02) "
            "or train the control with cot=False"
        )
    return f"<think>{sample.chain}</think>{answer}"

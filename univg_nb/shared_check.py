"""Before shared prompts are trusted: one group both ways, on the model at hand.

What a library update or another model could break (positions, masks, the head) shows
here as a difference of log-probs, before anything is trained on it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList
from transformers.utils import is_torch_flex_attn_available

from univg_nb import models
from univg_nb.folded import folded
from univg_nb.packed_rows import packed_log_probs
from univg_nb.segment_attention import FLEX, SEGMENTS
from univg_nb.shared_prefix import (
    ATTENTION,
    MODEL_TYPES,
    Prompt,
    attention_of,
    compute_dtype,
    sample_replies,
)
from univg_nb.vision_cache import VisionCache

logger = logging.getLogger(__name__)

REPLIES, LENGTH = 2, 8  # of the group that goes both ways

# Largest difference of a token's log-prob that counts as equal. float32: rounding is
# below 1e-5. Half precision: two orders of the same sum differ by some 0.1 at logits
# near 20, a wrong mask or position by far more than 0.5.
TOLERANCE = 1e-4
TOLERANCE_HALF = 0.5


def tolerance(backbone: Module) -> float:
    """What `largest_difference` may be for the dtype the model computes in."""
    half = compute_dtype(backbone) in (torch.bfloat16, torch.float16)
    return TOLERANCE_HALF if half else TOLERANCE


def attention_choices(backbone: Module) -> list[str]:
    """Attention implementations that take our masks, the best for the device first.

    FLEX on a GPU, SEGMENTS in the place of sdpa on a CPU, then the model's
    own. A GPU model with flash attention, which takes no mask, has sdpa instead.
    """
    own = attention_of(backbone)
    on_gpu = next(backbone.parameters()).device.type == "cuda"
    names = [own] if own in ATTENTION else ["sdpa"] if on_gpu else []
    if on_gpu and is_torch_flex_attn_available():
        names.insert(0, FLEX)
    if names == ["sdpa"] and not on_gpu:
        names.insert(0, SEGMENTS)
    return list(dict.fromkeys(names))


def plain_choice(backbone: Module) -> str:
    """For use unchecked: the attention that takes our masks without being compiled."""
    names = attention_choices(backbone)
    return SEGMENTS if SEGMENTS in names else names[-1]


def obstacle(base: Module, sharded: bool) -> str | None:
    """Why this model's prompts cannot be shared, or None. sharded: by FSDP."""
    if sharded:
        return "FSDP shards the weights"
    if base.config.model_type not in MODEL_TYPES:
        return f"{base.config.model_type} has not Qwen2-VL's positions"
    if not attention_choices(base.model):
        return f"{attention_of(base)} takes no mask of our own"
    return None


class Recorder:
    """Keeps the log-probs (N, V) of every step of a rollout, before they are shaped."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.steps: list[Tensor] = []

    def __call__(self, _ids: Tensor, logits: Tensor) -> Tensor:
        self.steps.append((logits / self.temperature).log_softmax(-1))
        return logits


@torch.no_grad()
def largest_difference(
    model: Module,
    prompt: Prompt,
    warp: LogitsProcessorList,
    temperature: float,
    vision: VisionCache | None = None,
) -> float:
    """Largest difference between log-probs of the shared way and of whole rows.

    Samples REPLIES replies to the prompt from one prefill, and compares the log-probs
    seen while sampling and those of the packed row with the model's own, for rows of
    prompt and reply. Leaves random numbers and training mode as they were.
    """
    base, device = models.base_model(model), prompt.ids.device
    training = model.training
    recorder = Recorder(temperature)
    model.eval()
    try:
        cards = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(cards), folded(model):
            sampled = sample_replies(
                base,
                base.model,
                [prompt],
                REPLIES,
                max_new_tokens=LENGTH,
                eos_token_ids=[],
                warp=LogitsProcessorList([recorder, *warp]),
                seeds=range(REPLIES),
                vision=vision,
            )[0]
            replies = [torch.tensor(reply, device=device) for reply in sampled]
            packed, _ = packed_log_probs(model, base.model, [(prompt, replies)], vision)
        whole = whole_rows(model, prompt, replies)
    finally:
        model.train(training)
    ids = torch.stack(replies)  # (REPLIES, LENGTH)
    seen = torch.stack(recorder.steps, dim=1).gather(2, ids[..., None])[..., 0]
    both = torch.stack([torch.stack(packed[0]), seen.float()])
    return float((both - whole).abs().max())


def difference_with(model: Module, *group: Any) -> tuple[Tensor, float]:
    """(largest difference of the group as a tensor, what is allowed). What does not
    compile or fit counts as infinitely different; other attention may do."""
    backbone = models.base_model(model).model
    device = next(backbone.parameters()).device
    try:
        worst = largest_difference(model, *group)
    except Exception as error:  # whatever torch.compile and Triton raise
        if attention_of(backbone) != FLEX:
            raise
        logger.warning("FlexAttention does not run here: %s", error)
        worst = math.inf
    return torch.tensor([worst], device=device), tolerance(backbone)


def whole_rows(model: Module, prompt: Prompt, replies: Sequence[Tensor]) -> Tensor:
    """Log-probs (replies, longest) from rows of prompt and reply, each with the
    prompt and its images: the way without sharing."""
    rows = [torch.cat([prompt.ids, reply]) for reply in replies]
    real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    types = [torch.cat([prompt.token_types, torch.zeros_like(r)]) for r in replies]
    ids = pad_sequence(rows, batch_first=True)
    labels = ids.masked_fill(real == 0, -100)
    labels[:, : len(prompt.ids)] = -100
    images = {}
    if prompt.grid is not None:
        images = {
            "pixel_values": prompt.pixel_values.repeat(len(rows), 1),
            "image_grid_thw": prompt.grid.repeat(len(rows), 1),
        }
    output = model(
        input_ids=ids,
        attention_mask=real,
        mm_token_type_ids=pad_sequence(types, batch_first=True),
        labels=labels,
        fused_lm_head=True,
        **images,
    )
    return output.log_probs[:, len(prompt.ids) - 1 :]

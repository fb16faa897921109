"""Whether prompts can be shared: one group computed both ways, on the model at hand.

What an update of a library or another model could break (positions, masks, the head)
shows as a difference of log-probs, before anything is trained on it.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor
from torch.nn import Module
from transformers import LogitsProcessorList
from transformers.utils import is_torch_flex_attn_available

from univg_nb import models
from univg_nb.fast.attention import (
    ATTENTION,
    FLEX,
    MODEL_TYPES,
    SEGMENTS,
    get_attention,
    get_compute_dtype,
)
from univg_nb.fast.folded import fold_adapter
from univg_nb.fast.packed_rows import compute_log_probs
from univg_nb.fast.prompts import Prompt
from univg_nb.fast.sampling import sample_replies
from univg_nb.fast.vision_features import VisionCache

logger = logging.getLogger(__name__)

REPLIES, LENGTH = 2, 8  # of the group that is computed both ways

# Largest difference of a token's log-prob that counts as equal. float32: rounding is
# below 1e-5. Half precision: two orders of the same sum differ by some 0.1 at logits
# near 20, a wrong mask or position by far more than 0.5.
TOLERANCE = 1e-4
TOLERANCE_HALF = 0.5


def get_tolerance(backbone: Module) -> float:
    """Return the difference allowed for the dtype that the model computes in."""
    half = get_compute_dtype(backbone) in (torch.bfloat16, torch.float16)
    return TOLERANCE_HALF if half else TOLERANCE


def list_attention(backbone: Module) -> list[str]:
    """Return the attention implementations that take our masks, the best first.

    FLEX on a GPU, SEGMENTS in the place of sdpa on a CPU, then the model's own. A GPU
    model with flash attention, which takes no mask, gets sdpa instead.
    """
    own = get_attention(backbone)
    if next(backbone.parameters()).device.type != "cuda":
        return [SEGMENTS, own] if own == "sdpa" else [own] if own in ATTENTION else []
    flex = [FLEX] if is_torch_flex_attn_available() else []
    return list(dict.fromkeys([*flex, own if own in ATTENTION else "sdpa"]))


def choose_unchecked(backbone: Module) -> str:
    """Return the attention for use without a check: one that needs no compiler."""
    names = list_attention(backbone)
    return SEGMENTS if SEGMENTS in names else names[-1]


def find_obstacle(base: Module, sharded: bool) -> str | None:
    """Return why a model's prompts cannot be shared (`sharded`: by FSDP), or None."""
    if sharded:
        return "FSDP shards the weights"
    if base.config.model_type not in MODEL_TYPES:
        return f"{base.config.model_type} has not Qwen2-VL's positions"
    if not list_attention(base.model):
        return f"{get_attention(base)} takes no mask of our own"
    return None


@torch.no_grad()
def compare_log_probs(
    model: Module,
    prompt: Prompt,
    warpers: LogitsProcessorList,
    temperature: float,
    vision: VisionCache | None = None,
) -> float:
    """Return the largest difference of log-probs, shared prompt against whole rows.

    Samples REPLIES replies to the prompt from one prefill. The log-probs seen while
    sampling and those of the packed row are compared with the model's own for rows of
    prompt, images and reply. Random numbers and training mode stay as they were.
    Infinity where FlexAttention does not compile or fit; `temperature` is that of the
    fused head.
    """
    backbone, device = models.get_base_model(model).model, prompt.ids.device
    steps: list[Tensor] = []  # log-probs (REPLIES, V) before they are shaped

    def record(_ids: Tensor, logits: Tensor) -> Tensor:
        steps.append((logits / temperature).log_softmax(-1))
        return logits

    training = model.training
    model.eval()
    try:
        cards = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(cards), fold_adapter(model):
            (sampled,) = sample_replies(
                model,
                [prompt],
                REPLIES,
                max_new_tokens=LENGTH,
                eos_token_ids=[],
                warpers=LogitsProcessorList([record, *warpers]),
                seeds=range(REPLIES),
                vision=vision,
            )
            replies = torch.tensor(sampled, device=device)  # (REPLIES, LENGTH)
            packed, _ = compute_log_probs(
                model, backbone, [(prompt, list(replies))], vision
            )
        whole = compute_whole_rows(model, prompt, replies)
    except Exception as error:  # whatever torch.compile and Triton raise
        if get_attention(backbone) != FLEX:
            raise
        logger.warning("FlexAttention does not run here: %s", error)
        return math.inf
    finally:
        model.train(training)
    seen = torch.stack(steps, dim=1).gather(2, replies[..., None])[..., 0]
    both = torch.stack([torch.stack(list(packed)), seen.float()])
    return float((both - whole).abs().max())


def compute_whole_rows(model: Module, prompt: Prompt, replies: Tensor) -> Tensor:
    """Compute log-probs (G, L) of replies (G, L) to a prompt without sharing it.

    model: has TRL's fused head.
    """
    rows, width = len(replies), len(prompt.ids)
    ids = torch.cat([prompt.ids.expand(rows, -1), replies], dim=1)
    types = torch.cat([prompt.token_types.expand(rows, -1), 0 * replies], dim=1)
    images = {}
    for pixels, grid in prompt.images:
        images["pixel_values"] = pixels.repeat(rows, 1)
        images["image_grid_thw"] = grid.repeat(rows, 1)
    labels = ids.clone()
    labels[:, :width] = -100
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=types,
        labels=labels,
        fused_lm_head=True,
        **images,
    )
    return output.log_probs[:, width - 1 :]

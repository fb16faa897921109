"""Whether prompts can be shared: one group computed both ways, on the model at hand.

What an update of a library or another model could break (positions, masks, the head)
shows as a difference of log-probs, before anything is trained on it.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module
from transformers import GenerationConfig

from univg_nb import models
from univg_nb.fast.attention import (
    FLEX,
    SEGMENTS,
    get_attention,
    get_compute_dtype,
)
from univg_nb.fast.folded import fold_adapter
from univg_nb.fast.packed_rows import compute_log_probs
from univg_nb.fast.prompts import Prompt
from univg_nb.fast.sampling import sample_replies
from univg_nb.fast.vision_features import VisionCache, make_vision_inputs

logger = logging.getLogger(__name__)

REPLIES, LENGTH = 2, 8  # of the group that is computed both ways


def get_tolerance(backbone: Module) -> float:
    """Return the largest difference of a token's log-prob that counts as equal.

    In float32 rounding is below 1e-5. In half precision two orders of the same sum
    differ by some 0.1 at logits near 20, a wrong mask or position by far more than 0.5.
    """
    return 1e-4 if get_compute_dtype(backbone).itemsize > 2 else 0.5


def list_attention(backbone: Module) -> list[str]:
    """Return the attention implementations to try with packed rows, the best first."""
    on_gpu = next(backbone.parameters()).device.type == "cuda"
    return [FLEX if on_gpu else SEGMENTS, "sdpa"]


@torch.no_grad()
def compare_log_probs(
    model: Module,
    prompt: Prompt,
    banned: Sequence[int],
    temperature: float,
    vision: VisionCache | None = None,
) -> float:
    """Return the largest difference of log-probs, shared prompt against whole rows.

    Samples REPLIES replies to the prompt from one prefill. The log-probs seen while
    sampling and those of the packed row are compared with the model's own for rows of
    prompt, images and reply. Random numbers and training mode stay as they were.
    Infinity where FlexAttention does not compile or fit. `banned` tokens are never
    sampled; `temperature` is that of the fused head.
    """
    base = models.get_base_model(model)
    backbone, head = base.model, base.get_output_embeddings()
    steps: list[Tensor] = []  # log-probs (REPLIES, V) of each token

    def record(_head: Module, _inputs: tuple, logits: Tensor) -> None:
        steps.append((logits[0].float() / temperature).log_softmax(-1))

    config = GenerationConfig(max_new_tokens=LENGTH, suppress_tokens=list(banned))
    training = model.training
    model.eval()
    try:
        # The head of the training passes is TRL's: the hook sees the sampling only.
        with fold_adapter(model), head.register_forward_hook(record):
            (sampled,) = sample_replies(
                model, [prompt], REPLIES, config, range(REPLIES), vision
            )
            replies = torch.tensor(sampled, device=prompt.ids.device)
            group = [(prompt, range(REPLIES))]
            packed = compute_log_probs(model, backbone, group, replies, vision)
        whole = compute_whole_rows(model, prompt, replies)
    except Exception as error:  # whatever torch.compile and Triton raise
        if get_attention(backbone) != FLEX:
            raise
        logger.warning("FlexAttention does not run here: %s", error)
        return math.inf
    finally:
        model.train(training)
    seen = torch.stack(steps, dim=1).gather(2, replies[..., None])[..., 0]
    ours = torch.stack([packed[row][0] for row in range(REPLIES)])
    return float((torch.stack([ours, seen]) - whole).abs().max())


def compute_whole_rows(model: Module, prompt: Prompt, replies: Tensor) -> Tensor:
    """Compute log-probs (G, L) of replies (G, L) to a prompt without sharing it.

    model: has TRL's fused head.
    """
    rows, width = len(replies), len(prompt.ids)
    ids = torch.cat([prompt.ids.expand(rows, -1), replies], dim=1)
    types = torch.cat([prompt.token_types.expand(rows, -1), 0 * replies], dim=1)
    labels = ids.clone()
    labels[:, :width] = -100
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=types,
        labels=labels,
        fused_lm_head=True,
        **make_vision_inputs(prompt.images * rows),
    )
    return output.log_probs[:, width - 1 :]

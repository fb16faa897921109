"""Sampling of replies: one prefill for each prompt, one noise stream for each reply.

Rollouts and evaluation use the same `sample_replies`. The noise of a reply comes from a
stream of its own, because torch.multinomial draws all rows of a batch from one stream:
a reply would then depend on the batch size, and on how many processes share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation import logits_process
from trl import GRPOConfig

from univg_nb import models
from univg_nb.fast.attention import make_additive_mask
from univg_nb.fast.prompts import Prompt, compute_positions
from univg_nb.fast.vision_features import VisionCache, make_vision_inputs

# Never sampled: such a token has no image behind it, and the next forward pass fails
# (docs/paper_facts.md#vision-tokens).
VISION_TOKENS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
)


def get_vision_token_ids(tokenizer: Any) -> list[int]:
    """Return the ids of those VISION_TOKENS that the tokenizer has, sorted."""
    known = tokenizer.get_vocab()
    return sorted(known[token] for token in VISION_TOKENS if token in known)


def ban_vision_tokens(args: GRPOConfig, tokenizer: Any) -> list[int]:
    """Ban vision tokens in `args.generation_kwargs`, for TRL's own sampling.

    Returns:
        The ids of all banned tokens, those that `args` banned before included.
    """
    banned = get_vision_token_ids(tokenizer)
    options = dict(args.generation_kwargs or {})
    if args.use_vllm:
        bias = dict.fromkeys(banned, -100.0)
        options["logit_bias"] = {**options.get("logit_bias", {}), **bias}
    else:
        banned = sorted({*banned, *options.get("suppress_tokens", [])})
        options["suppress_tokens"] = banned
    args.generation_kwargs = options
    return banned


def can_share_rollout(args: GRPOConfig) -> bool:
    """Return whether `make_warpers` covers all sampling options of `args`."""
    return not (
        args.use_vllm
        or args.use_transformers_continuous_batching
        or args.repetition_penalty != 1.0
        or set(args.generation_kwargs or {}) - {"suppress_tokens"}
    )


def make_warpers(
    banned: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float | None = None,
) -> LogitsProcessorList:
    """Return what turns logits into those sampled from, in transformers' order.

    Args:
        banned: ids of tokens that are never sampled.
        temperature: above 0; greedy decoding takes the default.
        top_k: most tokens kept; 0 keeps all.
        top_p: least probability of the kept tokens together.
        min_p: least probability of a kept token, as a share of the largest.
    """
    warpers = LogitsProcessorList(
        [logits_process.SuppressTokensLogitsProcessor(list(banned))]
    )
    if temperature != 1.0:
        warpers.append(logits_process.TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(logits_process.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(logits_process.TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(logits_process.MinPLogitsWarper(min_p))
    return warpers


def noise_seed(*numbers: int) -> int:
    """Return the seed of one reply from the numbers that name it, all at least 0.

    Such as (seed, index of the item, number of the reply).
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def sample_tokens(log_probs: Tensor, streams: Sequence[torch.Generator]) -> Tensor:
    """Draw a token for each row from its own stream: (N, V) -> (N,).

    argmax(log p + Gumbel noise) is a sample of p.
    """
    pairs = zip(log_probs, streams, strict=True)
    noise = [torch.empty_like(row).exponential_(generator=one) for row, one in pairs]
    return (log_probs - torch.stack(noise).log()).argmax(-1)  # -log(Exp(1)) is Gumbel


@torch.no_grad()
def sample_replies(
    model: Module,
    prompts: Sequence[Prompt],
    num_replies: int,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    warpers: LogitsProcessorList,
    seeds: Sequence[int] = (),
    vision: VisionCache | None = None,
) -> list[list[list[int]]]:
    """Generate replies to prompts, sampled or greedy.

    Each prompt is one row of the batch and its replies are queries of that row, so the
    cache holds the prompt once. A reply ends with its first end token, which is kept,
    or at `max_new_tokens`. Rows whose replies have all ended leave the batch.

    Args:
        model: a Qwen2-VL or a model like it, in eval mode. Several replies to a prompt
            need an attention implementation of `attention.ATTENTION`.
        prompts: the prompts, on the model's device.
        num_replies: replies to each prompt, G.
        max_new_tokens: most tokens of a reply.
        eos_token_ids: tokens that end a reply.
        warpers: turns logits (N, V) into those sampled from, see `make_warpers`.
        seeds: one for each reply, those of a prompt adjacent; without, the most likely
            tokens are taken. A reply does not depend on the other rows, up to float
            rounding.
        vision: keeps image features.

    Returns:
        [prompt][reply] -> token ids.

    Raises:
        FloatingPointError: if the next-token probabilities are not finite.
    """
    base = models.get_base_model(model)
    backbone, head = base.model, base.get_output_embeddings()
    device, group = prompts[0].ids.device, num_replies
    positions = [compute_positions(backbone, prompt) for prompt in prompts]  # (3, P)
    cache, seen = _prefill(backbone, prompts, positions, vision)
    tokens = torch.stack([p.ids[-1] for p in prompts])[:, None].repeat(1, group)
    last = torch.stack([place[:, -1] for place in positions], dim=1)  # (3, D)
    streams = [torch.Generator(device).manual_seed(seed) for seed in seeds or ()]
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
    finished = torch.zeros(len(prompts), group, dtype=torch.bool, device=device)
    alive = list(range(len(prompts)))  # the prompt of every row
    replies: list[list[list[int]]] = [[[] for _ in range(group)] for _ in prompts]
    for step in range(max_new_tokens):
        hidden = backbone(
            input_ids=tokens,
            attention_mask=_make_step_mask(seen, group, step, backbone),
            position_ids=(last + step)[:, :, None].expand(-1, -1, group),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # (D, G, H)
        logits = warpers(tokens.view(-1, 1), head(hidden).float().flatten(0, 1))
        if not logits.amax(-1).isfinite().all():
            raise FloatingPointError(
                "the model's next-token probabilities are not finite: its weights have "
                "diverged; train with a lower learning_rate or max_grad_norm"
            )
        if streams:
            chosen = sample_tokens(logits.softmax(-1).log(), streams)
        else:
            chosen = logits.argmax(-1)
        tokens = chosen.view(-1, group)
        rows = zip(alive, tokens.tolist(), finished.tolist(), strict=True)
        for prompt, row, done in rows:
            for reply, token in enumerate(row):
                if not done[reply]:
                    replies[prompt][reply].append(token)
        finished = finished | torch.isin(tokens, eos)
        keep = ~finished.all(dim=1)
        if not keep.any():
            break
        if not keep.all():
            cache.batch_select_indices(keep)
            kept = keep.repeat_interleave(group).tolist()
            streams = [one for one, stays in zip(streams, kept, strict=False) if stays]
            alive = [
                row for row, stays in zip(alive, keep.tolist(), strict=True) if stays
            ]
            finished, seen, tokens = finished[keep], seen[keep], tokens[keep]
            last = last[:, keep]
    return replies


def _prefill(
    backbone: Module,
    prompts: Sequence[Prompt],
    positions: Sequence[Tensor],
    vision: VisionCache | None,
) -> tuple[DynamicCache, Tensor]:
    """Return the cache of prompts without their last tokens, and its mask (D, P)."""
    device = prompts[0].ids.device
    width = max(len(prompt.ids) for prompt in prompts) - 1
    ids = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    seen = torch.zeros(len(prompts), width, dtype=torch.bool, device=device)
    places = torch.zeros(3, len(prompts), width, dtype=torch.long, device=device)
    for row, (prompt, place) in enumerate(zip(prompts, positions, strict=True)):
        start = width - len(prompt.ids) + 1
        ids[row, start:] = prompt.ids[:-1]
        seen[row, start:] = True
        places[:, row, start:] = place[:, :-1]
    cache = DynamicCache(config=backbone.config.get_text_config())
    images = [image for prompt in prompts for image in prompt.images]
    backbone(
        input_ids=ids,
        attention_mask=seen.long(),
        position_ids=places,
        past_key_values=cache,
        use_cache=True,
        **make_vision_inputs(backbone, images, vision),
    )
    return cache, seen


def _make_step_mask(seen: Tensor, group: int, step: int, backbone: Module) -> Tensor:
    """Return the mask of one step, for G tokens of every row.

    The cache holds the prompt, then G keys a step, one for each reply. A single reply
    sees all of them: the usual mask (D, keys), which any attention takes.
    """
    size = len(seen)
    if group == 1:
        return torch.cat([seen, seen.new_ones(size, step + 1)], dim=1).long()
    own = torch.eye(group, dtype=torch.bool, device=seen.device).repeat(1, step + 1)
    prompt = seen[:, None, :].expand(-1, group, -1)
    mask = torch.cat([prompt, own.expand(size, -1, -1)], dim=2)
    return make_additive_mask(mask, backbone)

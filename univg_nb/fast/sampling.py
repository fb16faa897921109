"""Sampling of replies: one prefill for each prompt, one noise stream for each reply.

Rollouts and evaluation use the same `sample_replies`. The noise of a reply comes from a
stream of its own, because torch.multinomial draws all rows of a batch from one stream:
a reply would then depend on the batch size, and on how many processes share the work.
"""

from collections.abc import Sequence
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig
from trl import GRPOConfig

from univg_nb import models
from univg_nb.fast.attention import SEGMENTS, get_compute_dtype, use_attention
from univg_nb.fast.decoding import ReplyCache, Step
from univg_nb.fast.prompts import Prompt, compute_positions
from univg_nb.fast.vision_features import VisionCache, make_vision_inputs

# Never sampled: such a token has no image behind it, and the next forward pass fails
# (docs/paper_facts.md#vision-tokens). A processor may have other names for some.
VISION_TOKENS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
)


def get_vision_token_ids(processor: Any) -> list[int]:
    """Return the ids of VISION_TOKENS and of the processor's own, sorted."""
    known = processor.tokenizer.get_vocab()
    kinds = ("image", "video", "vision_start", "vision_end")
    own = {getattr(processor, f"{kind}_token", None) for kind in kinds}
    return sorted(known[token] for token in {*VISION_TOKENS, *own} if token in known)


def ban_vision_tokens(args: GRPOConfig, processor: Any) -> list[int]:
    """Ban vision tokens in `args`, for TRL's own sampling; return all banned ids."""
    banned = get_vision_token_ids(processor)
    options = dict(args.generation_kwargs or {})
    if args.use_vllm:
        bias = dict.fromkeys(banned, -100.0)
        options["logit_bias"] = {**options.get("logit_bias", {}), **bias}
    else:
        banned = sorted({*banned, *options.get("suppress_tokens", [])})
        options["suppress_tokens"] = banned
    args.generation_kwargs = options
    return banned


def noise_seed(*numbers: int) -> int:
    """Return the seed of a reply from what names it, as (seed, item, its number)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def draw_noise(seeds: Sequence[int], length: int) -> Tensor:
    """Return the noise of replies, (N, length): each row from a stream of its own."""
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(length, generator=stream) for stream in streams])


def sample_tokens(probs: Tensor, noise: Tensor) -> Tensor:
    """Draw a token for each row by its noise, in [0, 1): (N, V), (N,) -> (N,).

    The token is where the cumulative probability rises above the noise, so one of
    probability 0 is never drawn. Sums over a large vocabulary want double precision.
    """
    reached = probs.double().cumsum(-1)
    wanted = noise.double()[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, wanted, right=True)[:, 0]


@torch.no_grad()
def sample_replies(
    model: Module,
    prompts: Sequence[Prompt],
    num_replies: int,
    config: GenerationConfig,
    seeds: Sequence[int] = (),
    vision: VisionCache | None = None,
) -> list[list[list[int]]]:
    """Generate replies, sampled or greedy: token ids by [prompt][reply].

    Each prompt is one row of the batch and its replies are queries of that row, so the
    cache holds the prompt once. A reply ends with its first end token, which is kept.
    Rows whose replies have all ended leave the batch.

    Args:
        model: a model of one of MODEL_TYPES, in eval mode.
        prompts: the prompts, on the model's device.
        num_replies: replies to each prompt, G.
        config: `max_new_tokens` and `eos_token_id`; logits are shaped as by `generate`
            with it, but for options that look at the tokens before.
        seeds: one for each reply, those of a prompt adjacent; without, decoding is
            greedy. A reply does not depend on the other rows, up to float rounding.
        vision: keeps image features.

    Raises:
        FloatingPointError: if the next-token probabilities are not finite.
    """
    base = models.get_base_model(model)
    backbone = base.model
    positions = [compute_positions(backbone, prompt) for prompt in prompts]  # (3, P)
    cache = ReplyCache(*_prefill(backbone, prompts, positions, vision), num_replies)
    tokens = torch.stack([prompt.ids[-1] for prompt in prompts])[:, None]
    last = torch.stack([place[:, -1] for place in positions], dim=1)  # (3, D)
    noise = (
        draw_noise(seeds, config.max_new_tokens).to(tokens.device) if seeds else None
    )
    with use_attention(backbone, SEGMENTS):
        return _decode(base, cache, tokens.repeat(1, num_replies), last, config, noise)


def _decode(
    base: Module,
    cache: ReplyCache,
    tokens: Tensor,
    last: Tensor,
    config: GenerationConfig,
    noise: Tensor | None,
) -> list[list[list[int]]]:
    """Generate after the prompts' last tokens, (D, G) at positions (3, D)."""
    backbone, head, device = base.model, base.get_output_embeddings(), tokens.device
    warpers = base._get_logits_processor(config, device=device)
    ends = [] if config.eos_token_id is None else config.eos_token_id
    eos = torch.tensor(ends, dtype=torch.long, device=device)
    rows, group = tokens.shape
    finished = torch.zeros(rows, group, dtype=torch.bool, device=device)
    alive = list(range(rows))  # the prompt of every row
    replies: list[list[list[int]]] = [[[] for _ in range(group)] for _ in range(rows)]
    for step in range(config.max_new_tokens):
        cache.length = step
        hidden = backbone(
            input_ids=tokens,
            attention_mask=Step(cache, get_compute_dtype(backbone)),
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
        if noise is None:
            tokens = logits.argmax(-1)
        else:
            tokens = sample_tokens(logits.softmax(-1), noise[:, step])
        tokens = tokens.view(-1, group)
        values = tokens.tolist()
        for row, reply in (~finished).nonzero().tolist():
            replies[alive[row]][reply].append(values[row][reply])
        finished = finished | torch.isin(tokens, eos)
        keep = ~finished.all(dim=1)
        if not keep.any():
            break
        if not keep.all():
            cache.select_rows(keep)
            alive = list(compress(alive, keep.tolist()))
            finished, tokens, last = finished[keep], tokens[keep], last[:, keep]
            if noise is not None:
                noise = noise[keep.repeat_interleave(group)]
    return replies


def _prefill(
    backbone: Module,
    prompts: Sequence[Prompt],
    positions: Sequence[Tensor],
    vision: VisionCache | None,
) -> tuple[DynamicCache, Tensor]:
    """Return the cache of prompts without their last tokens, and its mask (D, P)."""
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = [prompt.ids[:-1] for prompt in prompts]
    seen = pad([torch.ones_like(row) for row in ids]).bool()
    cache = DynamicCache(config=backbone.config.get_text_config())
    images = [image for prompt in prompts for image in prompt.images]
    backbone(
        input_ids=pad(ids),
        attention_mask=seen.long(),
        position_ids=pad([place[:, :-1].T for place in positions]).permute(2, 0, 1),
        past_key_values=cache,
        use_cache=True,
        **make_vision_inputs(images, vision),
    )
    return cache, seen

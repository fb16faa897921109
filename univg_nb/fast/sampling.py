"""Random numbers of sampling: a stream of its own for every reply.

torch.multinomial draws all rows of a batch from one stream, and a reply would then
depend on which others are sampled beside it: on the batch size, and on how many
processes share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import Module
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from trl import GRPOConfig

from univg_nb.fast.attention import additive
from univg_nb.fast.prompts import Prompt, prompt_positions
from univg_nb.fast.vision_features import VisionCache, vision_inputs

# DOC of sampling:
# """How replies are sampled: which tokens never are, and what shapes the distribution."""


def noise_seed(*numbers: int) -> int:
    """The seed of one reply from what names it, as (seed, item, number of the reply);
    all at least 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class SeededNoise(LogitsProcessor):
    """Turns greedy decoding into sampling, with a random stream of its own per row.

    argmax(logits / temperature + Gumbel noise) is a sample of softmax(logits /
    temperature).
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.seeds = seeds
        self.temperature = temperature
        self.streams: list[torch.Generator] = []

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch only."""
        self.streams = [self.streams[row] for row in rows]

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor
    ) -> torch.FloatTensor:
        """scores (B, V) -> noisy scores (B, V); input_ids (B, T) is not used."""
        if not self.streams:  # only here is the device known
            self.streams = [
                torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds
            ]
        waits = torch.stack(
            [
                torch.empty_like(row).exponential_(generator=stream)
                for row, stream in zip(scores, self.streams, strict=True)
            ]
        )
        return scores / self.temperature - waits.log()  # -log(Exp(1)) is Gumbel


VISION_TOKENS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
)


def can_share_rollout(args: GRPOConfig) -> bool:
    """Whether `logits_warp` covers all sampling options; vLLM samples by itself."""
    extra = set(args.generation_kwargs or {}) - {"suppress_tokens"}
    return not (
        args.use_vllm
        or args.use_transformers_continuous_batching
        or args.repetition_penalty != 1.0
        or extra
    )


def logits_warp(args: GRPOConfig, banned: Sequence[int]) -> LogitsProcessorList:
    """What turns logits into those sampled from, in transformers' own order."""
    warp = LogitsProcessorList([SuppressTokensLogitsProcessor(list(banned))])
    if args.temperature != 1.0:
        warp.append(TemperatureLogitsWarper(args.temperature))
    if args.top_k:
        warp.append(TopKLogitsWarper(args.top_k))
    if args.top_p < 1.0:
        warp.append(TopPLogitsWarper(args.top_p))
    if args.min_p is not None:
        warp.append(MinPLogitsWarper(args.min_p))
    return warp


def ban_vision_tokens(args: GRPOConfig, tokenizer: Any) -> list[int]:
    """Forbid vision tokens in `args.generation_kwargs`; their ids.

    A sampled one has no image behind it, and the next forward pass fails with "Image
    features and image tokens do not match" (DESIGN sec. 9).
    """
    known = tokenizer.get_vocab()
    banned = [known[token] for token in VISION_TOKENS if token in known]
    options = dict(args.generation_kwargs or {})
    if args.use_vllm:
        bias = {token: -100.0 for token in banned}
        options["logit_bias"] = {**options.get("logit_bias", {}), **bias}
    else:
        banned = sorted({*banned, *options.get("suppress_tokens", [])})
        options["suppress_tokens"] = banned
    args.generation_kwargs = options
    return banned


@torch.no_grad()
def sample_replies(
    model: Module,
    backbone: Module,
    prompts: Sequence[Prompt],
    num_replies: int,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    warp: LogitsProcessorList,
    seeds: Sequence[int],
    vision: VisionCache | None = None,
) -> list[list[list[int]]]:
    """Sample `num_replies` replies to every prompt: [prompt][reply] -> token ids.

    Each prompt is one row of the batch and its replies are `num_replies` queries of
    that row, so the cache holds the prompt once. A reply ends with its first EOS, which
    is kept, or at `max_new_tokens`. Rows whose replies are all done leave the batch.
    `warp` turns logits (N, V) into the logits sampled from (temperature, top-p, banned
    tokens); seeds: one for each reply, those of a prompt adjacent, so that a reply does
    not depend on the others; vision remembers image features. Raises
    FloatingPointError when the probabilities are not finite.
    """
    device = prompts[0].ids.device
    where = [prompt_positions(backbone, prompt) for prompt in prompts]
    width = max(len(prompt.ids) for prompt in prompts) - 1
    size, group = len(prompts), num_replies
    ids = torch.zeros(size, width, dtype=torch.long, device=device)
    seen = torch.zeros(size, width, dtype=torch.bool, device=device)
    positions = torch.zeros(3, size, width, dtype=torch.long, device=device)
    for row, (prompt, place) in enumerate(zip(prompts, where, strict=True)):
        count = len(prompt.ids) - 1
        ids[row, width - count :] = prompt.ids[:-1]
        seen[row, width - count :] = True
        positions[:, row, width - count :] = place[:, :-1]
    cache = DynamicCache(config=backbone.config.get_text_config())
    backbone(
        input_ids=ids,
        attention_mask=seen.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        **vision_inputs(backbone, [i for p in prompts for i in p.images], vision),
    )
    tokens = torch.stack([p.ids[-1] for p in prompts])[:, None].repeat(1, group)
    at = torch.stack([place[:, -1] for place in where], dim=1)  # (3, D)
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
    finished = torch.zeros(size, group, dtype=torch.bool, device=device)
    alive = torch.arange(size, device=device)  # which prompts the rows still are
    replies: list[list[list[int]]] = [[[] for _ in range(group)] for _ in prompts]
    # Keys of later steps lie behind the prompt, `group` a step, one for each reply.
    own = torch.eye(group, dtype=torch.bool, device=device)
    head = model.get_output_embeddings()
    noise = SeededNoise(seeds, temperature=1.0)
    for step in range(max_new_tokens):
        mask = torch.cat(
            [
                seen[:, None, :].expand(-1, group, -1),
                own.repeat(1, step + 1).expand(len(alive), -1, -1),
            ],
            dim=2,
        )  # (D, G, width + G*(step+1))
        hidden = backbone(
            input_ids=tokens,
            attention_mask=additive(mask, backbone),
            position_ids=(at + step)[:, :, None].expand(-1, -1, group),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # (D, G, H)
        logits = head(hidden).float().flatten(0, 1)  # (D*G, V)
        probabilities = warp(tokens.view(-1, 1), logits).softmax(-1)
        if not probabilities.isfinite().all():
            raise FloatingPointError(
                "the policy's next-token probabilities are not finite: its weights "
                "have diverged; lower grpo.learning_rate or grpo.max_grad_norm"
            )
        tokens = noise(tokens, probabilities.log()).argmax(-1).view(-1, group)
        for row, prompt in enumerate(alive.tolist()):
            for reply, token in enumerate(tokens[row].tolist()):
                if not finished[row, reply]:
                    replies[prompt][reply].append(token)
        finished = finished | torch.isin(tokens, eos)
        keep = ~finished.all(dim=1)
        if not keep.all():
            if not keep.any():
                break
            cache.batch_select_indices(keep)
            noise.keep(keep.repeat_interleave(group).nonzero()[:, 0].tolist())
            alive, finished, seen = alive[keep], finished[keep], seen[keep]
            tokens, at = tokens[keep], at[:, keep]
    return replies

"""How replies are sampled: which tokens never are, and what shapes the distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from trl import GRPOConfig

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

"""What a model replies to a batch of samples: left-padded, vision tokens banned.

A reply does not depend on the batch it was made in, up to float rounding: prompts are
padded on the left, transformers computes M-RoPE positions per row without the padding
(`Qwen2VLModel.get_rope_index`), and sampling noise is drawn per reply.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import (
    BatchFeature,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
)

from univg_nb import models
from univg_nb.data import prompts
from univg_nb.data.images import open_image
from univg_nb.data.sample import GroundingSample
from univg_nb.fast.sampling import SeededNoise

# A reply that holds one of these makes the next forward pass fail (DESIGN sec. 9).
VISION_TOKENS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
)


@dataclass(frozen=True)
class Made:
    """A reply's text without special tokens, its tokens (end token included), and
    whether it ran out of new tokens before an end token."""

    response: str
    tokens: int
    truncated: bool


def prompt_text(
    processor: ProcessorMixin, sample: GroundingSample, style: str = "univg"
) -> str:
    """The chat prompt of one sample, up to where the assistant's reply begins."""
    return processor.apply_chat_template(
        prompts.messages(sample, style), tokenize=False, add_generation_prompt=True
    )


def encode(
    processor: ProcessorMixin, samples: Sequence[GroundingSample], style: str = "univg"
) -> BatchFeature:
    """Model inputs of a batch, left-padded.

    input_ids, attention_mask, mm_token_type_ids: (B, T); pixel_values: (patches,
    values) of all images in order; image_grid_thw: (images, 3). An image that occurs
    several times is opened once. Raises ValueError for an unreadable image.
    """
    opened: dict[str, Image.Image] = {}
    for sample in samples:
        for path in sample.images:
            if path not in opened:
                opened[path] = open_image(path, sample.id)
    return processor(
        text=[prompt_text(processor, s, style) for s in samples],
        images=[[opened[p] for p in s.images] for s in samples],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def reply(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[GroundingSample],
    *,
    style: str = "univg",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> list[Made]:
    """One reply to each sample, generated together until all rows have ended.

    temperature 0 is greedy; above it each row needs its own seed. The model is put into
    eval mode meanwhile: dropout would make replies depend on chance.
    """
    inputs = encode(processor, samples, style).to(model.device)
    noise = [SeededNoise(seeds, temperature)] if temperature > 0 else []
    training = model.training
    model.eval()
    config = generation_config(model, processor, max_new_tokens)
    new = _new_tokens(model, inputs, config, noise)
    model.train(training)
    texts = processor.batch_decode(
        new, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    ends = set(config.eos_token_id)
    return [
        Made(text, len(tokens), truncated=tokens[-1] not in ends)
        for tokens, text in zip(new, texts, strict=True)
    ]


def _new_tokens(
    model: PreTrainedModel,
    inputs: BatchFeature,
    config: GenerationConfig,
    noise: list[SeededNoise],
) -> list[list[int]]:
    """The tokens each row adds to its prompt, its end token included.

    Rows that have ended would be computed on until the longest ends. So whenever half
    of them have, those are taken out of the batch and out of its cache.
    """
    new: list[list[int]] = [[] for _ in inputs["input_ids"]]
    rows = list(range(len(new)))  # those still in the batch
    now: dict = dict(inputs)
    config = copy.deepcopy(config)
    config.return_dict_in_generate = True
    left = config.max_new_tokens
    known = set(config.eos_token_id)
    ends = torch.tensor(config.eos_token_id, device=model.device)
    positions = models.get_base_model(model).model  # keeps `rope_deltas` (B, 1)
    while rows:
        config.max_new_tokens = left
        half = HalfEnded(ends)
        output = model.generate(
            **now,
            generation_config=config,
            logits_processor=noise,
            stopping_criteria=[half],
        )
        # The prompt is cut off by position: its boxes must never be scored (PF E7).
        added = output.sequences[:, now["input_ids"].shape[1] :]  # (rows, added)
        left -= added.shape[1]
        for row, tokens in zip(rows, added.tolist(), strict=True):
            stop = next((t for t, token in enumerate(tokens) if token in known), None)
            new[row] += tokens if stop is None else tokens[: stop + 1]
        going = (~half.ended).nonzero()[:, 0] if left else []
        rows = [rows[k] for k in going]
        if rows:
            output.past_key_values.batch_select_indices(going)
            positions.rope_deltas = positions.rope_deltas[going]
            for one in noise:
                one.keep(going.tolist())
            mask = now["attention_mask"][going]
            mask = torch.cat([mask, mask.new_ones(len(rows), added.shape[1])], dim=1)
            now = {"input_ids": output.sequences[going], "attention_mask": mask}
            now["past_key_values"] = output.past_key_values
    return new


class HalfEnded(StoppingCriteria):
    """Stops a batch when half of its rows have ended; `ended` (B,) says which."""

    def __init__(self, ends: torch.LongTensor) -> None:
        self.ends = ends
        self.ended: torch.Tensor | None = None

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any
    ) -> torch.Tensor:
        """input_ids (B, T) -> (B,), all true or all false; scores are not used."""
        now = torch.isin(input_ids[:, -1], self.ends)
        self.ended = now if self.ended is None else self.ended | now
        return (2 * self.ended.sum() >= len(now)).expand(len(now))


def generation_config(
    model: PreTrainedModel, processor: ProcessorMixin, max_new_tokens: int
) -> GenerationConfig:
    """Greedy decoding, vision tokens banned. Sampling is greedy over noisy logits."""
    tokenizer = processor.tokenizer
    banned = [tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS]
    assert None not in banned, "the tokenizer lacks one of Qwen2-VL's vision tokens"
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=_end_tokens(model, processor),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=banned,
        use_cache=True,
    )


def _end_tokens(model: PreTrainedModel, processor: ProcessorMixin) -> list[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = processor.tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends)

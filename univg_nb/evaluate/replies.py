"""Replies of a model to grounding samples.

A reply does not depend on its batch, up to float rounding: positions are computed
without padding, and noise is drawn for each reply (`fast.sampling`, as in rollouts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from univg_nb.data import prompts
from univg_nb.data.images import open_image
from univg_nb.data.sample import GroundingSample
from univg_nb.fast import sampling
from univg_nb.fast.prompts import split_rows


@dataclass(frozen=True)
class GeneratedReply:
    """A reply of a model.

    Attributes:
        response: the text without special tokens.
        tokens: number of tokens, the end token included.
        truncated: whether it ended at the limit and not with an end token.
    """

    response: str
    tokens: int
    truncated: bool


def render_prompt(
    processor: ProcessorMixin, sample: GroundingSample, style: str = "univg"
) -> str:
    """Return the chat prompt of one sample, up to where the reply begins."""
    return processor.apply_chat_template(
        prompts.messages(sample, style), tokenize=False, add_generation_prompt=True
    )


def encode(
    processor: ProcessorMixin, samples: Sequence[GroundingSample], style: str = "univg"
) -> BatchFeature:
    """Return the model inputs of a batch. An image is opened once, however often used.

    Args:
        processor: processor of the model.
        samples: the samples, B.
        style: prompt style, one of `prompts.STYLES`.

    Returns:
        input_ids, attention_mask, mm_token_type_ids (B, T), padded on the left;
        pixel_values (patches, values) of all images; image_grid_thw (images, 3).

    Raises:
        ValueError: if an image cannot be read.
    """
    opened: dict[str, Image.Image] = {}
    for sample in samples:
        for path in sample.images:
            if path not in opened:
                opened[path] = open_image(path, sample.id)
    return processor(
        text=[render_prompt(processor, s, style) for s in samples],
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
) -> list[GeneratedReply]:
    """Generate one reply to each sample, all in one batch.

    The model is in eval mode meanwhile: with dropout, replies would depend on chance.

    Args:
        model: the model, with or without an adapter.
        processor: its processor.
        samples: the samples.
        style: prompt style, one of `prompts.STYLES`.
        max_new_tokens: most tokens of a reply.
        temperature: 0 is greedy; above it replies are sampled.
        seeds: for sampling, one for each sample.

    Raises:
        ValueError: if an image cannot be read.
    """
    inputs = encode(processor, samples, style).to(model.device)
    counts = [len(sample.images) for sample in samples]
    groups = split_rows(groups=range(len(samples)), num_images=counts, **inputs)
    tokenizer = processor.tokenizer
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = [ends] if isinstance(ends, int) else list(ends)
    training = model.training
    model.eval()
    banned = sampling.get_vision_token_ids(tokenizer)
    made = sampling.sample_replies(
        model,
        [prompt for prompt, _ in groups],
        1,
        max_new_tokens=max_new_tokens,
        eos_token_ids=ends,
        warpers=sampling.make_warpers(banned, temperature or 1.0),
        seeds=seeds if temperature else (),
    )
    model.train(training)
    ids = [tokens for (tokens,) in made]
    texts = processor.batch_decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [
        GeneratedReply(text, len(tokens), truncated=tokens[-1] not in ends)
        for tokens, text in zip(ids, texts, strict=True)
    ]

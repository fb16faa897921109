"""Replies of a model to grounding samples.

A reply does not depend on its batch, up to float rounding: positions are computed
without padding, and noise is drawn for each reply (`fast.sampling`, as in rollouts).
"""

from collections.abc import Sequence
from functools import cache, partial

from transformers import (
    BatchFeature,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from univg_nb import models
from univg_nb.data import prompts
from univg_nb.data.conventions import get_convention
from univg_nb.data.images import open_image
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate.predictions import Reply, convert_reply
from univg_nb.families import get_side
from univg_nb.fast import sampling
from univg_nb.fast.prompts import split_rows


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
    """Return the model inputs of a batch of B samples.

    Returns:
        input_ids, attention_mask, mm_token_type_ids (B, T), padded on the left;
        pixel_values (patches, values) of all images; image_grid_thw (images, 3).

    Raises:
        ValueError: if an image cannot be read.
    """
    open_once = cache(partial(open_image, side=get_side(processor)))
    return processor(
        text=[render_prompt(processor, s, style) for s in samples],
        images=[[open_once(path, s.id) for path in s.images] for s in samples],
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
) -> list[Reply]:
    """Generate one reply to each sample, all in one batch.

    The model is asked and answers in its own way of writing boxes (`conventions`); the
    replies that return are as this project writes them.
    The model is in eval mode meanwhile: with dropout, replies would depend on chance.
    `generate.GenerationOptions` describes the options; sampling needs a seed for each
    sample.

    Raises:
        ValueError: if an image cannot be read.
    """
    boxes = get_convention(models.get_base_model(model).config, processor)
    asked = [boxes.ask(sample) for sample in samples]
    inputs = encode(processor, asked, style).to(model.device)
    counts = [len(sample.images) for sample in samples]
    groups = split_rows(groups=range(len(samples)), num_images=counts, **inputs)
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    banned = sampling.get_vision_token_ids(processor)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        suppress_tokens=banned,
        do_sample=temperature > 0,
        temperature=temperature or None,
    )
    training = model.training
    model.eval()
    made = sampling.sample_replies(
        model,
        [prompt for prompt, _ in groups],
        1,
        config,
        seeds if temperature else (),
    )
    model.train(training)
    ids = [tokens for (tokens,) in made]
    texts = processor.batch_decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    found = [
        Reply(text, truncated=tokens[-1] not in ends, tokens=len(tokens))
        for tokens, text in zip(ids, texts, strict=True)
    ]
    pairs = zip(found, samples, strict=True)
    return [convert_reply(one, sample, boxes) for one, sample in pairs]

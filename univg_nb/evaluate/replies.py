"""Replies of a model to grounding samples.

A reply does not depend on its batch, up to float rounding: positions are computed
without padding, and noise is drawn for each reply (`fast.sampling`, as in rollouts).
"""

from collections.abc import Mapping, Sequence
from functools import cache, partial

import torch
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
from univg_nb.fast.prompts import Prompt, split_rows
from univg_nb.fast.vision_features import EncodedImage, GivenFeatures


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


def make_prompts(
    processor: ProcessorMixin,
    samples: Sequence[GroundingSample],
    style: str,
    features: Mapping[str, EncodedImage],
) -> list[Prompt]:
    """Return the prompts of samples whose images' features are known, by path.

    They have the tokens of `encode`.
    """
    marker = processor.image_token_id
    texts = [render_prompt(processor, sample, style) for sample in samples]
    made = []
    for sample, row in zip(samples, processor.tokenizer(texts).input_ids, strict=True):
        images = [features[path] for path in sample.images]
        sizes = iter([len(feature) for feature, _ in images])
        runs = ([one] * (next(sizes) if one == marker else 1) for one in row)
        ids = torch.tensor([token for run in runs for token in run])
        made.append(Prompt(ids, (ids == marker).long(), images))
    return made


def reply(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[GroundingSample],
    *,
    style: str = "univg",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
    features: Mapping[str, EncodedImage] | None = None,
) -> list[Reply]:
    """Generate one reply to each sample, all in one batch.

    The model is asked and answers in its own way of writing boxes (`conventions`); the
    replies that return are as this project writes them.
    The model is in eval mode meanwhile: with dropout, replies would depend on chance.
    `generate.GenerationOptions` describes the options; sampling needs a seed for each
    sample. `features` are of all images, by path, for a model on the CPU.

    Raises:
        ValueError: if an image cannot be read.
    """
    base = models.get_base_model(model)
    boxes = get_convention(base.config, processor)
    asked = [boxes.ask(sample) for sample in samples]
    if features is None:
        inputs = encode(processor, asked, style).to(model.device)
        counts = [len(sample.images) for sample in samples]
        rows = split_rows(groups=range(len(samples)), num_images=counts, **inputs)
        asked_prompts, vision = [prompt for prompt, _ in rows], None
    else:
        asked_prompts = make_prompts(processor, asked, style, features)
        vision = GivenFeatures(base.model)
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
        asked_prompts,
        1,
        config,
        seeds if temperature else (),
        vision,
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

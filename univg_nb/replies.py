"""What a model replies to a batch of samples: left-padded, vision tokens banned.

A reply does not depend on the batch it was made in, up to float rounding: prompts are
padded on the left, transformers computes M-RoPE positions per row without the padding
(`Qwen2VLModel.get_rope_index`), and sampling noise is drawn per reply.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import (
    BatchFeature,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from univg_nb import prompts
from univg_nb.images import open_image
from univg_nb.samples import GroundingSample

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
    output = model.generate(
        **inputs,
        generation_config=generation_config(model, processor, max_new_tokens),
        logits_processor=noise,
    )  # (B, T + new)
    model.train(training)
    # The prompt is cut off by position: its boxes must never be scored (PF E7).
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    texts = processor.batch_decode(
        new, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    ends = set(_end_tokens(model, processor))
    made = []
    for tokens, text in zip(new, texts, strict=True):
        stop = next((t for t, token in enumerate(tokens) if token in ends), None)
        used = len(tokens) if stop is None else stop + 1
        made.append(Made(text, used, truncated=stop is None))
    return made


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


def noise_seed(seed: int, index: int, k: int) -> int:
    """The seed of the k-th sampled reply to item `index`."""
    return int(np.random.SeedSequence((seed, index, k)).generate_state(1)[0])


class SeededNoise(LogitsProcessor):
    """Turns greedy decoding into sampling, with a random stream of its own per row.

    argmax(logits / temperature + Gumbel noise) is a sample of softmax(logits /
    temperature). torch.multinomial would draw all rows from one stream, and a reply
    would then depend on which others share its batch.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.seeds = seeds
        self.temperature = temperature
        self.streams: list[torch.Generator] = []

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

"""Batches of stage 1: several images per sample, loss on the reply only.

TRL's vision collator gives the same labels, but it opens, resizes and tokenizes every
image and prompt again at each step and cuts samples that are too long. Here the text is
tokenized once, an image goes through a frozen vision tower once where its features fit
in memory, and a sample that is too long is an error that names it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler
from transformers import ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from univg_nb.data import prompts
from univg_nb.data.conventions import PLAIN, BoxConvention
from univg_nb.data.images import count_image_tokens
from univg_nb.data.sample import GroundingSample
from univg_nb.fast.vision_features import EncodedImage, preprocess_images

IGNORE = -100  # the label that torch's cross-entropy leaves out
ROWS_AT_ONCE = 1000  # as Python objects, which take some ten times Arrow's memory
WINDOW = 8  # batches sorted together: little padding, and still random batches


def tokenize(
    samples: Sequence[GroundingSample],
    processor: ProcessorMixin,
    chains: bool = True,
    max_length: int | None = None,
    convention: BoxConvention = PLAIN,
) -> Dataset:
    """Tokenize a training set and check every sample before any training.

    Args:
        samples: the training set.
        processor: the processor of the model.
        chains: False makes the control without reasoning: the prompt is the question
            alone and the reply only the box.
        max_length: most tokens of a sample, those of its images included.
        convention: how the model writes boxes.

    Returns:
        Rows with index, sample_id, images (paths), image_tokens (of each image),
        prompt_ids with one <|image_pad|> per image, completion_ids, which end with the
        end-of-turn token, and length (all tokens of the sample).

    Raises:
        ValueError: for an empty set, a missing image, or a sample that is too long.
    """
    tokenizer = processor.tokenizer
    sizes: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    parts: list[Dataset] = []
    for index, sample in enumerate(samples):
        name = f"{sample.source} sample {sample.id}".strip()
        prompt = processor.apply_chat_template(
            prompts.messages(convention.ask(sample), "univg" if chains else "plain"),
            tokenize=False,
            add_generation_prompt=True,
        )
        reply = prompts.reply_text(sample, cot=chains)
        reply = convention.write(reply, convention.locate(sample)) + tokenizer.eos_token
        # Apart, as when the model generates.
        ids, reply_ids = tokenizer([prompt, reply], add_special_tokens=False).input_ids
        for path in sample.images:
            if path not in sizes:
                sizes[path] = count_image_tokens(path, processor, sample.id)
        counts = [sizes[path] for path in sample.images]
        length = len(ids) - len(counts) + sum(counts) + len(reply_ids)
        if max_length is not None and length > max_length:
            raise ValueError(
                f"{name}: {length} tokens, more than sft.max_length = {max_length}; "
                "raise it, lower model.max_pixels or leave the sample out"
            )
        rows.append(
            {
                "index": index,
                "sample_id": sample.id,
                "images": list(sample.images),
                "image_tokens": counts,
                "prompt_ids": ids,
                "completion_ids": reply_ids,
                "length": length,
            }
        )
        if len(rows) == ROWS_AT_ONCE or index + 1 == len(samples):
            parts.append(Dataset.from_list(rows))
            rows.clear()
    if not parts:
        raise ValueError("no training samples; check the data section of the scale")
    return concatenate_datasets(parts)


@dataclass
class VisionCollator:
    """Turn rows of `tokenize` into one batch for Qwen2-VL, padded on the right.

    A batch has input_ids, attention_mask, labels, mm_token_type_ids (B, T),
    image_grid_thw (images, 3), sample_index (B,), and image_features (image tokens,
    hidden) where there are features, else pixel_values (patches, values). Labels equal
    input_ids on the reply with its end token and are -100 elsewhere.

    Attributes:
        processor: the processor of the model.
        features: the vision features of all images, by path.
    """

    processor: ProcessorMixin
    features: Mapping[str, EncodedImage] | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows; see the class."""
        paths = [path for row in rows for path in row["images"]]
        if self.features is None:
            key = "pixel_values"
            values, grids = preprocess_images(self.processor, paths)
        else:
            key, found = "image_features", [self.features[path] for path in paths]
            values = torch.cat([feature for feature, _ in found])
            grids = torch.cat([grid for _, grid in found])
        marker = self.processor.image_token_id
        texts = []
        for row in rows:
            counts = iter(row["image_tokens"])
            prompt: list[int] = []
            for token in row["prompt_ids"]:
                prompt += [marker] * next(counts) if token == marker else [token]
            reply = row["completion_ids"]
            labels = [IGNORE] * len(prompt) + reply
            texts.append({"input_ids": prompt + reply, "labels": labels})
        pad = DataCollatorForLanguageModeling(self.processor.tokenizer.pad_token_id)
        batch = pad(texts)  # input_ids, attention_mask and labels
        return {
            **batch,
            "mm_token_type_ids": (batch["input_ids"] == marker).long(),
            "sample_index": torch.tensor([row["index"] for row in rows]),
            key: values,
            "image_grid_thw": grids,
        }


@dataclass(eq=False)
class LengthGroupedBatches(Sampler[int]):
    """Sample order in which every global batch holds samples of similar length.

    transformers' sampler leaves the batches sorted from long to short within each
    fifty, and with them the tasks, since length follows the number of images; here
    the batches are shuffled. The order depends on (seed, epoch) only, so that a resumed
    run finds it again. A last partial batch stays last. `batch_size` counts the samples
    of an update, over all processes and accumulation steps.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        whole = len(order) - len(order) % self.batch_size
        batches: list[torch.Tensor] = []
        for window in order[:whole].split(self.batch_size * WINDOW):
            by_length = sorted(window.tolist(), key=self.lengths.__getitem__)
            batches += torch.tensor(by_length).split(self.batch_size)
        for batch in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[batch].tolist()
        yield from order[whole:].tolist()

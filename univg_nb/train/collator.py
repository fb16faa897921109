"""Stage 1's batches: several images a sample, loss on the reply only, nothing twice.

TRL's vision collator gives the same labels (a test compares them) but opens, resizes
and tokenizes every image and prompt again at each step, cuts an over-long sample
without a word, and pads on the right only. Here the text is tokenized once, an image
is preprocessed once where the vision tower is frozen and its output fits in memory,
and a sample that is too long is an error that names it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import ProcessorMixin

from univg_nb.data import prompts
from univg_nb.data.images import count_image_tokens
from univg_nb.data.sample import GroundingSample
from univg_nb.fast.vision_features import Encoded, pixels

IGNORE = -100  # the label torch's cross-entropy leaves out


def encode(
    sample: GroundingSample, processor: ProcessorMixin, chains: bool = True
) -> dict[str, Any]:
    """One sample as token ids, with a single <|image_pad|> for each image.

    chains=False is the control without reasoning: question alone, reply only the box.
    The reply ends with the end-of-turn token; prompt and reply are tokenized apart, as
    they are when the model generates.
    """
    messages = prompts.messages(sample, style="univg" if chains else "plain")
    prompt = processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    tokenizer = processor.tokenizer
    reply = prompts.reply_text(sample, cot=chains) + tokenizer.eos_token
    ids = tokenizer([prompt, reply], add_special_tokens=False)["input_ids"]
    found = ids[0].count(processor.image_token_id)
    if found != len(sample.images) or processor.image_token_id in ids[1]:
        raise ValueError(
            f"{place(sample)}: {len(sample.images)} images, but {found} image markers "
            "in the prompt or one in the reply; remove image tokens from the text"
        )
    return {
        "sample_id": sample.id,
        "images": list(sample.images),
        "prompt_ids": ids[0],
        "completion_ids": ids[1],
    }


def place(sample: GroundingSample) -> str:
    """How error messages name a sample."""
    return f"{sample.source} (sample {sample.id})" if sample.source else sample.id


def image_tokens(grid: torch.Tensor, processor: ProcessorMixin) -> int:
    """Tokens an image takes in the prompt; grid (3,): frames, rows, columns."""
    return int(grid.prod()) // processor.image_processor.merge_size**2


def tokenize(
    samples: Sequence[GroundingSample],
    processor: ProcessorMixin,
    chains: bool = True,
    max_length: int | None = None,
) -> Dataset:
    """Rows of index, sample_id, images, image_tokens, prompt_ids, completion_ids and
    length.

    image_tokens: of each image; length counts prompt, image and reply tokens. Raises
    ValueError, before any training, for a missing image and for a sample longer than
    max_length tokens.
    """
    sizes: dict[str, int] = {}
    rows = []
    for index, sample in enumerate(samples):
        row = encode(sample, processor, chains)
        for path in sample.images:
            if path not in sizes:
                sizes[path] = count_image_tokens(path, processor, sample.id)
        counts = [sizes[path] for path in sample.images]
        visual = sum(counts) - len(counts)  # each image is one token of prompt_ids
        length = len(row["prompt_ids"]) + visual + len(row["completion_ids"])
        check_length(length, max_length, place(sample))
        row |= {"index": index, "image_tokens": counts, "length": length}
        rows.append(row)
    if not rows:
        raise ValueError("no training samples; check the data section of the scale")
    return Dataset.from_list(rows)


def check_length(length: int, max_length: int | None, name: str) -> None:
    """ValueError if a sample is too long: cutting it would cut its box or images."""
    if max_length is not None and length > max_length:
        raise ValueError(
            f"{name}: {length} tokens, more than sft.max_length = {max_length}; "
            "raise it, lower model.max_pixels or leave the sample out"
        )


# --------------------------------------------------------------------- batches


@dataclass
class VisionCollator:
    """Rows of tokenize() -> one batch for Qwen2-VL.

    Gives input_ids, attention_mask, labels, mm_token_type_ids (B, T), image_grid_thw
    (images, 3), sample_index (B,), and image_features (image tokens, hidden) when
    `features` holds them, else pixel_values (patches, values).
    Labels equal input_ids on the reply and its end token and are -100 elsewhere.
    """

    processor: ProcessorMixin
    features: dict[str, Encoded] | None = None
    padding_side: Literal["left", "right"] = "right"
    max_length: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        paths = [path for row in rows for path in row["images"]]
        if self.features is None:
            key, (values, grids) = "pixel_values", pixels(self.processor, paths)
        else:
            key, found = "image_features", [self.features[path] for path in paths]
            values = torch.cat([feature for feature, _ in found])
            grids = torch.cat([grid for _, grid in found])
        counts = iter([image_tokens(grid, self.processor) for grid in grids])
        texts = [self._expand(row, counts) for row in rows]
        batch = self._pad(rows, texts)
        return {**batch, key: values, "image_grid_thw": grids}

    def _expand(self, row: dict[str, Any], counts: Iterator[int]) -> list[int]:
        """Prompt ids with every image marker repeated once per image token."""
        marker = self.processor.image_token_id
        ids: list[int] = []
        for token in row["prompt_ids"]:
            ids.extend([marker] * next(counts) if token == marker else [token])
        name = f"sample {row['sample_id']}"
        check_length(len(ids) + len(row["completion_ids"]), self.max_length, name)
        return ids

    def _pad(
        self, rows: Sequence[dict[str, Any]], texts: Sequence[list[int]]
    ) -> dict[str, torch.Tensor]:
        lengths = [
            len(text) + len(row["completion_ids"])
            for text, row in zip(texts, rows, strict=True)
        ]
        shape = (len(rows), max(lengths))
        input_ids = torch.full(shape, self.processor.tokenizer.pad_token_id)  # (B, T)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE)
        for i, (row, text, length) in enumerate(zip(rows, texts, lengths, strict=True)):
            begin = shape[1] - length if self.padding_side == "left" else 0
            reply = row["completion_ids"]
            input_ids[i, begin : begin + length] = torch.tensor(text + reply)
            attention_mask[i, begin : begin + length] = 1
            labels[i, begin + len(text) : begin + length] = torch.tensor(reply)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "mm_token_type_ids": (input_ids == self.processor.image_token_id).long(),
            "sample_index": torch.tensor([row["index"] for row in rows]),
        }


class LengthGroupedBatches(torch.utils.data.Sampler[int]):
    """Sample order in which every global batch holds samples of similar length.

    transformers' sampler leaves the batches sorted from long to short within each
    fifty, and with them the tasks, since length follows the number of images; here
    the batches are shuffled. The order depends on (seed, epoch) only, so that an
    interrupted run finds it again. A last partial batch stays last.

    batch_size: samples per update over all processes and accumulation steps.
    """

    WINDOW = 8  # batches sorted together: little padding, and still random batches

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.batch_size
        whole = len(order) - len(order) % size
        batches: list[list[int]] = []
        for start in range(0, whole, size * self.WINDOW):
            stop = min(start + size * self.WINDOW, whole)
            window = sorted(order[start:stop], key=self.lengths.__getitem__)
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        for batch in shuffled:
            yield from batches[batch]
        yield from order[whole:]

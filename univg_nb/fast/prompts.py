"""One prefill for all replies to a prompt: prompts, positions, masks, and sampling.

The G replies of a group share a long prompt with images. Here each distinct prompt goes
through the model once, in the rollout (`sample_replies`) as in the training passes
(`packed_rows`). A reply sees the prompt and itself (a 4-D attention mask) and takes the
positions that follow the prompt (M-RoPE), exactly as if it stood alone.

Works for models with Qwen2-VL's `get_rope_index`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from univg_nb.data.images import open_image

# DOC of encoding:
# """Each distinct prompt of a generation batch encoded once, then expanded to its rows.

# TRL repeats a prompt G times and encodes every row twice, images included.
# """


@dataclass
class Prompt:
    """One distinct prompt and its images, no padding.

    ids: (P,) token ids; token_types: (P,) 0 text, 1 image; pixel_values: (patches,
    patch_dim) or None; grid: (images, 3) patches in time, height, width, or None.
    """

    ids: Tensor
    token_types: Tensor
    pixel_values: Tensor | None
    grid: Tensor | None

    @property
    def images(self) -> list[tuple[Tensor, Tensor]]:
        """[(pixel_values, grid)], or [] without images."""
        return [] if self.grid is None else [(self.pixel_values, self.grid)]

    def same_as(self, other: Prompt) -> bool:
        """Whether both are the same text over the same pixels."""
        if (self.pixel_values is None) != (other.pixel_values is None):
            return False
        return torch.equal(self.ids, other.ids) and (
            self.pixel_values is None
            or (
                torch.equal(self.grid, other.grid)
                and torch.equal(self.pixel_values, other.pixel_values)
            )
        )


def split_rows(
    input_ids: Tensor,
    attention_mask: Tensor,
    token_types: Tensor,
    prompt_length: int,
    pixel_values: Tensor | None,
    grid: Tensor | None,
    num_images: Sequence[int] | None,
) -> list[tuple[Prompt, list[int]]]:
    """Runs of adjacent rows with the same prompt: [(prompt, its row numbers), ...].

    input_ids, attention_mask, token_types: (B, P+C), prompts left-padded. A group cut
    by a micro-batch border just gives two runs; nothing depends on G.
    """
    counts = num_images or [0] * len(input_ids)
    image_ends = [0, *accumulate(counts)]
    patches = [0, *accumulate(grid.prod(-1).tolist())] if grid is not None else [0]
    runs: list[tuple[Prompt, list[int]]] = []
    for row in range(len(input_ids)):
        real = attention_mask[row, :prompt_length].bool()
        first, last = image_ends[row], image_ends[row + 1]
        prompt = Prompt(
            input_ids[row, :prompt_length][real],
            token_types[row, :prompt_length][real],
            pixel_values[patches[first] : patches[last]] if last > first else None,
            grid[first:last] if last > first else None,
        )
        if runs and prompt.same_as(runs[-1][0]):
            runs[-1][1].append(row)
        else:
            runs.append((prompt, [row]))
    return runs


def prompt_positions(backbone: Module, prompt: Prompt) -> Tensor:
    """M-RoPE positions of a prompt, (3, P); replies continue at the maximum + 1."""
    if prompt.grid is None:
        return torch.arange(len(prompt.ids), device=prompt.ids.device).expand(3, -1)
    positions, _ = backbone.get_rope_index(
        prompt.ids[None],
        mm_token_type_ids=prompt.token_types[None],
        image_grid_thw=prompt.grid,
    )
    return positions[:, 0]  # (3, 1, P) -> (3, P)


@dataclass
class EncodedBatch:
    """Distinct prompts, how many adjacent rows each has, and the rows' images."""

    prompts: list[Prompt]
    counts: list[int]
    images: list[list[Image]]  # of every row
    pad_token_id: int

    @classmethod
    def encode(
        cls,
        processor: Any,
        conversations: Sequence[list[dict[str, Any]]],
        group_size: int,
        device: torch.device,
    ) -> EncodedBatch:
        """Render, open and tokenise. Adjacent equal conversations, at most `group_size`
        of them, count as one prompt. Raises ValueError for an unreadable image."""
        distinct: list[list[dict[str, Any]]] = []
        counts: list[int] = []
        for conversation in conversations:
            if distinct and counts[-1] < group_size and conversation == distinct[-1]:
                counts[-1] += 1
            else:
                distinct.append(conversation)
                counts.append(1)
        opened = [
            [
                _picture(part["image"])
                for message in conversation
                for part in message["content"]
                if part["type"] == "image"
            ]
            for conversation in distinct
        ]
        texts = processor.apply_chat_template(
            distinct, tokenize=False, add_generation_prompt=True
        )
        encoded = processor(text=texts, images=opened if any(opened) else None)
        grid = torch.as_tensor(encoded["image_grid_thw"]) if any(opened) else None
        pixels = torch.as_tensor(encoded["pixel_values"]) if any(opened) else None
        prompts = []
        first_image = first_patch = 0
        for row, group in enumerate(opened):
            ids = torch.tensor(encoded["input_ids"][row], device=device)
            types = torch.tensor(encoded["mm_token_type_ids"][row], device=device)
            if not group:
                prompts.append(Prompt(ids, types, None, None))
                continue
            mine = grid[first_image : first_image + len(group)]
            patches = int(mine.prod(-1).sum())
            own = pixels[first_patch : first_patch + patches]
            prompts.append(Prompt(ids, types, own.to(device), mine.to(device)))
            first_image += len(group)
            first_patch += patches
        batch = cls(prompts, counts, [], processor.tokenizer.pad_token_id)
        batch.images = batch._repeat(opened)
        return batch

    def _repeat(self, values: Sequence[Any]) -> list[Any]:
        """One value per prompt -> one per row."""
        return [v for v, n in zip(values, self.counts, strict=True) for _ in range(n)]

    def expand(self, replies: Sequence[Sequence[Any]]) -> list[Any]:
        """[prompt][reply] -> one reply per row."""
        pairs = zip(replies, self.counts, strict=True)
        return [reply for group, n in pairs for reply in group[:n]]

    def prompt_ids(self) -> list[list[int]]:
        """Token ids of every row, unpadded."""
        return self._repeat([prompt.ids.tolist() for prompt in self.prompts])

    def fields(self) -> dict[str, Any]:
        """What TRL calls multimodal fields, for all rows: flat tensors for images,
        nested lists per token."""
        types = self._repeat([prompt.token_types.tolist() for prompt in self.prompts])
        return {**self._pixels(), "mm_token_type_ids": types}

    def model_inputs(self) -> BatchFeature:
        """All rows as the processor would return them, left-padded."""
        ids = self._padded([prompt.ids for prompt in self.prompts], self.pad_token_id)
        types = self._padded([prompt.token_types for prompt in self.prompts], 0)
        real = self._padded([torch.ones_like(p.ids) for p in self.prompts], 0)
        return BatchFeature(
            {
                "input_ids": ids,
                "attention_mask": real,
                "mm_token_type_ids": types,
                **self._pixels(),
            }
        )

    def _padded(self, values: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
        return pad_sequence(
            self._repeat(values),
            batch_first=True,
            padding_value=fill,
            padding_side="left",
        )

    def _pixels(self) -> dict[str, torch.Tensor]:
        rows = [p for p in self._repeat(self.prompts) if p.grid is not None]
        if not rows:
            return {}
        return {
            "pixel_values": torch.cat([p.pixel_values for p in rows]),
            "image_grid_thw": torch.cat([p.grid for p in rows]),
        }


def _picture(image: str | Image) -> Image:
    return open_image(image) if isinstance(image, str) else image


class EncodedOnce:
    """A processor whose call returns the batch that was encoded before."""

    def __init__(self, processor: Any, batch: Callable[[], EncodedBatch]) -> None:
        self._processor = processor
        self._batch = batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, **_: Any) -> BatchFeature:
        return self._batch().model_inputs()

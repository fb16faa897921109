"""The data of the base model's pre-training, drawn while it runs.

Each item depends on (seed, stage, index) only, so a run that continues from a
checkpoint sees what it would have seen without the interruption.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import Qwen2Tokenizer

from univg_nb.base_model.albums import sample_album
from univg_nb.base_model.dialogue import IMAGE_TOKENS, Dialogue, tokenize_lesson
from univg_nb.base_model.guide import Looks
from univg_nb.base_model.lessons import Lesson, Turn, sample_lesson, sample_scene
from univg_nb.base_model.vision import (
    find_covered_cells,
    make_cell_targets,
    make_image_grid_thw,
    patchify,
    render_small,
)
from univg_nb.minimig.scenes import PLACES


@dataclass(frozen=True)
class Plan:
    """Sizes of the four stages. Learning rates are the peaks of cosine schedules.

    `matrix_lr` is Muon's, in every stage; the other rates are AdamW's.
    """

    seed: int = 0
    matrix_lr: float = 6e-3
    vision_steps: int = 1800
    vision_batch: int = 64
    vision_lr: float = 2e-3
    language_steps: int = 3000
    language_batch: int = 16
    language_lr: float = 1.5e-3
    words_steps: int = 300
    albums_steps: int = 1600
    albums_batch: int = 12
    save_every: int = 100


def compute_max_things(progress: float) -> int:
    """Return the number of things a scene may hold at `progress` (0..1) of a stage.

    With crowded scenes from the start, the model stays long on a plateau.
    """
    return 2 if progress < 0.08 else 3 if progress < 0.2 else 5


class Views(Dataset):
    """Vision stage: item i is (picture uint8, cell targets, place)."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.vision_steps * self.plan.vision_batch

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        rng = np.random.default_rng([self.plan.seed, 1, i])
        scene = sample_scene(rng, compute_max_things(i / len(self)), "train")
        picture = torch.from_numpy(render_small(scene, rng).copy())
        return (
            picture,
            torch.from_numpy(make_cell_targets(scene)),
            PLACES.index(scene.place),
        )


# Shares of the language stage at which lessons grow from one thing to two, three and
# five, and from single pictures to several: see `compute_max_things`.
LANGUAGE_BORDERS = (0.05, 0.15, 0.28)


class Lessons(Dataset):
    """Language stage: item i is a batch, ready for the model.

    `WINDOW` batches are drawn together and sorted by length, so that little of a batch
    is padding; within a window the batches are in random order.
    """

    WINDOW = 5
    STREAM = 2  # of random numbers; the vision stage draws from 1
    NUMBERS = False  # whether "image 2" is told to look at the second picture

    def __init__(self, plan: Plan, tokenizer: Qwen2Tokenizer) -> None:
        self.plan, self.tokenizer = plan, tokenizer
        self._window: tuple[int, list[dict[str, Tensor]]] = (-1, [])

    def __len__(self) -> int:
        return self.plan.language_steps

    @property
    def batch(self) -> int:
        """Dialogues in a batch."""
        return self.plan.language_batch

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        window, place = divmod(step, self.WINDOW)
        if self._window[0] != window:
            self._window = (window, self._make(window))
        return self._window[1][place]

    def _lesson(self, rng: np.random.Generator, progress: float) -> Lesson:
        stage = sum(progress >= border for border in LANGUAGE_BORDERS)
        several = (0.0, 0.0, 0.15, 0.35)[stage]
        return sample_lesson(rng, (1, 2, 3, 5)[stage], several=several)

    def _make(self, window: int) -> list[dict[str, Tensor]]:
        rng = np.random.default_rng([self.plan.seed, self.STREAM, window])
        progress = window * self.WINDOW / len(self)
        size = self.batch
        items = []
        for _ in range(self.WINDOW * size):
            item = self._lesson(rng, progress)
            pictures = torch.from_numpy(
                np.stack([render_small(s, rng) for s in item.scenes])
            )
            made = tokenize_lesson(item, self.tokenizer, self.NUMBERS)
            items.append((pictures, made))
        items.sort(key=lambda item: len(item[1].ids))
        pad = self.tokenizer.pad_token_id
        image = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        batches = [
            collate(items[size * k : size * (k + 1)], pad, image)
            for k in range(self.WINDOW)
        ]
        return [batches[k] for k in rng.permutation(self.WINDOW)]


class Words(Lessons):
    """Third stage: turns of a lesson, mixed with as many words to be repeated."""

    STREAM = 3

    def __init__(self, plan: Plan, tokenizer: Qwen2Tokenizer) -> None:
        super().__init__(plan, tokenizer)
        special = set(tokenizer.all_special_ids)
        texts = (
            tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in special
        )
        self.words = [text for text in texts if text.isprintable()]

    def __len__(self) -> int:
        return self.plan.words_steps

    def _lesson(self, rng: np.random.Generator, progress: float) -> Lesson:
        taught = sample_lesson(rng, several=0.35, turns=3)
        turns = [*taught.turns, *(self._repeat(rng) for _ in taught.turns)]
        mixed = tuple(turns[k] for k in rng.permutation(len(turns)))
        return Lesson(taught.scenes, mixed)

    def _repeat(self, rng: np.random.Generator) -> Turn:
        """Return a turn of random words, whose order teaches nothing."""
        count = int(rng.integers(4, 13))
        text = "".join(str(w) for w in rng.choice(self.words, count)).strip()
        return Turn(f"Repeat: {text}", text)


class Albums(Words):
    """Fourth stage: lessons on several pictures, most questions ask to describe one."""

    STREAM = 4
    NUMBERS = True

    def __len__(self) -> int:
        return self.plan.albums_steps

    @property
    def batch(self) -> int:
        """Dialogues in a batch."""
        return self.plan.albums_batch

    def _lesson(self, rng: np.random.Generator, progress: float) -> Lesson:
        taught = sample_album(rng)
        if rng.random() < 0.25:  # so that no word is forgotten
            return Lesson(taught.scenes, (*taught.turns, self._repeat(rng)))
        return taught


def collate(
    items: list[tuple[Tensor, Dialogue]], pad: int, image_token: int
) -> dict[str, Any]:
    """Pad dialogues on the right, join their pictures in order, and mark the looks.

    There is no attention mask: under a causal mask nothing looks at padding on the
    right, and without a mask attention takes its faster path.

    Args:
        items: pictures (N, SIDE, SIDE, 3) and dialogue of each row.
        pad: id of the padding token.
        image_token: id of the token that stands for a part of a picture.

    Returns:
        The model's arguments, and `looks` for the guide.
    """
    pictures = torch.cat([p for p, _ in items])
    ids = pad_sequence([torch.tensor(d.ids) for _, d in items], True, pad)  # (B, T)
    labels = pad_sequence([torch.tensor(d.labels) for _, d in items], True, -100)
    looks = [(row, look) for row, (_, d) in enumerate(items) for look in d.looks]
    places = [torch.nonzero(row == image_token)[:, 0] for row in ids]
    shown: dict[Any, Tensor] = {}  # many looks of a row have the same spots
    for row, look in looks:
        if (row, look.spots) not in shown:
            pictures_at = places[row].view(-1, IMAGE_TOKENS)
            spots = [pictures_at[i][find_covered_cells(box)] for i, box in look.spots]
            shown[row, look.spots] = torch.cat(spots)
    columns = [shown[row, look.spots] for row, look in looks]
    number = torch.arange(len(looks)).repeat_interleave(
        torch.tensor([len(c) for c in columns])
    )
    thing = torch.zeros(len(looks), ids.shape[1], dtype=torch.bool)  # (N, T)
    thing[number, torch.cat(columns)] = True
    at = torch.tensor([look.at for _, look in looks])
    phrase = torch.tensor([look.phrase for _, look in looks])
    row = torch.tensor([row for row, _ in looks])
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": patchify(pictures),
        "image_grid_thw": make_image_grid_thw(len(pictures)),
        "looks": Looks(row, at, thing, phrase, asking=phrase == at),
    }

"""Makes the shipped base model from nothing: ``make base``.

Two stages, both on pictures drawn as they are needed: the vision tower learns to
see (:mod:`univg_nb.pretrain_vision`), then the whole model learns the lessons of
:mod:`univg_nb.minimig.lessons` as dialogues, with loss on the replies only. A run
that was stopped goes on from its last checkpoint with the same data and weights.
"""

import argparse
import os
import shutil
import time
from dataclasses import asdict, dataclass
from math import cos, pi
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Qwen2Tokenizer

from univg_nb.boxes import Box
from univg_nb.minimig.lessons import Lesson, corpus, lesson, scene_for
from univg_nb.minimig.pictograms import COLOURS, KINDS
from univg_nb.minimig.scenes import PLACES
from univg_nb.pretrain_guide import AttentionGuide, Looks
from univg_nb.pretrain_vision import (
    CELLS,
    CellHeads,
    cell_targets,
    covered_cells,
    grid,
    patchify,
    seen,
)
from univg_nb.runs import append_jsonl
from univg_nb.tiny_model import build_model, build_processor, train_tokenizer

IMAGE_TOKENS = CELLS * CELLS
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PICTURE = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"


@dataclass(frozen=True)
class Plan:
    """Sizes of the two stages. Learning rates are the peaks of cosine schedules."""

    seed: int = 0
    vision_steps: int = 640
    vision_batch: int = 128
    vision_lr: float = 2e-3
    language_steps: int = 3000
    language_batch: int = 32
    language_lr: float = 1.5e-3
    save_every: int = 100


def crowding(progress: float) -> int:
    """How many things a scene may hold at a share ``progress`` (0..1) of a stage.

    Starting with crowded scenes leaves the model on a plateau for long.
    """
    return 2 if progress < 0.08 else 3 if progress < 0.2 else 5


class Views(Dataset):
    """Vision stage: item i is (picture uint8, cell targets, place)."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.vision_steps * self.plan.vision_batch

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        rng = np.random.default_rng([self.plan.seed, 1, i])
        scene = scene_for(rng, crowding(i / len(self)), "train")
        picture = torch.from_numpy(seen(scene, rng).copy())
        return picture, torch.from_numpy(cell_targets(scene)), PLACES.index(scene.place)


class Attend(NamedTuple):
    """A token's look: from position ``at`` to ``box`` (0..1000) in picture ``image``.

    phrase: position of the last token of the words that name it, or -1; ``at`` itself
    where those words do the looking.
    """

    at: int
    image: int
    box: Box
    phrase: int


class Dialogue(NamedTuple):
    """A lesson's dialogue as token ids, labels (-100 where no loss is taken), looks."""

    ids: list[int]
    labels: list[int]
    looks: list[Attend]


def dialogue(item: Lesson, tokenizer: Qwen2Tokenizer) -> Dialogue:
    """The chat template applied to all turns; loss on each reply and its end token."""
    ids: list[int] = []
    labels: list[int] = []
    looks: list[Attend] = []
    pictures = PICTURE * len(item.scenes)
    for k, turn in enumerate(item.turns):
        opening = (SYSTEM if k == 0 else "\n") + "<|im_start|>user\n"
        opening += pictures if k == 0 else ""
        asked = f"{opening}{turn.question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(asked, return_offsets_mapping=True)
        answer = tokenizer(turn.reply + "<|im_end|>", return_offsets_mapping=True)
        phrase = -1
        for place, (_, end) in enumerate(prompt.offset_mapping):
            for look in turn.asks:
                if end == len(opening) + look.end:
                    phrase = len(ids) + place
                    looks.append(Attend(phrase, look.image, look.box, phrase))
        assert not turn.asks or phrase >= 0, turn
        ids += prompt.input_ids
        labels += [-100] * len(prompt.input_ids)
        for place, (_, end) in enumerate(answer.offset_mapping):
            for look in turn.looks:
                if look.start < end <= look.end:  # seen from the token before
                    at = len(ids) + place - 1
                    looks.append(Attend(at, look.image, look.box, phrase))
        ids += answer.input_ids
        labels += answer.input_ids
    return Dialogue(ids, labels, looks)


# Shares of the language stage at which lessons grow from one thing to two, three and
# five, and from single pictures to several. Started crowded, with a tower that moves
# from the first step and without the guide, the model did not learn to point in 300
# steps; from single things on, it pointed at one thing, but after 500 steps still at
# either of two.
LANGUAGE_BORDERS = (0.05, 0.15, 0.28)
TOWER_FROZEN_UNTIL = 0.15
LOOK_WEIGHT = 0.5


class Lessons(Dataset):
    """Language stage: item i is a batch, ready for the model.

    ``WINDOW`` batches are made together and sorted by length, so that little of a
    batch is padding; within a window the batches come in random order.
    """

    WINDOW = 5

    def __init__(self, plan: Plan, tokenizer: Qwen2Tokenizer):
        self.plan, self.tokenizer = plan, tokenizer
        self._window: tuple[int, list[dict[str, Tensor]]] = (-1, [])

    def __len__(self) -> int:
        return self.plan.language_steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        window, place = divmod(step, self.WINDOW)
        if self._window[0] != window:
            self._window = (window, self._make(window))
        return self._window[1][place]

    def _make(self, window: int) -> list[dict[str, Tensor]]:
        rng = np.random.default_rng([self.plan.seed, 2, window])
        progress = window * self.WINDOW / len(self)
        size = self.plan.language_batch
        items = []
        for _ in range(self.WINDOW * size):
            stage = sum(progress >= border for border in LANGUAGE_BORDERS)
            several = (0.0, 0.0, 0.15, 0.35)[stage]
            item = lesson(rng, (1, 2, 3, 5)[stage], several=several)
            pictures = torch.from_numpy(np.stack([seen(s, rng) for s in item.scenes]))
            items.append((pictures, dialogue(item, self.tokenizer)))
        items.sort(key=lambda item: len(item[1].ids))
        pad = self.tokenizer.pad_token_id
        image = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        batches = [
            collate(items[size * k : size * (k + 1)], pad, image)
            for k in range(self.WINDOW)
        ]
        return [batches[k] for k in rng.permutation(self.WINDOW)]


def collate(
    items: list[tuple[Tensor, Dialogue]], pad: int, image_token: int
) -> dict[str, Tensor | Looks]:
    """Pads dialogues on the right, joins their pictures in order, marks the looks.

    No attention mask: under a causal mask nothing looks at padding on the right, and
    without it attention takes its faster path.
    """
    pictures = torch.cat([p for p, _ in items])
    ids = pad_sequence([torch.tensor(d.ids) for _, d in items], True, pad)  # (B, T)
    labels = pad_sequence([torch.tensor(d.labels) for _, d in items], True, -100)
    looks = [(row, look) for row, (_, d) in enumerate(items) for look in d.looks]
    thing = torch.zeros(len(looks), ids.shape[1], dtype=torch.bool)  # (N, T)
    places = [torch.nonzero(row == image_token)[:, 0] for row in ids]
    for n, (row, look) in enumerate(looks):
        cells = torch.from_numpy(covered_cells(look.box))
        thing[n, places[row].view(-1, IMAGE_TOKENS)[look.image][cells]] = True
    at = torch.tensor([look.at for _, look in looks])
    phrase = torch.tensor([look.phrase for _, look in looks])
    row = torch.tensor([row for row, _ in looks])
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": patchify(pictures),
        "image_grid_thw": grid(len(pictures)),
        "looks": Looks(row, at, thing, phrase, asking=phrase == at),
    }


def cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.03) -> float:
    """Warm-up, then a cosine from 1 down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (
        1 + cos(pi * (step - warmup) / (steps - warmup))
    )


def optimizer_for(modules: list[nn.Module], lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    params = [p for m in modules for p in m.parameters() if p.requires_grad]
    params = list({id(p): p for p in params}.values())
    return torch.optim.AdamW(
        [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.98),
    )


class Stage:
    """A stage's loop: checkpoint, resume, schedule, log."""

    def __init__(self, name: str, out: Path, modules: dict[str, nn.Module], lr: float):
        self.name, self.out, self.modules, self.lr = name, out, modules, lr
        self.optimizer = optimizer_for(list(modules.values()), lr)
        self.file = out / f"{name}.pt"
        self.step = 0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.step = state["step"]
            self.optimizer.load_state_dict(state["optimizer"])
            for key, module in modules.items():
                module.load_state_dict(state[key])

    def save(self) -> None:
        """Writes the checkpoint whole or not at all."""
        state = {key: module.state_dict() for key, module in self.modules.items()}
        state |= {"step": self.step, "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.file.with_suffix(".tmp"))
        os.replace(self.file.with_suffix(".tmp"), self.file)

    def run(self, data: Dataset, batch: int | None, steps: int, losses, every: int):
        """Trains to ``steps``; ``losses(items)`` returns named losses to add up.

        ``batch`` items of ``data`` make a step; None: an item is a batch already.
        """
        rest = range(self.step * (batch or 1), steps * (batch or 1))
        stream = DataLoader(
            Subset(data, rest), batch, num_workers=1, prefetch_factor=10
        )
        began = time.monotonic()
        for items in stream:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * cosine(self.step, steps)
            parts = losses(items)
            total = sum(parts.values())
            if not torch.isfinite(total):
                raise ValueError(f"{self.name}: loss is {total} at step {self.step}")
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()
            params = [p for g in self.optimizer.param_groups for p in g["params"]]
            norm = nn.utils.clip_grad_norm_(params, 1.0)
            self.optimizer.step()
            self.step += 1
            if self.step % 20 == 0:
                row = {"stage": self.name, "step": self.step, "grad_norm": float(norm)}
                row |= {k: round(float(v.detach()), 4) for k, v in parts.items()}
                row["seconds"] = round(time.monotonic() - began, 1)
                append_jsonl(self.out / "training_log.jsonl", row)
                print(row, flush=True)
            if self.step % every == 0 or self.step == steps:
                self.save()


def train_vision(plan: Plan, out: Path, visual: nn.Module) -> None:
    """Stage one: the merged tokens learn to tell what stands where."""
    width = visual.config.hidden_size
    heads = CellHeads(width)
    stage = Stage("vision", out, {"visual": visual, "heads": heads}, plan.vision_lr)

    def losses(items):
        pictures, targets, place = items
        tokens = visual(patchify(pictures), grid_thw=grid(len(pictures))).pooler_output
        return heads.loss(tokens.view(len(pictures), -1, width), targets, place)

    stage.run(
        Views(plan), plan.vision_batch, plan.vision_steps, losses, plan.save_every
    )


@torch.no_grad()
def align_words(
    model: nn.Module, heads: dict[str, Tensor], tokenizer: Qwen2Tokenizer
) -> None:
    """Starts the words for kinds and colours from what the vision stage learned.

    A token of a cup then points the way of the word " cup": pictures and words share
    a space, as in a real vision tower trained with captions.
    """
    embeddings = model.get_input_embeddings().weight
    for words, rows in (
        (KINDS, heads["kind.weight"]),
        (COLOURS, heads["colour.weight"]),
    ):
        for number, word in enumerate(words, start=1):
            ids = tokenizer(f" {word}").input_ids
            assert len(ids) == 1, f"{word!r} is not one token"
            row = rows[number]
            embeddings[ids[0]] = row / row.norm() * embeddings.norm(dim=1).mean()


def train_language(plan: Plan, out: Path, model: nn.Module, tokenizer) -> None:
    """Stage two: all parameters learn the lessons."""
    stage = Stage("language", out, {"model": model}, plan.language_lr)
    image_token = model.config.image_token_id
    guide = AttentionGuide(model.model.language_model.layers)

    def losses(batch):
        frozen = stage.step < TOWER_FROZEN_UNTIL * plan.language_steps
        model.model.visual.requires_grad_(not frozen)
        looks = batch.pop("looks")
        types = (batch["input_ids"] == image_token).int()
        out = model(**batch, mm_token_type_ids=types, use_cache=False)
        guided = {k: LOOK_WEIGHT * v for k, v in guide.loss(looks).items()}
        return {"loss": out.loss, **guided}

    data = Lessons(plan, tokenizer)
    stage.run(data, None, plan.language_steps, losses, plan.save_every)


def main() -> None:
    """Command line: ``python -m univg_nb.pretrain --out DIR [--KEY VALUE]``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("vision", "language"))
    for key, value in asdict(Plan()).items():
        parser.add_argument(
            f"--{key.replace('_', '-')}", type=type(value), default=value
        )
    args = vars(parser.parse_args())
    out, only = args.pop("out"), args.pop("only")
    plan = Plan(**args)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus())
    model = build_model(tokenizer, plan.seed)
    if only != "language":
        train_vision(plan, out, model.model.visual)
    if only == "vision":
        return
    state = torch.load(out / "vision.pt", weights_only=True)
    model.model.visual.load_state_dict(state["visual"])
    align_words(model, state["heads"], tokenizer)
    train_language(plan, out, model, tokenizer)
    model.save_pretrained(out / "model")
    build_processor(tokenizer).save_pretrained(out / "model")
    shutil.copy(out / "training_log.jsonl", out / "model")


if __name__ == "__main__":
    main()

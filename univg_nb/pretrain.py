"""Makes the shipped base model from nothing: ``make base``.

Two stages, both on pictures drawn as they are needed: the vision tower learns to
see (:mod:`univg_nb.pretrain_vision`), then the whole model learns the lessons of
:mod:`univg_nb.minimig.lessons` as dialogues, with loss on the replies only. A run
that was stopped goes on from its last checkpoint with the same data and weights.
"""

import argparse
import os
import time
from dataclasses import asdict, dataclass
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Qwen2Tokenizer

from univg_nb.minimig.lessons import Lesson, corpus, lesson, scene_for
from univg_nb.minimig.scenes import PLACES
from univg_nb.pretrain_vision import (
    CELLS,
    CellHeads,
    cell_targets,
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
    language_steps: int = 1800
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


def dialogue(item: Lesson, tokenizer: Qwen2Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids and labels (-100 where no loss is taken) of a lesson's dialogue.

    Equal to the chat template applied to all its turns; loss falls on each reply and
    its end token.
    """
    ids: list[int] = []
    labels: list[int] = []
    pictures = PICTURE * len(item.scenes)
    for k, (question, reply) in enumerate(item.turns):
        opening = (SYSTEM if k == 0 else "\n") + "<|im_start|>user\n"
        asked = opening + (pictures if k == 0 else "") + question
        asked += "<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(asked).input_ids
        answer = tokenizer(reply + "<|im_end|>").input_ids
        ids += prompt + answer
        labels += [-100] * len(prompt) + answer
    return ids, labels


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
            several = 0.1 if progress < 0.15 else 0.35
            item = lesson(rng, crowding(2 * progress), several=several)
            pictures = torch.from_numpy(np.stack([seen(s, rng) for s in item.scenes]))
            ids, labels = dialogue(item, self.tokenizer)
            items.append((pictures, torch.tensor(ids), torch.tensor(labels)))
        items.sort(key=lambda item: len(item[1]))
        pad = self.tokenizer.pad_token_id
        batches = [
            collate(items[size * k : size * (k + 1)], pad) for k in range(self.WINDOW)
        ]
        return [batches[k] for k in rng.permutation(self.WINDOW)]


def collate(items: list[tuple[Tensor, Tensor, Tensor]], pad: int) -> dict[str, Tensor]:
    """Pads dialogues on the right and joins their pictures in order.

    No attention mask: under a causal mask nothing looks at padding on the right, and
    without it attention takes its faster path.
    """
    pictures = torch.cat([p for p, _, _ in items])
    return {
        "input_ids": pad_sequence([i for _, i, _ in items], True, pad),  # (B, T)
        "labels": pad_sequence([x for _, _, x in items], True, -100),
        "pixel_values": patchify(pictures),
        "image_grid_thw": grid(len(pictures)),
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


def train_language(plan: Plan, out: Path, model: nn.Module, tokenizer) -> None:
    """Stage two: all parameters learn the lessons."""
    stage = Stage("language", out, {"model": model}, plan.language_lr)
    image_token = model.config.image_token_id

    def losses(batch):
        types = (batch["input_ids"] == image_token).int()
        return {"loss": model(**batch, mm_token_type_ids=types, use_cache=False).loss}

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
    state = torch.load(out / "vision.pt", weights_only=True)["visual"]
    model.model.visual.load_state_dict(state)
    train_language(plan, out, model, tokenizer)
    model.save_pretrained(out / "model")
    build_processor(tokenizer).save_pretrained(out / "model")


if __name__ == "__main__":
    main()

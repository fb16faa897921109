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
from dataclasses import asdict
from math import cos, pi
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Qwen2Tokenizer

from univg_nb.minimig.lessons import corpus
from univg_nb.minimig.pictograms import COLOURS, KINDS
from univg_nb.pretrain_data import Lessons, Plan, Views
from univg_nb.pretrain_guide import AttentionGuide
from univg_nb.pretrain_vision import CellHeads, grid, patchify
from univg_nb.runs import append_jsonl
from univg_nb.tiny_model import build_model, build_processor, train_tokenizer

TOWER_FROZEN_UNTIL = 0.15  # share of the language stage
LOOK_WEIGHT = 0.5  # of each guiding loss beside the loss on the replies


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

"""Train the shipped base model from random weights: `make base`.

There are four stages, on pictures that are drawn meanwhile: the vision tower learns to
see (`vision`); the whole model learns the `lessons` as dialogues, with the loss on the
replies; it learns to repeat words of the whole vocabulary; and last it learns to tell
several pictures apart (`albums`). An interrupted run continues from its last checkpoint
with the same data and weights.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration

from univg_nb import errors
from univg_nb.base_model.architecture import (
    build_model,
    build_processor,
    train_tokenizer,
)
from univg_nb.base_model.data import Albums, Lessons, Plan, Views, Words
from univg_nb.base_model.guide import AttentionGuide
from univg_nb.base_model.lessons import generate_corpus
from univg_nb.base_model.muon import Muon
from univg_nb.base_model.vision import CellHeads, make_image_grid_thw, patchify
from univg_nb.io import append_jsonl, open_atomically
from univg_nb.minimig.pictograms import COLORS, KINDS

TOWER_FROZEN_UNTIL = 0.4  # share of the language stage
UNUSED_LENGTH = 0.1  # what is left of the embedding of a word that no text uses
WORDS_SHARE = 0.4  # learning rates of the third stage, as a share of the second's
ALBUMS_SHARE = 0.7  # and of the fourth
LOOK_WEIGHT = 0.5  # of each guiding loss, beside the loss on the replies

Losses = Callable[[Any], dict[str, Tensor]]  # of a batch, by name


def compute_lr_factor(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: a warm-up, then a cosine."""
    warmup, floor = 100, 0.03
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (
        1 + cos(pi * (step - warmup) / (steps - warmup))
    )


def make_optimizers(
    modules: list[nn.Module], lr: float, matrix_lr: float
) -> list[Optimizer]:
    """Return Muon for the matrices of layers and merger, AdamW for all the rest.

    Args:
        modules: what is trained.
        lr: AdamW's learning rate.
        matrix_lr: Muon's.
    """
    params = {
        name: param
        for module in modules
        for name, param in module.named_parameters()
        if param.requires_grad
    }
    inner = [
        name
        for name, param in params.items()
        if param.ndim == 2 and {"blocks", "layers", "merger"} & set(name.split("."))
    ]
    matrices = [params.pop(name) for name in inner]
    rest = {"lr": lr, "betas": (0.9, 0.98), "weight_decay": 0.0}
    return [Muon(matrices, matrix_lr), AdamW(params.values(), **rest)]


class Stage:
    """The loop of one stage: checkpoint, resume, schedule, log.

    Args:
        name: of the stage and its checkpoint.
        out: folder of checkpoints and log.
        modules: what is trained, by the name in the checkpoint.
        lr: AdamW's peak learning rate.
        matrix_lr: Muon's.
    """

    def __init__(
        self,
        name: str,
        out: Path,
        modules: Mapping[str, nn.Module],
        lr: float,
        matrix_lr: float,
    ) -> None:
        self.name, self.out, self.modules = name, out, modules
        self.optimizers = make_optimizers([*modules.values()], lr, matrix_lr)
        self.peaks = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.file = out / f"{name}.pt"
        self.step = 0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.step = state["step"]
            for optimizer, saved in zip(
                self.optimizers, state["optimizers"], strict=True
            ):
                optimizer.load_state_dict(saved)
            for key, module in modules.items():
                module.load_state_dict(state[key])

    def save(self) -> None:
        """Write the checkpoint."""
        state: dict[str, Any]
        state = {key: module.state_dict() for key, module in self.modules.items()}
        state |= {"optimizers": [o.state_dict() for o in self.optimizers]}
        state["step"] = self.step
        with open_atomically(self.file, "wb") as file:
            torch.save(state, file)

    def _set_rates(self, share: float) -> None:
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share

    def run(
        self, data: Dataset, batch: int | None, steps: int, losses: Losses, every: int
    ) -> None:
        """Train from the last checkpoint to `steps`.

        Args:
            data: the items, in order.
            batch: items of a step; None if an item is a batch already.
            steps: last step.
            losses: returns the losses of a batch; their sum is minimized.
            every: steps between checkpoints.

        Raises:
            ValueError: if the loss is not finite.
        """
        rest = range(self.step * (batch or 1), steps * (batch or 1))
        stream = DataLoader(
            Subset(data, rest), batch, num_workers=1, prefetch_factor=10
        )
        began = time.monotonic()
        for items in stream:
            self._set_rates(compute_lr_factor(self.step, steps))
            parts = losses(items)
            total = sum(parts.values())
            if not torch.isfinite(total):
                raise ValueError(f"{self.name}: loss is {total} at step {self.step}")
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            total.backward()
            params = [p for m in self.modules.values() for p in m.parameters()]
            norm = nn.utils.clip_grad_norm_(params, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            if self.step % 20 == 0 or self.step == steps:
                row = {"stage": self.name, "step": self.step, "grad_norm": float(norm)}
                row |= {k: round(float(v.detach()), 4) for k, v in parts.items()}
                row["seconds"] = round(time.monotonic() - began, 1)
                append_jsonl(self.out / "training_log.jsonl", row)
                print(row, flush=True)
            if self.step % every == 0 or self.step == steps:
                self.save()


def train_vision(plan: Plan, out: Path, model: Qwen2VLForConditionalGeneration) -> None:
    """Train the vision tower to tell what is where (stage one).

    Args:
        plan: sizes and learning rates.
        out: folder of checkpoints and log.
        model: the model; only its tower changes.
    """
    visual = model.model.visual
    width = visual.config.hidden_size
    heads = CellHeads(width)
    modules = {"visual": visual, "heads": heads}
    stage = Stage("vision", out, modules, plan.vision_lr, plan.matrix_lr)

    def losses(items: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        pictures, targets, place = items
        grid = make_image_grid_thw(len(pictures))
        tokens = visual(patchify(pictures), grid_thw=grid).pooler_output
        return heads.loss(tokens.view(len(pictures), -1, width), targets, place)

    stage.run(
        Views(plan), plan.vision_batch, plan.vision_steps, losses, plan.save_every
    )


@torch.no_grad()
def align_words(
    model: Qwen2VLForConditionalGeneration,
    heads: Mapping[str, Tensor],
    tokenizer: Qwen2Tokenizer,
) -> None:
    """Initialize the embeddings of kinds and colors from the heads of the vision stage.

    A token of a cup then has the direction of the word " cup": pictures and words share
    a space, as in a real vision tower trained with captions.

    Args:
        model: the model.
        heads: state of `CellHeads`.
        tokenizer: the model's.
    """
    embeddings = model.get_input_embeddings().weight
    for words, rows in (
        (KINDS, heads["kind.weight"]),
        (COLORS, heads["color.weight"]),
    ):
        for number, word in enumerate(words, start=1):
            ids = tokenizer(f" {word}").input_ids
            assert len(ids) == 1, f"{word!r} is not one token"
            row = rows[number]
            embeddings[ids[0]] = row / row.norm() * embeddings.norm(dim=1).mean()


@torch.no_grad()
def shrink_unused(
    model: Qwen2VLForConditionalGeneration, tokenizer: Qwen2Tokenizer
) -> None:
    """Shorten the embeddings of the words that no sentence of this world uses.

    They keep their initial length, twice that of the trained ones, and hundreds of them
    each take a little probability of every uncertain next token: greedy replies do not
    show it, but most sampled ones contained a meaningless word. In a long pre-training
    weight decay has the same effect.

    Args:
        model: the model.
        tokenizer: its tokenizer.
    """
    used = {*tokenizer.all_special_ids}
    used.update(*tokenizer([*set(generate_corpus())]).input_ids)
    embeddings = model.get_input_embeddings().weight  # (V, H), the head's too
    unused = [i for i in range(len(embeddings)) if i not in used]
    embeddings[unused] *= UNUSED_LENGTH


def train_language(
    plan: Plan,
    out: Path,
    model: Qwen2VLForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
) -> None:
    """Train the whole model (stages two to four): lessons, all words, several pictures.

    The lessons use half of the vocabulary. Without the stage of the words, the others
    would keep embeddings that no reply ever told apart, which a fine-tuning of the
    layers alone cannot correct.

    Args:
        plan: sizes and learning rates.
        out: folder of checkpoints and log.
        model: the model after the vision stage.
        tokenizer: its tokenizer.
    """
    guide = AttentionGuide(model.model.language_model.layers)
    image_token = model.config.image_token_id

    def losses(batch: dict[str, Any]) -> dict[str, Tensor]:
        looks = batch.pop("looks")
        types = (batch["input_ids"] == image_token).int()
        out = model(**batch, mm_token_type_ids=types, use_cache=False)
        guided = {k: LOOK_WEIGHT * v for k, v in guide.loss(looks).items()}
        return {"loss": out.loss, **guided}

    def losses_of_lessons(batch: dict[str, Any]) -> dict[str, Tensor]:
        frozen = lessons.step < TOWER_FROZEN_UNTIL * plan.language_steps
        model.model.visual.requires_grad_(not frozen)
        return losses(batch)

    modules = {"model": model}
    lessons = Stage("language", out, modules, plan.language_lr, plan.matrix_lr)
    data = Lessons(plan, tokenizer)
    lessons.run(data, None, plan.language_steps, losses_of_lessons, plan.save_every)
    model.model.visual.requires_grad_(False)
    lr, matrix_lr = (WORDS_SHARE * v for v in (plan.language_lr, plan.matrix_lr))
    words = Stage("words", out, modules, lr, matrix_lr)
    words.run(Words(plan, tokenizer), None, plan.words_steps, losses, plan.save_every)
    model.model.visual.requires_grad_(True)  # which has seen no close-ups yet
    lr, matrix_lr = (ALBUMS_SHARE * v for v in (plan.language_lr, plan.matrix_lr))
    albums = Stage("albums", out, modules, lr, matrix_lr)
    data = Albums(plan, tokenizer)
    albums.run(data, None, plan.albums_steps, losses, plan.save_every)
    shrink_unused(model, tokenizer)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the base model; the values of `Plan` are options."""
    parser = argparse.ArgumentParser(
        prog="python -m univg_nb.base_model.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m univg_nb.base_model.training --out runs/base",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--only", choices=("vision", "language"), help="stages to run")
    for key, value in asdict(Plan()).items():
        option = f"--{key.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    out, only = options.pop("out"), options.pop("only")
    plan = Plan(**options)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(generate_corpus())
    model = build_model(tokenizer, plan.seed)
    if only != "language":
        train_vision(plan, out, model)
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
    raise SystemExit(errors.run(main))

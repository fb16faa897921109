"""Makes the shipped base model from nothing: ``make base``.

Four stages on pictures drawn as they are needed: the vision tower learns to see
(:mod:`univg_nb.pretrain_vision`), the whole model learns the lessons of
:mod:`univg_nb.minimig.lessons` as dialogues, with loss on the replies only, then to
repeat words of the whole vocabulary, and last to tell several pictures apart
(:mod:`univg_nb.minimig.albums`). A run that was stopped goes on from its last
checkpoint with the same data and weights.
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
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Qwen2Tokenizer

from univg_nb.minimig.lessons import corpus
from univg_nb.minimig.pictograms import COLOURS, KINDS
from univg_nb.muon import Muon
from univg_nb.pretrain_data import Albums, Lessons, Plan, Views, Words
from univg_nb.pretrain_guide import AttentionGuide
from univg_nb.pretrain_vision import CellHeads, grid, patchify
from univg_nb.runs import append_jsonl
from univg_nb.tiny_model import build_model, build_processor, train_tokenizer

TOWER_FROZEN_UNTIL = 0.4  # share of the language stage
WORDS_SHARE = 0.4  # learning rates of the third stage, as a share of the second's
ALBUMS_SHARE = 0.7  # and of the fourth
LOOK_WEIGHT = 0.5  # of each guiding loss beside the loss on the replies


def cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.03) -> float:
    """Warm-up, then a cosine from 1 down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (
        1 + cos(pi * (step - warmup) / (steps - warmup))
    )


def optimizers_for(
    modules: list[nn.Module], lr: float, matrix_lr: float
) -> list[Optimizer]:
    """Muon for the matrices of layers and merger, AdamW for all other parameters."""
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
    """A stage's loop: checkpoint, resume, schedule, log."""

    def __init__(
        self,
        name: str,
        out: Path,
        modules: dict[str, nn.Module],
        lr: float,
        matrix_lr: float,
    ):
        self.name, self.out, self.modules = name, out, modules
        self.optimizers = optimizers_for([*modules.values()], lr, matrix_lr)
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
        """Writes the checkpoint whole or not at all."""
        state = {key: module.state_dict() for key, module in self.modules.items()}
        state |= {"optimizers": [o.state_dict() for o in self.optimizers]}
        state["step"] = self.step
        torch.save(state, self.file.with_suffix(".tmp"))
        os.replace(self.file.with_suffix(".tmp"), self.file)

    def _set_rates(self, share: float) -> None:
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share

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
            self._set_rates(cosine(self.step, steps))
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
    modules = {"visual": visual, "heads": heads}
    stage = Stage("vision", out, modules, plan.vision_lr, plan.matrix_lr)

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


UNUSED_LENGTH = 0.1  # of an unused word's embedding, as a share of what it was


@torch.no_grad()
def shrink_unused(model: nn.Module, tokenizer: Qwen2Tokenizer) -> None:
    """Shortens the embeddings of the words that no sentence of this world uses.

    They keep the length they were drawn with, twice that of the trained ones, and
    hundreds of them each take a little of every next token that is not quite sure:
    greedy replies do not show it, but most sampled ones held a word without sense.
    Weight decay does this over a long pre-training.
    """
    used = {*tokenizer.all_special_ids}
    for text in corpus():
        used.update(tokenizer(text).input_ids)
    embeddings = model.get_input_embeddings().weight  # (V, H), the head's too
    unused = [i for i in range(len(embeddings)) if i not in used]
    embeddings[unused] *= UNUSED_LENGTH


def train_language(plan: Plan, out: Path, model: nn.Module, tokenizer) -> None:
    """Stages two to four: the lessons, all words, several pictures.

    The lessons use half of the vocabulary. The other words would keep embeddings that
    no reply ever told apart, which a fine-tuning of the layers alone cannot mend.
    """
    guide = AttentionGuide(model.model.language_model.layers)
    image_token = model.config.image_token_id

    def losses(batch):
        looks = batch.pop("looks")
        types = (batch["input_ids"] == image_token).int()
        out = model(**batch, mm_token_type_ids=types, use_cache=False)
        guided = {k: LOOK_WEIGHT * v for k, v in guide.loss(looks).items()}
        return {"loss": out.loss, **guided}

    def tower_rests(batch):
        frozen = lessons.step < TOWER_FROZEN_UNTIL * plan.language_steps
        model.model.visual.requires_grad_(not frozen)
        return losses(batch)

    modules = {"model": model}
    lessons = Stage("language", out, modules, plan.language_lr, plan.matrix_lr)
    data = Lessons(plan, tokenizer)
    lessons.run(data, None, plan.language_steps, tower_rests, plan.save_every)
    model.model.visual.requires_grad_(False)
    lr, matrix_lr = (WORDS_SHARE * v for v in (plan.language_lr, plan.matrix_lr))
    words = Stage("words", out, modules, lr, matrix_lr)
    words.run(Words(plan, tokenizer), None, plan.words_steps, losses, plan.save_every)
    model.model.visual.requires_grad_(True)  # close-ups are new to the tower
    lr, matrix_lr = (ALBUMS_SHARE * v for v in (plan.language_lr, plan.matrix_lr))
    albums = Stage("albums", out, modules, lr, matrix_lr)
    data = Albums(plan, tokenizer)
    albums.run(data, None, plan.albums_steps, losses, plan.save_every)
    shrink_unused(model, tokenizer)


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

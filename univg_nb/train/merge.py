"""Is a merged model still the model that was trained?

Folding a LoRA adapter into the weights it was trained on changes rounding only. After
QLoRA it is folded into the unrounded base, a base that it never saw: then the
difference is that of the four bits, and is worth a number.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from univg_nb import models, runs
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate.replies import reply
from univg_nb.train.collator import IGNORE, VisionCollator, tokenize

# DOC of merge:
# """Adapters folded into the weights: a folder that transformers and vLLM load.

#     python -m univg_nb merge --model M --adapter A --scale full --out FOLDER
#     vllm serve FOLDER
#     python -m univg_nb generate --server http://127.0.0.1:8000/v1 \\
#         --model FOLDER --scale full ...

# An adapter of stage 2 takes the place of that of stage 1, so one is enough. A fully
# trained model is given as --adapter too: it gets the base's processor (see `write`).
# """

AT_ONCE = 8  # samples in one batch


def merge_check(
    model_cfg: Mapping[str, Any],
    adapter: str | Path,
    samples: Sequence[GroundingSample],
    max_new_tokens: int,
    quantize: Literal["nf4"] | None = None,
) -> dict[str, float | int]:
    """The model as trained (on an NF4 base with `quantize`) against the merged one.

    Returns samples, same_replies (greedy replies that are equal, of `samples`), and
    over all tokens of the samples' own replies max_logit_difference,
    mean_logit_difference and, to compare them with, logit_std; reloaded_difference:
    the largest one between the merged model and itself, saved and loaded by
    transformers alone.
    """
    trained, processor = models.load(model_cfg, adapter, quantize=quantize)
    merged, _ = models.load(model_cfg, adapter, merge=True)
    with TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        plain = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=merged.dtype,
            attn_implementation=merged.config._attn_implementation,
        )
    plain.to(merged.device).eval()
    largest = reloaded = 0.0
    sums, count, same = torch.zeros(3, dtype=torch.float64), 0, 0
    for start in range(0, len(samples), AT_ONCE):
        part = samples[start : start + AT_ONCE]
        expected, made, again = (
            logits(model, processor, part) for model in (trained, merged, plain)
        )  # (tokens, V) each
        gap = (made - expected).abs()
        largest = max(largest, gap.max().item())
        parts = (gap, expected, expected.square())
        sums += torch.stack([part.double().sum().cpu() for part in parts])
        count += gap.numel()
        reloaded = max(reloaded, (again - made).abs().max().item())
        answers = [
            reply(model, processor, part, max_new_tokens=max_new_tokens)
            for model in (trained, merged)
        ]
        same += sum(a.response == b.response for a, b in zip(*answers, strict=True))
    gap, mean, square = (sums / count).tolist()
    return {
        "samples": len(samples),
        "same_replies": same,
        "max_logit_difference": largest,
        "mean_logit_difference": gap,
        "logit_std": (square - mean**2) ** 0.5,
        "reloaded_difference": reloaded,
    }


@torch.no_grad()
def logits(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[GroundingSample],
) -> Tensor:
    """Logits (tokens, V) from which the tokens of the samples' own replies come."""
    batch = VisionCollator(processor)(list(tokenize(samples, processor)))
    carried = batch.pop("labels")[:, 1:] != IGNORE  # position t predicts token t + 1
    batch = {k: v.to(model.device) for k, v in batch.items() if k != "sample_index"}
    return model(**batch).logits[:, :-1][carried.to(model.device)].float()


def merged(
    model_cfg: Mapping[str, Any], adapters: Sequence[str | Path]
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """(model, processor) with `adapters`, at least one, each on top of the last.

    Into unrounded weights: after QLoRA too, see models.load.
    """
    model, processor = models.load(model_cfg, adapters[0], merge=True)
    for path in adapters[1:]:
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    return model, processor


def write(
    model_cfg: Mapping[str, Any], adapters: Sequence[str | Path], out: str | Path
) -> Path:
    """Save `merged`, whole or not at all. ValueError if `out` exists.

    The processor is saved with the base model's own pixel limits, not the scale's:
    pictures are sent to a server at the size they are to have, and it must not shrink
    them again.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"--out {out} exists; remove it or name another folder")
    # Nothing attends here: no need of flash-attn, nor of a GPU that has it.
    model, _ = merged({**model_cfg, "attn_implementation": "sdpa"}, adapters)
    processor = models.load_processor({"name_or_path": model_cfg["name_or_path"]})
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    os.replace(unfinished, out)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; a user's mistake ends as one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m univg_nb merge")
    add = parser.add_argument
    add("--model", required=True, help='"tiny", a local folder or a hub name')
    add("--adapter", nargs="+", required=True, help="each on top of the last")
    add("--scale", required=True, help="name or .yaml, for the dtype")
    add("--out", required=True, help="folder to write; must not exist")
    options = parser.parse_args(arguments)
    try:
        section = runs.load_scale(options.scale)["model"]
        section = {**section, "name_or_path": options.model}
        print(write(section, options.adapter, options.out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

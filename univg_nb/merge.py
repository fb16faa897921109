"""Adapters folded into the weights: a folder that transformers and vLLM load.

    python -m univg_nb.merge --model M --adapter A --scale full --out FOLDER
    vllm serve FOLDER
    python -m univg_nb.evaluate generate --server http://127.0.0.1:8000/v1 \\
        --model FOLDER --scale full ...

An adapter of stage 2 takes the place of that of stage 1, so one is enough. A fully
trained model is given as --adapter too: it gets the base's processor (see `write`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from univg_nb import models, runs


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
    parser = argparse.ArgumentParser(prog="python -m univg_nb.merge")
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

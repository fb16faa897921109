"""Evaluation from the command line: generate, score, compare, report.

    python -m univg_nb.evaluate generate --records F --model tiny --out P.jsonl
    python -m univg_nb.evaluate score --records F --predictions P.jsonl --out S.json
    python -m univg_nb.evaluate compare A.jsonl B.jsonl --records F
    python -m univg_nb.evaluate report base=A.jsonl sft=B.jsonl --records F --out R.html

`score` and `compare` import neither torch nor transformers. The device is the one torch
sees: nothing here sets CUDA_VISIBLE_DEVICES (PF E6). Several GPUs share `generate` by
`torchrun --nproc_per_node 8 -m univg_nb.evaluate generate ...`, or by --shard; a vLLM
server answers with `generate --server http://127.0.0.1:8000/v1`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from univg_nb import evaluate_options, runs, samples, score_text
from univg_nb.generation import generate
from univg_nb.image_paths import flatten_image_paths, missing_images
from univg_nb.predictions import named_files
from univg_nb.score_files import compare, score, select

__all__ = ["compare", "flatten_image_paths", "generate", "main", "score", "select"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; users' mistakes end as one line on stderr and exit code 2."""
    options = evaluate_options.parser().parse_args(arguments)
    try:
        _COMMANDS[options.command](options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# ---------------------------------------------------------------- generate


def _run_generate(options: argparse.Namespace) -> None:
    items = _items(options)
    indices = select(items, options.only)
    if options.allow_missing:
        absent = missing_images(items, indices)
        indices = [i for i in indices if i not in absent]
        print(f"{len(absent)} items left out: an image is missing")
    config = _scale(options)
    model, processor = (_served if options.server else _load)(config["model"], options)
    summary = generate(
        model,
        processor,
        items,
        options.out,
        style=options.style,
        max_new_tokens=options.max_new_tokens or config["evaluate"]["max_new_tokens"],
        batch_size=options.batch_size or config["evaluate"]["batch_size"],
        temperature=options.temperature,
        num_return_sequences=options.num_return_sequences,
        seed=options.seed,
        indices=indices,
        facts={
            "model": options.model,
            "adapters": options.adapter,
            "quantize": options.quantize,
            "records": Path(options.records).name,
        },
        fresh=options.fresh,
        shard=_shard(options.shard),
    )
    print(
        f"{summary['replies']} replies in {options.out} ({summary['new']} new, "
        f"{summary['truncated']} truncated) in {summary['seconds']} s"
    )


def _items(options: argparse.Namespace) -> list[samples.GroundingSample]:
    """The records, with images looked for where the command line says."""
    items = samples.read(options.records, image_root=options.image_root)
    if options.flat_images:
        if options.image_root is None:
            raise ValueError("--flat-images needs --image-root, the folder to look in")
        only = select(items, options.only) if "only" in options else range(len(items))
        items = flatten_image_paths(items, only, options.image_root)
    return items


def _scale(options: argparse.Namespace) -> dict:
    """The scale's configuration with the command line's model and --set on top, and
    the pixel limit of the benchmark in between."""
    from univg_nb.benchmarks import ZERO_SHOT_FORMATS, model_section

    if options.scale is None and options.model != "tiny":
        raise ValueError(
            f"--model {options.model}: give --scale too (small, full or a .yaml file); "
            "it holds the pixel limits, dtype and batch size"
        )
    config = runs.load_scale(options.scale or "tiny")
    row = next(samples.iter_rows(options.records), {})
    kind = samples.detect_format(row, options.records)
    config["model"] = model_section(config, kind in ZERO_SHOT_FORMATS)
    config["model"]["name_or_path"] = options.model
    for assignment in options.set:
        config = runs.override(config, assignment)
    return config


def _shard(text: str | None) -> tuple[int, int]:
    """ "2/8" -> (2, 8); without it what torchrun or accelerate launch say."""
    if text is None:
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        return int(rank), int(world)
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise ValueError(f"--shard {text}: write K/N, as 0/8 for the first of eight")
    return int(number), int(count)


def _load(model_config: dict, options: argparse.Namespace) -> tuple:
    """Model and processor; several adapters go on top of each other, in order."""
    from univg_nb import merge, models

    if options.quantize and len(options.adapter) > 1:
        raise ValueError("--quantize takes one --adapter: 4-bit weights do not merge")
    if options.quantize or not options.adapter:
        (adapter,) = options.adapter or [None]
        made = models.load(model_config, adapter, quantize=options.quantize)
    else:
        made = merge.merged(model_config, options.adapter)
    model, processor = made
    return model.eval(), processor


def _served(model_config: dict, options: argparse.Namespace) -> tuple:
    """A model that a server holds, and the processor for the same name."""
    from univg_nb import models
    from univg_nb.served import Served

    if options.adapter or options.quantize:
        raise ValueError(
            "--server answers with what it serves: merge the adapter (python -m "
            "univg_nb.merge), serve the merged folder and give it as --model, without "
            "--adapter and --quantize"
        )
    processor = models.load_processor(model_config)
    own = models.load_processor({"name_or_path": options.model}).image_processor.size
    asked = processor.image_processor.size
    if own["longest_edge"] < asked["longest_edge"]:
        raise ValueError(
            f"the processor in {options.model} shrinks images to "
            f"{own['longest_edge']} pixels, and so would a server, but "
            f"{asked['longest_edge']} are asked for; serve a folder that python -m "
            "univg_nb.merge wrote"
        )
    return Served(options.server, options.model), processor


# ---------------------------------------------------------------- the others


def _run_score(options: argparse.Namespace) -> None:
    result = score(
        options.records,
        options.predictions,
        image_root=options.image_root,
        only=options.only,
        out=options.out,
        parser=options.parser,
        rule=options.rule,
        stretch=options.migician_stretch,
        allow_missing=options.allow_missing,
        expected=options.expected,
    )
    name = result["benchmark"]["name"]
    print(f"benchmark {name} · {result['items_in_records']} items in the records")
    print(f"parser {options.parser} · rule {options.rule}")
    table = score_text.expected_table if options.expected else score_text.score_table
    print(table(result))


def _run_compare(options: argparse.Namespace) -> None:
    files = named_files([options.a, options.b])
    result = compare(
        options.records,
        *files.values(),
        image_root=options.image_root,
        parser=options.parser,
        rule=options.rule,
        allow_missing=options.allow_missing,
        out=options.out,
    )
    print(score_text.compare_table(result))
    if options.page:
        _write_page(options, files, options.page)


def _run_report(options: argparse.Namespace) -> None:
    _write_page(options, named_files(options.predictions), options.out)


def _write_page(options: argparse.Namespace, files: dict[str, Path], out: str) -> None:
    from univg_nb import report

    written = report.write(
        options.records,
        _items(options),
        files,
        out,
        parser=options.parser,
        rule=options.rule,
        allow_missing=options.allow_missing,
        column=options.column,
        cases=options.cases,
    )
    print("written:", *written)


_COMMANDS = {
    "generate": _run_generate,
    "score": _run_score,
    "compare": _run_compare,
    "report": _run_report,
}


if __name__ == "__main__":
    raise SystemExit(main())

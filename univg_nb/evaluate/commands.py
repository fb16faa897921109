"""The command line of `univg_nb.evaluate.commands`: its commands and their options."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from univg_nb import runs
from univg_nb.data import files as samples
from univg_nb.data import prompts, sample
from univg_nb.data.images import flatten_image_paths, missing_images
from univg_nb.evaluate import score as score_text
from univg_nb.evaluate import scoring
from univg_nb.evaluate.generate import generate
from univg_nb.evaluate.predictions import named_files
from univg_nb.evaluate.score import compare, score, select

# DOC of evaluate:
# """Evaluation from the command line: generate, score, compare, report.

#     python -m univg_nb generate --records F --model tiny --out P.jsonl
#     python -m univg_nb score --records F --predictions P.jsonl --out S.json
#     python -m univg_nb compare A.jsonl B.jsonl --records F
#     python -m univg_nb report base=A.jsonl sft=B.jsonl --records F --out R.html

# `score` and `compare` import neither torch nor transformers. The device is the one torch
# sees: nothing here sets CUDA_VISIBLE_DEVICES (PF E6). Several GPUs share `generate` by
# `torchrun --nproc_per_node 8 -m univg_nb generate ...`, or by --shard; a vLLM
# server answers with `generate --server http://127.0.0.1:8000/v1`.
# """


def parser() -> argparse.ArgumentParser:
    """Its result has the command's name under `command`."""
    made = argparse.ArgumentParser(
        prog="python -m univg_nb.evaluate.commands",
        description="Evaluation from the command line.",
    )
    commands = made.add_subparsers(required=True, dest="command")
    _generate_arguments(commands.add_parser("generate", help="write predictions.jsonl"))
    one = commands.add_parser("score", help="score predictions, write scores.json")
    one.add_argument("--predictions", required=True)
    one.add_argument(
        "--expected",
        action="store_true",
        help="several sampled replies an item: means over replies",
    )
    one.add_argument(
        "--migician-stretch",
        action="store_true",
        help="stretch the boxes as for Migician's published row, and no other",
    )
    _add_only(one)
    two = commands.add_parser("compare", help="two prediction files, paired tests")
    for name in ("a", "b"):
        two.add_argument(name, metavar=f"[NAME=]{name.upper()}")
    two.add_argument("--page", help="HTML page to write: wins and losses as pictures")
    page = commands.add_parser("report", help="one HTML page and its tables as .md")
    page.add_argument(
        "predictions", nargs="+", metavar="[NAME=]FILE", help="one for each model"
    )
    page.add_argument("--out", required=True, help="page; the .md goes beside it")
    for command in (two, page):
        _page_arguments(command)
    for command in (one, two, page):
        command.add_argument("--records", required=True, help="annotation file")
        command.add_argument("--parser", choices=scoring.PARSERS, default="answer")
        command.add_argument(
            "--rule",
            choices=scoring.RULES,
            default="one",
            help="items with several boxes: the released one box, or any of them",
        )
        command.add_argument("--allow-missing", action="store_true")
        command.add_argument(
            "--image-root",
            help="folder that image paths start from: for pictures, and for pixel "
            "boxes whose rows give no width and height",
        )
    for command in (one, two):
        command.add_argument("--out", help="JSON file to write")
    return made


def _page_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--column", help='published column of a one-task file, as "LISA test"')
    add("--cases", type=int, default=6, help="items shown of each kind (default 6)")
    add("--flat-images", action="store_true", help="as for generate")


def _add_only(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="ID/INDEX",
        help="this item only; may be repeated",
    )


def _generate_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--records", required=True, help="annotation file in any released format")
    add("--model", required=True, help='"tiny", a local folder or a hub name')
    add("--out", required=True, help="predictions.jsonl; continued if it exists")
    add("--adapter", nargs="+", default=[], help="adapters, each on top of the last")
    add("--quantize", choices=("nf4",))
    add("--server", metavar="URL", help="ask a vLLM server that serves --model")
    add("--scale", help="scale name or .yaml; default: tiny for --model tiny")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    add("--image-root", help="folder that relative image paths start from")
    add(
        "--flat-images",
        action="store_true",
        help="an image absent at its path is taken from --image-root by file name",
    )
    add("--style", choices=prompts.STYLES, default="univg", help="see prompts.py")
    add("--max-new-tokens", type=int, help="default: the scale's")
    add("--batch-size", type=int, help="default: the scale's")
    add("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    add("--num-return-sequences", type=int, default=1)
    add("--seed", type=int, default=0, help="of sampling")
    add("--fresh", action="store_true", help="replace an existing --out")
    add("--shard", metavar="K/N", help="every N-th batch from the K-th (0/N, 1/N, ...)")
    add(
        "--allow-missing",
        action="store_true",
        help="leave out items with a missing image",
    )
    _add_only(command)


__all__ = ["compare", "flatten_image_paths", "generate", "main", "score", "select"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; users' mistakes end as one line on stderr and exit code 2."""
    options = parser().parse_args(arguments)
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


def _items(options: argparse.Namespace) -> list[sample.GroundingSample]:
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
    from univg_nb.evaluate.benchmarks import ZERO_SHOT_FORMATS, model_section

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
    from univg_nb import models
    from univg_nb.train import merge

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
    from univg_nb.evaluate.served import Served

    if options.adapter or options.quantize:
        raise ValueError(
            "--server answers with what it serves: merge the adapter (python -m "
            "univg_nb.train.merge), serve the merged folder and give it as --model, without "
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
            "univg_nb.train.merge wrote"
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
    from univg_nb.figures import report

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

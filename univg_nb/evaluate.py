"""Evaluation from the command line: generate, score, compare.

    python -m univg_nb.evaluate generate --records F --model tiny --out P.jsonl
    python -m univg_nb.evaluate score --records F --predictions P.jsonl --out S.json
    python -m univg_nb.evaluate compare A.jsonl B.jsonl --records F

`score` and `compare` import neither torch nor transformers. The device is the one torch
sees: nothing here sets CUDA_VISIBLE_DEVICES (PF E6).
"""

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from univg_nb import prompts, runs, samples, score_text, scoring
from univg_nb.generation import generate, missing_images
from univg_nb.samples import GroundingSample

__all__ = ["compare", "generate", "main", "score"]


def score(
    records: str | Path,
    predictions: str | Path,
    *,
    parser: str = "answer",
    rule: str = "one",
    only: Iterable[str] = (),
    allow_missing: bool = False,
    expected: bool = False,
    out: str | Path | None = None,
) -> dict:
    """Score a predictions file against a records file; the content of scores.json.

    See scoring.score_items for parser, rule and errors, scoring.summarise for the
    numbers; `expected` scores sampled replies instead (scoring.expected). `only` keeps
    the named items (ids or indices). Written to `out` when given.
    """
    items = samples.read(records)
    replies = scoring.read_predictions(predictions)
    indices = select(items, only)
    sha256 = scoring.sha256_of(records)
    options = {"parser": parser, "rule": rule, "indices": indices}
    if expected:
        result = scoring.expected(
            items, replies, allow_missing=allow_missing, **options
        )
    else:
        scored = scoring.score_items(
            items, replies, allow_missing=allow_missing, **options
        )
        missing = Counter(items[i].task for i in indices if i not in replies)
        result = scoring.summarise(scored, missing)
    result |= {
        "parser": parser,
        "rule": rule,
        "benchmark": scoring.benchmark(items, sha256),
        "records": Path(records).name,
        "records_sha256": sha256,
        "items_in_records": len(items),
        "generation": scoring.generation_settings(predictions),
    }
    if out is not None:
        runs.write_json(out, result)
    return result


def compare(
    records: str | Path,
    a: str | Path,
    b: str | Path,
    *,
    parser: str = "answer",
    rule: str = "one",
    allow_missing: bool = False,
    out: str | Path | None = None,
) -> dict:
    """Model b against model a on the same items: paired differences b - a, with tests.

    With `allow_missing` only items that both files predict are compared. See
    scoring.compare_items for the result.
    """
    items = samples.read(records)
    both = [scoring.read_predictions(path) for path in (a, b)]
    indices = both[0].keys() & both[1].keys() if allow_missing else None
    scored = [
        scoring.score_items(items, replies, parser=parser, rule=rule, indices=indices)
        for replies in both
    ]
    result = scoring.compare_items(*scored)
    result |= {"a": str(a), "b": str(b), "parser": parser, "rule": rule}
    result |= {"records_sha256": scoring.sha256_of(records)}
    if out is not None:
        runs.write_json(out, result)
    return result


def select(items: Sequence[GroundingSample], only: Iterable[str]) -> list[int]:
    """Indices of the items named by id or by index; all of them if none is named."""
    ids = {sample.id: i for i, sample in enumerate(items)}
    chosen = []
    for name in only:
        if name in ids:
            chosen.append(ids[name])
        elif name.isdecimal() and int(name) < len(items):
            chosen.append(int(name))
        else:
            raise ValueError(
                f"--only {name}: no item has this id, and the indices are "
                f"0..{len(items) - 1}"
            )
    return chosen or list(range(len(items)))


def flatten_image_paths(
    items: Sequence[GroundingSample], indices: Iterable[int], folder: str | Path
) -> list[GroundingSample]:
    """For images that do not exist at their path, take folder/<file name> instead.

    Serves a benchmark of which a few images lie loose in one folder. Only the items at
    `indices` are looked at. Raises ValueError if two different paths would become the
    same file: which one it is cannot be known.
    """
    became: dict[Path, str] = {}
    result = list(items)
    for i in indices:
        paths = []
        for path in items[i].images:
            loose = Path(folder) / Path(path).name
            if not Path(path).is_file() and loose.is_file():
                if became.setdefault(loose, path) != path:
                    raise ValueError(
                        f"--flat-images: {loose} could be {became[loose]} or {path} "
                        f"(item {items[i].id!r}); lay the images out as the records say"
                    )
                path = str(loose)
            paths.append(path)
        result[i] = dataclasses.replace(items[i], images=tuple(paths))
    return result


# ---------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; users' mistakes end as one line on stderr and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run_generate(options: argparse.Namespace) -> None:
    items = samples.read(options.records, image_root=options.image_root)
    indices = select(items, options.only)
    if options.flat_images:
        if options.image_root is None:
            raise ValueError("--flat-images needs --image-root, the folder to look in")
        items = flatten_image_paths(items, indices, options.image_root)
    if options.allow_missing:
        absent = missing_images(items, indices)
        indices = [i for i in indices if i not in absent]
        print(f"{len(absent)} items left out: an image is missing")
    config = _scale(options)
    model, processor = _load(config["model"], options)
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
    )
    print(
        f"{summary['replies']} replies in {options.out} ({summary['new']} new, "
        f"{summary['truncated']} truncated) in {summary['seconds']} s"
    )


def _scale(options: argparse.Namespace) -> dict:
    """The scale's configuration with the command line's model and --set on top."""
    if options.scale is None and options.model != "tiny":
        raise ValueError(
            f"--model {options.model}: give --scale too (small, full or a .yaml file); "
            "it holds the pixel limits, dtype and batch size"
        )
    config = runs.load_scale(options.scale or "tiny")
    config["model"]["name_or_path"] = options.model
    for assignment in options.set:
        config = runs.override(config, assignment)
    return config


def _load(model_config: dict, options: argparse.Namespace) -> tuple:
    """Model and processor; several adapters go on top of each other, in order."""
    from univg_nb import models

    adapters = options.adapter or [None]
    merge = options.quantize is None and adapters[0] is not None
    model, processor = models.load(
        model_config, adapters[0], quantize=options.quantize, merge=merge
    )
    if len(adapters) > 1:
        if options.quantize:
            raise ValueError(
                "--quantize takes one --adapter: 4-bit weights do not merge"
            )
        from peft import PeftModel

        for path in adapters[1:]:
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
    return model.eval(), processor


def _run_score(options: argparse.Namespace) -> None:
    result = score(
        options.records,
        options.predictions,
        parser=options.parser,
        rule=options.rule,
        only=options.only,
        allow_missing=options.allow_missing,
        expected=options.expected,
        out=options.out,
    )
    name = result["benchmark"]["name"]
    print(f"benchmark {name} · {result['items_in_records']} items in the records")
    print(f"parser {options.parser} · rule {options.rule}")
    table = score_text.expected_table if options.expected else score_text.score_table
    print(table(result))


def _run_compare(options: argparse.Namespace) -> None:
    result = compare(
        options.records,
        options.a,
        options.b,
        parser=options.parser,
        rule=options.rule,
        allow_missing=options.allow_missing,
        out=options.out,
    )
    print(score_text.compare_table(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m univg_nb.evaluate", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(required=True)
    _generate_arguments(commands.add_parser("generate", help="write predictions.jsonl"))
    one = commands.add_parser("score", help="score predictions, write scores.json")
    one.add_argument("--predictions", required=True)
    one.add_argument(
        "--expected",
        action="store_true",
        help="several sampled replies an item: means over replies",
    )
    _add_only(one)
    one.set_defaults(run=_run_score)
    two = commands.add_parser("compare", help="two prediction files, paired tests")
    two.add_argument("a", metavar="A")
    two.add_argument("b", metavar="B")
    two.set_defaults(run=_run_compare)
    for command in (one, two):
        command.add_argument("--records", required=True, help="annotation file")
        command.add_argument("--parser", choices=scoring.PARSERS, default="answer")
        command.add_argument(
            "--rule",
            choices=scoring.RULES,
            default="one",
            help="items with several boxes: the released one box, or any of them",
        )
        command.add_argument("--allow-missing", action="store_true")
        command.add_argument("--out", help="JSON file to write")
    return parser


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
    add("--scale", help="scale name or .yaml; default: tiny for --model tiny")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    add("--image-root", help="folder that relative image paths start from")
    add(
        "--flat-images",
        action="store_true",
        help="an image absent at its path is taken from --image-root by file name",
    )
    add(
        "--style",
        choices=prompts.STYLES,
        default="univg",
        help="prompt (see prompts.py)",
    )
    add("--max-new-tokens", type=int, help="default: the scale's")
    add("--batch-size", type=int, help="default: the scale's")
    add("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    add("--num-return-sequences", type=int, default=1)
    add("--seed", type=int, default=0, help="of sampling")
    add("--fresh", action="store_true", help="replace an existing --out")
    add(
        "--allow-missing",
        action="store_true",
        help="leave out items with a missing image",
    )
    _add_only(command)
    command.set_defaults(run=_run_generate)


if __name__ == "__main__":
    raise SystemExit(main())

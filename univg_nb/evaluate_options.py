"""The command line of `univg_nb.evaluate`: its commands and their options."""

import argparse

from univg_nb import prompts, scoring


def parser() -> argparse.ArgumentParser:
    """Its result has the command's name under `command`."""
    made = argparse.ArgumentParser(
        prog="python -m univg_nb.evaluate",
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

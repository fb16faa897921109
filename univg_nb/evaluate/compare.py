"""Two models on the same items: paired differences with intervals and tests."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from univg_nb import io
from univg_nb.evaluate import scoring
from univg_nb.evaluate.predictions import read_predictions
from univg_nb.evaluate.score import Benchmark, add_scoring_arguments, format_task
from univg_nb.evaluate.scoring import ScoringOptions


def compare(
    bench: Benchmark,
    a: str | Path,
    b: str | Path,
    options: ScoringOptions = scoring.DEFAULT_OPTIONS,
) -> dict[str, Any]:
    """Compare two predictions files.

    Args:
        bench: what was predicted.
        a: predictions.jsonl of the first model.
        b: predictions.jsonl of the second model.
        options: how replies are read; `allow_missing` takes their common items.

    Returns:
        The differences b - a of `scoring.compare_items`, and what was compared.

    Raises:
        ValueError: as `scoring.score_items` and `scoring.compare_items`.
    """
    first, second = read_predictions(a), read_predictions(b)
    common = first.keys() & second.keys() if options.allow_missing else None
    return scoring.compare_items(
        scoring.score_items(bench.items, first, options, common),
        scoring.score_items(bench.items, second, options, common),
    ) | {
        "a": str(a),
        "b": str(b),
        "parser": options.parser,
        "rule": options.rule,
        "records_sha256": bench.sha256,
    }


def format_comparison(result: dict[str, Any]) -> str:
    """Format a comparison as a table; differences are B minus A."""
    lines = [
        f"{'task':<18}{'n':>6}{'A':>8}{'B':>8}{'B - A':>8}{'95 % interval':>18}"
        f"{'only A':>8}{'only B':>8}{'McNemar p':>11}{'d mIoU':>9}"
    ]
    for task, row in [*result["tasks"].items(), ("overall", result["overall"])]:
        difference, test = row["acc_05"], row["mcnemar"]
        interval = f"{difference['lo']:+.1%} .. {difference['hi']:+.1%}"
        lines.append(
            f"{format_task(task):<18}{row['n']:>6}{row['acc_05_a']:>8.1%}"
            f"{row['acc_05_b']:>8.1%}{difference['mean_diff']:>+8.1%}{interval:>18}"
            f"{test['b']:>8}{test['c']:>8}{test['p']:>11.3g}"
            f"{row['mean_iou']['mean_diff']:>+9.3f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare two predictions files from the command line and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m univg_nb compare",
        description="Compare two models on the same items, with paired tests.",
        epilog="example: python -m univg_nb compare sft.jsonl grpo.jsonl "
        "--records MIG_data.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="predictions.jsonl of the first model")
    parser.add_argument("b", metavar="B", help="predictions.jsonl of the second model")
    add_scoring_arguments(parser)
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args(arguments)
    bench = Benchmark.read(options.records, options.image_root)
    how = ScoringOptions(
        options.parser, options.rule, allow_missing=options.allow_missing
    )
    result = compare(bench, options.a, options.b, how)
    if options.out:
        io.write_json(options.out, result)
    print(format_comparison(result))

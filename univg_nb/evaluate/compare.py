"""Two models on the same items: paired differences with intervals and tests."""

from collections.abc import Sequence
from typing import Any

from univg_nb import io
from univg_nb.config import make_parser, output_file
from univg_nb.evaluate import scoring
from univg_nb.evaluate.predictions import read_predictions
from univg_nb.evaluate.score import (
    add_scoring_arguments,
    format_task,
    read_scoring_arguments,
)


def format_comparison(result: dict[str, Any]) -> str:
    """Format what `scoring.compare_items` returns as a table; differences are B - A."""
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
    parser = make_parser(
        "compare",
        "Compare two models on the same items, with paired tests.",
        "sft.jsonl grpo.jsonl --records MIG_data.json",
    )
    parser.add_argument("a", metavar="A", help="predictions.jsonl of the first model")
    parser.add_argument("b", metavar="B", help="predictions.jsonl of the second model")
    add_scoring_arguments(parser)
    parser.add_argument("--out", type=output_file, help="JSON file to write")
    options = parser.parse_args(arguments)
    bench, how = read_scoring_arguments(options)
    a, b = (read_predictions(path, bench.items) for path in (options.a, options.b))
    result = scoring.compare_items(
        scoring.score_items(bench.items, a, how),
        scoring.score_items(bench.items, b, how),
    )
    if options.out:
        made_from = {"a": options.a, "b": options.b, "records_sha256": bench.sha256}
        made_from |= {"parser": how.parser, "rule": how.rule}
        io.write_json(options.out, result | made_from)
    print(format_comparison(result))

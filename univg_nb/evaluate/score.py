"""Scores of files: what `scores.json` holds, as a table too, and of which benchmark.

A score belongs to a records file, a parser and a rule; all of them are written beside
it. Neither torch nor transformers is imported here.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from univg_nb import io
from univg_nb.config import make_parser, output_file, within
from univg_nb.data import files
from univg_nb.data.boxes import MODES
from univg_nb.data.conventions import BoxConvention
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import scoring
from univg_nb.evaluate.predictions import read_generation_settings, read_predictions
from univg_nb.evaluate.scoring import ScoringOptions
from univg_nb.families import SIDE
from univg_nb.paper import MIG_TASKS, TASK_COLUMN


@dataclass(frozen=True)
class Benchmark:
    """A records file to score models on; a run calls it `name` ("mig", "lisa", ...)."""

    records: Path
    items: list[GroundingSample]
    sha256: str
    name: str = ""

    @classmethod
    def read(
        cls, records: str | Path, image_root: str | Path | None = None, name: str = ""
    ) -> "Benchmark":
        """Read a records file of any released format; pixel boxes need images."""
        items = files.read(records, image_root=image_root)
        return cls(Path(records), items, io.sha256_of(records), name)

    def identify(self) -> dict[str, str]:
        """Return which benchmark it is ("name") and what tells it ("by").

        Original and revised MIG-Bench differ by 10 points for one model.
        """
        counts = Counter(sample.task for sample in self.items)
        if counts == {task.name: task.original for task in MIG_TASKS}:
            return {"name": "MIG-Bench original", "by": "counts"}
        if counts == {task.name: task.revised for task in MIG_TASKS}:
            return {"name": "MIG-Bench revised", "by": "counts"}
        drawn = all(sample.id.startswith("minimig") for sample in self.items)
        if drawn and set(counts) == set(TASK_COLUMN):
            return {"name": "MiniMIG", "by": "tasks"}
        return {"name": "unknown", "by": "none"}


def score(
    bench: Benchmark,
    predictions: str | Path,
    options: ScoringOptions = scoring.DEFAULT_OPTIONS,
    indices: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Score a predictions file, or the items of it that `indices` names.

    The result is the content of scores.json: `scoring.summarize_items` and what it
    belongs to. Raises ValueError as `read_predictions` and `scoring.score_items` do.
    """
    items, replies = bench.items, read_predictions(predictions, bench.items)
    scored = scoring.score_items(items, replies, options, indices)
    wanted = range(len(items)) if indices is None else indices
    missing = Counter(items[i].task for i in wanted if i not in replies)
    return scoring.summarize_items(scored, missing) | {
        "parser": options.parser,
        "rule": options.rule,
        "stretch": options.stretch,
        "benchmark": bench.identify(),
        "records": bench.records.name,
        "records_sha256": bench.sha256,
        "items_in_records": len(items),
        "generation": read_generation_settings(predictions),
    }


def format_task(task: str) -> str:
    """Return the paper's name of a task, or its own."""
    return TASK_COLUMN.get(task, task) or "(no task)"


def format_scores(result: dict[str, Any]) -> str:
    """Format the content of scores.json as a table: its tasks, then the averages."""
    lines = [
        f"{'task':<18}{'n':>6}{'Acc@0.5':>9}{'95 % interval':>16}"
        f"{'@0.3':>7}{'@0.7':>7}{'mIoU':>7}  replies"
    ]
    for task, row in [*result["tasks"].items(), ("pooled", result["pooled"])]:
        notes = {k: v for k, v in row["status"].items() if k != "ok"}
        notes |= {"missing": row["missing"]} if row["missing"] else {}
        text = ", ".join(f"{k} {v}" for k, v in notes.items()) or "all ok"
        line = f"{format_task(task):<18}{row['n']:>6}"
        if row["n"]:
            low, high = row["ci_05"]
            line += f"{row['acc_05']:>9.1%}{f'{low:.1%} .. {high:.1%}':>16}"
            line += f"{row['acc_03']:>7.1%}{row['acc_07']:>7.1%}{row['mean_iou']:>7.3f}"
        lines.append(f"{line}  {text}")
    if result["macro_acc_05"] is not None:
        lines.append(f"macro Acc@0.5 (the paper's AVG): {result['macro_acc_05']:.2%}")
    return "\n".join(lines)


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `score`, `compare` and `report` share."""
    add = parser.add_argument
    add("--records", required=True, help="annotation file in any released format")
    add("--image-root", help="folder that image paths start from")
    add("--parser", choices=MODES, default="answer")
    add("--rule", choices=scoring.RULES, default="one", help="of several true boxes")
    add("--allow-missing", action="store_true", help="leave out items without a reply")
    add(
        "--boxes",
        choices=("thousandths", "pixels"),
        help="how replies of another program have them; pixels: of the resized image",
    )
    add("--min-pixels", type=within(int, 1), default=3136, help="of its images")
    add("--max-pixels", type=within(int, 1), default=12_845_056, help="of its images")


def read_scoring_arguments(
    options: argparse.Namespace,
) -> tuple[Benchmark, ScoringOptions]:
    """Return the benchmark that these options name, and how replies are read."""
    pixels, limits = options.boxes == "pixels", (options.min_pixels, options.max_pixels)
    convention = BoxConvention(pixels, True, SIDE, *limits) if options.boxes else None
    how = ScoringOptions(
        options.parser,
        options.rule,
        allow_missing=options.allow_missing,
        convention=convention,
    )
    return Benchmark.read(options.records, options.image_root), how


def main(arguments: Sequence[str] | None = None) -> None:
    """Score predictions from the command line and print a table."""
    parser = make_parser(
        "score",
        "Score replies: accuracy with intervals for each task.",
        "--records MIG_data.json --predictions p.jsonl --out scores.json",
    )
    add_scoring_arguments(parser)
    add = parser.add_argument
    add("--predictions", required=True, help="predictions.jsonl")
    add("--migician-stretch", action="store_true", help="as for Migician's row only")
    add("--out", type=output_file, help="scores.json to write")
    options = parser.parse_args(arguments)
    bench, how = read_scoring_arguments(options)
    how = replace(how, stretch=options.migician_stretch)
    result = score(bench, options.predictions, how)
    if options.out:
        io.write_json(options.out, result)
    name = result["benchmark"]["name"]
    print(f"benchmark {name} · {len(bench.items)} items in the records")
    print(f"parser {how.parser} · rule {how.rule}")
    print(format_scores(result))

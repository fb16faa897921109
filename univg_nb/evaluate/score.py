"""Scores and comparisons of files: what `scores.json` holds, and of which benchmark.

Neither torch nor transformers is imported here. A score is one of a records file, a
parser and a rule; all of them are written beside it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from univg_nb import io
from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import scoring
from univg_nb.evaluate.predictions import generation_settings, read_predictions
from univg_nb.io import sha256_of
from univg_nb.paper import MIG_TASKS, TASK_COLUMN

# DOC of score_text:
# """Scores and comparisons as lines of text, for the command line."""

MIG_ORIGINAL_SHA256 = "8f6e8fce3720dc6e17462533426d455463cda38b441edc2d70d65afa15681300"


def score(
    records: str | Path,
    predictions: str | Path,
    *,
    image_root: str | Path | None = None,
    only: Iterable[str] = (),
    out: str | Path | None = None,
    **options: Any,
) -> dict:
    """Score a predictions file against a records file; the content of scores.json.

    `options` are those of `scores_of`. `only` keeps the named items (ids or indices).
    `image_root` is needed where boxes are pixels and rows do not say the images' sizes.
    Written to `out` when given.
    """
    items = files.read(records, image_root=image_root)
    if only:
        options["indices"] = select(items, only)
    result = scores_of(items, records, predictions, **options)
    if out is not None:
        io.write_json(out, result)
    return result


def scores_of(
    items: Sequence[GroundingSample],
    records: str | Path,
    predictions: str | Path,
    *,
    parser: str = "answer",
    rule: str = "one",
    stretch: bool = False,
    indices: Iterable[int] | None = None,
    allow_missing: bool = False,
    expected: bool = False,
) -> dict:
    """`score` for items already read from `records`.

    See scoring.score_items for parser, rule, stretch and errors, scoring.summarise for
    the numbers; `expected` scores sampled replies instead (scoring.expected).
    """
    replies = read_predictions(predictions)
    wanted = sorted(set(range(len(items)) if indices is None else indices))
    how = {"parser": parser, "rule": rule, "stretch": stretch}
    options = how | {"indices": wanted, "allow_missing": allow_missing}
    if expected:
        result = scoring.expected(items, replies, **options)
    else:
        missing = Counter(items[i].task for i in wanted if i not in replies)
        scored = scoring.score_items(items, replies, **options)
        result = scoring.summarise(scored, missing)
    sha256 = sha256_of(records)
    return (
        result
        | how
        | {
            "benchmark": benchmark(items, sha256),
            "records": Path(records).name,
            "records_sha256": sha256,
            "items_in_records": len(items),
            "generation": generation_settings(predictions),
        }
    )


def compare(
    records: str | Path,
    a: str | Path,
    b: str | Path,
    *,
    image_root: str | Path | None = None,
    parser: str = "answer",
    rule: str = "one",
    allow_missing: bool = False,
    out: str | Path | None = None,
) -> dict:
    """Model b against model a on the same items: paired differences b - a, with tests.

    With `allow_missing` only items that both files predict are compared. See
    scoring.compare_items for the result.
    """
    items = files.read(records, image_root=image_root)
    both = [read_predictions(path) for path in (a, b)]
    indices = both[0].keys() & both[1].keys() if allow_missing else None
    scored = [
        scoring.score_items(items, replies, parser=parser, rule=rule, indices=indices)
        for replies in both
    ]
    result = scoring.compare_items(*scored)
    result |= {"a": str(a), "b": str(b), "parser": parser, "rule": rule}
    result |= {"records_sha256": sha256_of(records)}
    if out is not None:
        io.write_json(out, result)
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


def benchmark(samples: Sequence[GroundingSample], sha256: str) -> dict:
    """Which benchmark a file is: {"name", "by"}, by = sha256 | counts | tasks | none.

    The original and the revised MIG-Bench differ by 10 points for one model (PF sec.
    7), so a score without this is not a number one can compare.
    """
    counts = Counter(s.task for s in samples)
    if sha256 == MIG_ORIGINAL_SHA256:
        return {"name": "MIG-Bench original", "by": "sha256"}
    if counts == {task.name: task.original for task in MIG_TASKS}:
        return {"name": "MIG-Bench original", "by": "counts"}
    if counts == {task.name: task.revised for task in MIG_TASKS}:
        return {"name": "MIG-Bench revised", "by": "counts"}
    if set(counts) == set(TASK_COLUMN) and all(
        s.id.startswith("minimig") for s in samples
    ):
        return {"name": "MiniMIG", "by": "tasks"}
    return {"name": "unknown", "by": "none"}


def _name(task: str) -> str:
    """The paper's column, or the task's own name; the zero-shot files give none."""
    return TASK_COLUMN.get(task, task) or "(no task)"


def score_table(result: dict) -> str:
    """scores.json as a table: a line per task, then the averages."""
    lines = [
        f"{'task':<18}{'n':>6}{'Acc@0.5':>9}{'95 % interval':>16}"
        f"{'@0.3':>7}{'@0.7':>7}{'mIoU':>7}  replies"
    ]
    for task, row in [*result["tasks"].items(), ("pooled", result["pooled"])]:
        notes = {k: v for k, v in row["status"].items() if k != "ok"}
        notes |= {"missing": row["missing"]} if row["missing"] else {}
        text = ", ".join(f"{k} {v}" for k, v in notes.items()) or "all ok"
        if not row["n"]:
            lines.append(f"{_name(task):<18}{0:>6}  {text}")
            continue
        low, high = row["ci_05"]
        lines.append(
            f"{_name(task):<18}{row['n']:>6}{row['acc_05']:>9.1%}"
            f"{f'{low:.1%} .. {high:.1%}':>16}{row['acc_03']:>7.1%}"
            f"{row['acc_07']:>7.1%}{row['mean_iou']:>7.3f}  {text}"
        )
    if result["macro_acc_05"] is not None:
        lines.append(f"macro Acc@0.5 (the paper's AVG): {result['macro_acc_05']:.2%}")
    return "\n".join(lines)


def expected_table(result: dict) -> str:
    """Expected scores of sampled replies (scoring.expected) as a table."""
    lines = [
        f"{'task':<18}{'n':>6}{'replies':>9}{'E[IoU]':>16}{'Acc@0.5':>9}{'best':>7}"
    ]
    for task, row in [*result["tasks"].items(), ("pooled", result["pooled"])]:
        mean = f"{row['mean_iou']:.3f} ± {row['se_iou']:.3f}"
        lines.append(
            f"{_name(task):<18}{row['n']:>6}{row['replies']:>9}"
            f"{mean:>16}{row['acc_05']:>9.1%}{row['best_iou']:>7.3f}"
        )
    return "\n".join(lines)


def compare_table(result: dict) -> str:
    """A comparison as lines of text; differences are B minus A."""
    lines = [
        f"{'task':<18}{'n':>6}{'A':>8}{'B':>8}{'B - A':>8}{'95 % interval':>18}"
        f"{'only A':>8}{'only B':>8}{'McNemar p':>11}{'d mIoU':>9}"
    ]
    for task, row in [*result["tasks"].items(), ("overall", result["overall"])]:
        difference, test = row["acc_05"], row["mcnemar"]
        interval = f"{difference['lo']:+.1%} .. {difference['hi']:+.1%}"
        lines.append(
            f"{_name(task):<18}{row['n']:>6}{row['acc_05_a']:>8.1%}"
            f"{row['acc_05_b']:>8.1%}{difference['mean_diff']:>+8.1%}{interval:>18}"
            f"{test['b']:>8}{test['c']:>8}{test['p']:>11.3g}"
            f"{row['mean_iou']['mean_diff']:>+9.3f}"
        )
    return "\n".join(lines)

"""The tables of a report: scores beside published ones, kinds of result, gains."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pandas as pd

from univg_nb import paper, scoring, tables
from univg_nb.scoring import ItemScore

PUBLISHED = ("Qwen2-VL-7B", "Migician", "UniVG-R1")

Scored = Mapping[str, Sequence[ItemScore]]


def score_table(scores: Mapping[str, dict], column: str | None = None) -> pd.DataFrame:
    """Accuracies with intervals, a row for each model, published rows below them.

    Raises ValueError for a `column` that neither Table 2 nor Table 3 has, or given for
    a file of several tasks.
    """
    ours = tables.wide(tables.score_rows(scores))
    published = _published(scores, column, list(ours.columns))
    below = [f"{name} (paper)" for name in published.index]
    published = published.reindex(columns=ours.columns).map(
        lambda value: "–" if pd.isna(value) else f"{value:.2f}"
    )
    return pd.concat([ours, published.set_axis(below)]).rename_axis("model")


def _published(
    scores: Mapping[str, dict], column: str | None, columns: list[str]
) -> pd.DataFrame:
    """Published accuracies under the columns they stand for; empty if none does."""
    tasks = list(next(iter(scores.values()))["tasks"])
    if column is None and set(tasks) <= set(paper.TASK_COLUMN):
        stages = [paper.STAGE_OF_MODEL[m] for m in scores if m in paper.STAGE_OF_MODEL]
        frame = paper.TABLE_4.frame().loc[stages]
        known = paper.TABLE_1.frame().loc[list(PUBLISHED)]
        return pd.concat([known, frame]).drop_duplicates()  # two rows are in both
    column = column or paper.REFCOCO_FILES.get(tasks[0])
    if column is None:
        return pd.DataFrame(columns=columns)
    found = [t for t in (paper.TABLE_2, paper.TABLE_3) if column in t.columns]
    if not found or len(tasks) > 1:
        known = ", ".join([*paper.TABLE_2.columns, *paper.TABLE_3.columns])
        raise ValueError(
            f"--column {column!r} with {len(tasks)} tasks: it is for files of one task "
            f"and one of: {known}"
        )
    return found[0].frame()[[column]].set_axis(columns[:1], axis=1)


def kinds(items: Sequence[ItemScore]) -> pd.DataFrame:
    """How many items of each task are a hit, a near miss, ... (scoring.KINDS)."""
    counts = {"all": Counter(map(scoring.failure_kind, items))}
    for task in scoring.sort_tasks({item.task for item in items}):
        name = paper.TASK_COLUMN.get(task, task)
        found = (scoring.failure_kind(item) for item in items if item.task == task)
        counts[name] = Counter(found)
    frame = pd.DataFrame(counts).reindex(list(scoring.KINDS)).fillna(0).astype(int).T
    return frame.rename_axis("task")


def statuses(scored: Scored) -> pd.DataFrame:
    """What the parser said to the replies of each model, and how many were cut off."""
    rows = {}
    for name, items in scored.items():
        rows[name] = Counter(item.status for item in items)
        rows[name]["ran out of tokens"] = sum(item.truncated for item in items)
    return pd.DataFrame(rows).fillna(0).astype(int).T.rename_axis("model")


def gains(scored: Scored) -> pd.DataFrame:
    """Each model against the one before, per task: points, paired interval, p."""
    rows = []
    for before, after in pairwise(scored):
        result = scoring.compare_items(scored[before], scored[after])
        for task, row in [("all", result["overall"]), *result["tasks"].items()]:
            gain, test = row["acc_05"], row["mcnemar"]
            rows.append(
                {
                    "gain of": f"{after} over {before}",
                    "task": paper.TASK_COLUMN.get(task, task),
                    "n": row["n"],
                    "points": 100 * gain["mean_diff"],
                    "95 %": f"{100 * gain['lo']:+.1f} .. {100 * gain['hi']:+.1f}",
                    "only earlier": test["b"],
                    "only later": test["c"],
                    "McNemar p": f"{test['p']:.3g}",
                }
            )
    return pd.DataFrame(rows).set_index("gain of")

"""Result tables, made from what a run wrote and nothing else.

Reads `eval/<model>/<benchmark>/scores.json` and `grpo_*/rollouts.jsonl` of a run
folder (DESIGN sec. 7); writes `tables/*.md` and `*.csv`. Accuracies are Acc@0.5 in
percent with 95 % intervals. Published numbers come from `univg_nb.paper`.

    python -m univg_nb figures runs/tiny
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from univg_nb import paper
from univg_nb.evaluate import scoring
from univg_nb.evaluate.intervals import macro_interval, wilson
from univg_nb.evaluate.scoring import ItemScore
from univg_nb.io import read_json, read_jsonl, write_text
from univg_nb.train.difficulty import difficulty_bin

# DOC of report_tables:
# """The tables of a report: scores beside published ones, kinds of result, gains."""

MODELS = ("base", "sft_nocot", "sft_lora", "sft_qlora", "grpo_none", "grpo_exp")
BENCHMARKS = ("mig", "lisa", "video", "single")
# What each model's gain is counted against, as the paper reads its Table 4.
BEFORE = {
    "sft_nocot": "base",
    "sft_lora": "sft_nocot",
    "grpo_none": "sft_lora",
    "grpo_exp": "grpo_none",
}
SHARES = ("easy", "medium", "hard")


def result_table(run_dir: str | Path, benchmark: str = "mig") -> pd.DataFrame:
    """Every model's accuracy on every task, one row each.

    Columns: model, task, column (the paper's short name, or the task's), n, hits, acc,
    lo, hi; acc and its interval in percent. Two rows per model end its tasks: task
    "macro" (column AVG: unweighted mean of the tasks, as the paper averages) and
    "pooled" (column Pooled: over items). Models are in training order, unknown ones
    after them. Tasks without a scored item are left out.

    Raises ValueError when no model was scored on `benchmark`.
    """
    return score_rows(_scores(run_dir, benchmark))


def score_rows(scores: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """`result_table` of {model: content of scores.json}, in the order given."""
    rows: list[dict[str, Any]] = []
    for model, result in scores.items():
        rows += _model_rows(model, result["tasks"])
    return pd.DataFrame(rows)


def _scores(run_dir: str | Path, benchmark: str) -> dict[str, dict[str, Any]]:
    """{model: scores.json} of all models scored on `benchmark`."""
    files = {
        path.parent.parent.name: path
        for path in Path(run_dir).glob(f"eval/*/{benchmark}/scores.json")
    }
    if not files:
        raise ValueError(
            f"{run_dir}: no eval/<model>/{benchmark}/scores.json; run notebook 07, or "
            "`python -m univg_nb score`, first"
        )
    known = {model: i for i, model in enumerate(MODELS)}
    order = sorted(files, key=lambda model: (known.get(model, len(MODELS)), model))
    return {model: read_json(files[model]) for model in order}


def _model_rows(model: str, tasks: Mapping[str, Mapping[str, Any]]) -> list[dict]:
    order = {task: i for i, task in enumerate(paper.TASK_COLUMN)}
    names = sorted(
        (task for task in tasks if tasks[task]["n"]),
        key=lambda task: (order.get(task, len(order)), task),
    )
    hits = [tasks[task]["hit_05"] for task in names]
    totals = [tasks[task]["n"] for task in names]
    rows = [
        _row(model, task, paper.TASK_COLUMN.get(task, task), n, k, k / n, wilson(k, n))
        for task, k, n in zip(names, hits, totals, strict=True)
    ]
    if names:
        k, n = sum(hits), sum(totals)
        macro = sum(row["acc"] for row in rows) / len(rows) / 100
        # the mean of one task is that task, interval and all
        alone = len(names) == 1
        interval = wilson(k, n) if alone else macro_interval(hits, totals)
        rows.append(_row(model, "macro", "AVG", n, k, macro, interval))
        rows.append(_row(model, "pooled", "Pooled", n, k, k / n, wilson(k, n)))
    return rows


def _row(
    model: str,
    task: str,
    column: str,
    n: int,
    hits: int,
    acc: float,
    interval: tuple[float, float],
) -> dict[str, Any]:
    low, high = (100 * end for end in interval)
    return {
        "model": model,
        "task": task,
        "column": column,
        "n": n,
        "hits": hits,
        "acc": 100 * acc,
        "lo": low,
        "hi": high,
    }


def wide(results: pd.DataFrame) -> pd.DataFrame:
    """`result_table` for reading: models x columns, cells "45.0 [38, 52]".

    The first row holds the number of items, which all models must share. A benchmark of
    a single task has no columns for averages.
    """
    if (results.groupby("task", sort=False)["n"].nunique() > 1).any():
        raise ValueError(
            "the models were scored on different numbers of items: evaluate them on "
            "the same records before putting them into one table"
        )
    cells = results.assign(
        cell=[
            f"{row.acc:.1f} [{row.lo:.0f}, {row.hi:.0f}]"
            for row in results.itertuples()
        ]
    )
    columns = list(dict.fromkeys(results["column"]))
    if len(columns) == 3:
        columns = columns[:1]
    models = list(dict.fromkeys(results["model"]))
    frame = cells.pivot(index="model", columns="column", values="cell")
    counts = results.groupby("column")["n"].first().map("n = {}".format)
    frame = pd.concat([counts.to_frame("items").T, frame.loc[models]])[columns]
    frame.index.name = "model"
    frame.columns.name = None
    return frame


def published_beside_ours(run_dir: str | Path) -> pd.DataFrame:
    """Table 4 of the paper with our models' rows under its own, in percent.

    Index (model, source) with source "paper" or "ours"; columns as the paper's, the
    average last. The two were measured on different benchmarks with models a thousand
    times apart in size: compare the order of the rows, not the values.
    """
    results = result_table(run_dir).set_index(["model", "column"])["acc"]
    published = paper.TABLE_4.frame()
    rows = {}
    for model in dict.fromkeys(results.index.get_level_values("model")):
        if model in paper.STAGE_OF_MODEL:
            rows[model, "paper"] = published.loc[paper.STAGE_OF_MODEL[model]]
        rows[model, "ours"] = results[model].reindex(published.columns)
    frame = pd.DataFrame(rows).T
    frame.index.names = ["model", "source"]
    return frame


def gains(run_dir: str | Path) -> pd.DataFrame:
    """What each stage added, published and ours, in points of the average.

    Index model; columns: over (the model compared with), paper, ours. Only stages of
    which both models were scored.
    """
    average = published_beside_ours(run_dir)["AVG"]
    rows = {
        model: {"over": before}
        | {who: average[model, who] - average[before, who] for who in ("paper", "ours")}
        for model, before in BEFORE.items()
        if (model, "ours") in average and (before, "ours") in average
    }
    frame = pd.DataFrame.from_dict(
        rows, orient="index", columns=["over", "paper", "ours"]
    )
    frame.index.name = "model"
    return frame


def difficulty_shares(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Share of easy, medium and hard groups at each update (Figure 3, PF sec. 6).

    rows: `rollouts.jsonl`, one per group, with "step" and "mean_iou". Index step;
    columns easy, medium, hard (0..1, adding up to 1) and groups (their number).
    """
    frame = pd.DataFrame(
        [(row["step"], difficulty_bin(row["mean_iou"])) for row in rows],
        columns=["step", "bin"],
    )
    counts = pd.crosstab(frame["step"], frame["bin"]).reindex(
        columns=list(SHARES), fill_value=0
    )
    counts.columns.name = None
    groups = counts.sum(axis=1)
    return counts.div(groups, axis=0).assign(groups=groups)


def to_markdown(frame: pd.DataFrame, digits: int = 1, index: bool = True) -> str:
    """A GitHub table. Floats get `digits` decimals, NaN a dash, numbers align right."""
    if index:
        names = [name or "" for name in frame.index.names]
        frame = frame.rename_axis(names).reset_index()
    right = [pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]
    lines = [[str(name) for name in frame.columns]]
    lines.append(["---:" if is_right else "---" for is_right in right])
    for values in frame.itertuples(index=False, name=None):
        lines.append([_cell(value, digits) for value in values])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(value: Any, digits: int) -> str:
    if pd.isna(value):
        return "–"
    text = f"{value:.{digits}f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def write_tables(run_dir: str | Path) -> list[Path]:
    """Write every table this run has data for under `tables/`; returns the .md files.

    results_<benchmark>, published_beside_ours, gains, difficulty_shares_<stage>, and
    paper_table<N> as printed. The .csv beside each has full precision. Raises
    ValueError when no model was scored on MIG.
    """
    run_dir = Path(run_dir)
    scored = {path.parent.name for path in run_dir.glob("eval/*/*/scores.json")}
    names = ["mig", *(name for name in BENCHMARKS[1:] if name in scored)]
    names += sorted(scored.difference(BENCHMARKS))
    results = {name: result_table(run_dir, name) for name in names}
    out = run_dir / "tables"
    written = [
        _write(out / f"results_{name}", frame, wide(frame))
        for name, frame in results.items()
    ]
    beside, gained = published_beside_ours(run_dir), gains(run_dir)
    written.append(_write(out / "published_beside_ours", beside, beside, digits=2))
    written.append(_write(out / "gains", gained, gained, digits=2))
    for path in sorted(run_dir.glob("grpo_*/rollouts.jsonl")):
        shares = difficulty_shares(read_jsonl(path))
        name = f"difficulty_shares_{path.parent.name}"
        written.append(_write(out / name, shares, _tenths(shares), digits=3))
    for table in paper.TABLES:
        frame = table.frame().rename_axis("model")
        name = f"paper_table{table.number}"
        written.append(_write(out / name, frame, frame, digits=2))
    return written


def _tenths(shares: pd.DataFrame) -> pd.DataFrame:
    """Shares averaged over ten stretches of the training, for reading."""
    stretch = np.arange(len(shares)) * 10 // len(shares)
    groups = shares["groups"]
    counts = shares[list(SHARES)].mul(groups, axis=0).assign(groups=groups)
    sums = counts.groupby(stretch).sum()
    first = pd.Series(shares.index).groupby(stretch).first()
    frame = sums[list(SHARES)].div(sums["groups"], axis=0)
    frame = frame.assign(groups=sums["groups"].astype(int)).set_index(first)
    frame.index.name = "from step"
    return frame


def _write(
    path: Path, exact: pd.DataFrame, shown: pd.DataFrame, digits: int = 1
) -> Path:
    keep_index = any(name is not None for name in exact.index.names)
    write_text(path.with_suffix(".csv"), exact.to_csv(index=keep_index))
    markdown = path.with_suffix(".md")
    write_text(markdown, to_markdown(shown, digits))
    return markdown


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m univg_nb figures RUN_DIR")
    tables = write_tables(sys.argv[1])
    print(tables[0].read_text(encoding="utf-8"))
    print(f"{len(tables)} tables in {tables[0].parent}")

PUBLISHED = ("Qwen2-VL-7B", "Migician", "UniVG-R1")

Scored = Mapping[str, Sequence[ItemScore]]


def score_table(scores: Mapping[str, dict], column: str | None = None) -> pd.DataFrame:
    """Accuracies with intervals, a row for each model, published rows below them.

    Raises ValueError for a `column` that neither Table 2 nor Table 3 has, or given for
    a file of several tasks.
    """
    ours = wide(score_rows(scores))
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


def paired_gains(scored: Scored) -> pd.DataFrame:
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

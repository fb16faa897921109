"""Tables of results, formatted from what a run wrote.

Accuracies are Acc@0.5 in percent with 95 % intervals. They come from the scores.json
files of a run folder, published numbers from `univg_nb.paper`.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from univg_nb import paper
from univg_nb.evaluate import scoring
from univg_nb.evaluate.benchmarks import MODELS
from univg_nb.evaluate.scoring import ItemScore
from univg_nb.io import read_json, read_jsonl, write_text
from univg_nb.train.difficulty import difficulty_bin

BENCHMARKS = ("mig", "lisa", "video", "single")
# What each model's gain is counted against, as the paper reads its Table 4.
BEFORE = {
    "sft_nocot": "base",
    "sft_lora": "sft_nocot",
    "grpo_none": "sft_lora",
    "grpo_exp": "grpo_none",
}
SHARES = ("easy", "medium", "hard")
PUBLISHED = ("Qwen2-VL-7B", "Migician", "UniVG-R1")

Scored = Mapping[str, Sequence[ItemScore]]

# ---------------------------------------------------------------- accuracies


def load_result_table(run_dir: str | Path, benchmark: str = "mig") -> pd.DataFrame:
    """Load the accuracies of all models of a run, in training order.

    Args:
        run_dir: the run folder.
        benchmark: the benchmark's folder under eval/<model>/.

    Returns:
        The table of `build_result_table`.

    Raises:
        ValueError: no model was scored on the benchmark.
    """
    files = {
        path.parent.parent.name: path
        for path in Path(run_dir).glob(f"eval/*/{benchmark}/scores.json")
    }
    if not files:
        raise ValueError(
            f"{run_dir}: no eval/<model>/{benchmark}/scores.json; run notebook 07, or "
            "`python -m univg_nb score`, first"
        )
    order = {model: i for i, model in enumerate(MODELS)}
    names = sorted(files, key=lambda model: (order.get(model, len(MODELS)), model))
    return build_result_table({model: read_json(files[model]) for model in names})


def build_result_table(scores: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Put scores into a table with one row for each model and task.

    Args:
        scores: contents of scores.json by model.

    Returns:
        Columns: model, task, column (the paper's name of the task), n, hits, acc, lo,
        hi (in percent). A model's last rows are "macro" (AVG) and "pooled" (Pooled).
    """
    rows: list[tuple[Any, ...]] = []
    for model, result in scores.items():
        for task in scoring.sort_tasks(result["tasks"]):
            row = result["tasks"][task]
            column = paper.TASK_COLUMN.get(task, task)
            if row["n"]:
                rows.append((model, task, column, row, row["acc_05"], row["ci_05"]))
        row = result["pooled"]
        if row["n"]:
            macro = result["macro_acc_05"], result["macro_ci_05"]
            rows.append((model, "macro", "AVG", row, *macro))
            rows.append((model, "pooled", "Pooled", row, row["acc_05"], row["ci_05"]))
    return pd.DataFrame(
        [
            (*names, row["n"], row["hit_05"], 100 * acc, 100 * low, 100 * high)
            for *names, row, acc, (low, high) in rows
        ],
        columns=["model", "task", "column", "n", "hits", "acc", "lo", "hi"],
    )


def pivot_results(results: pd.DataFrame) -> pd.DataFrame:
    """Arrange a result table for reading: models x columns, cells "45.0 [38, 52]".

    Args:
        results: from `load_result_table`. One task gets no columns for averages.

    Raises:
        ValueError: the models were scored on different numbers of items.
    """
    if (results.groupby("task", sort=False)["n"].nunique() > 1).any():
        raise ValueError(
            "the models were scored on different numbers of items: evaluate them on "
            "the same records before putting them into one table"
        )
    rows: dict[str, dict[str, str]] = {"items": {}}
    for row in results.itertuples():
        rows["items"][row.column] = f"n = {row.n}"
        cell = f"{row.acc:.1f} [{row.lo:.0f}, {row.hi:.0f}]"
        rows.setdefault(row.model, {})[row.column] = cell
    columns = list(rows["items"])
    frame = pd.DataFrame.from_dict(rows, orient="index")
    return frame[columns[:1] if len(columns) == 3 else columns].rename_axis("model")


def load_paper_comparison(run_dir: str | Path) -> pd.DataFrame:
    """Load Table 4 of the paper with the run's models below its own, in percent.

    The benchmarks differ, and the models' sizes: compare the order, not the values.

    Args:
        run_dir: the run folder.

    Returns:
        Index (model, source) with source "paper" or "ours"; the paper's columns.
    """
    results = load_result_table(run_dir).set_index(["model", "column"])["acc"]
    published = paper.TABLE_4.to_frame()
    rows = {}
    for model in dict.fromkeys(results.index.get_level_values("model")):
        if model in paper.STAGE_OF_MODEL:
            rows[model, "paper"] = published.loc[paper.STAGE_OF_MODEL[model]]
        rows[model, "ours"] = results[model].reindex(published.columns)
    return pd.DataFrame(rows).T.rename_axis(["model", "source"])


def load_gains(run_dir: str | Path) -> pd.DataFrame:
    """Load what each stage added to the average, published and ours, in points.

    Args:
        run_dir: the run folder.

    Returns:
        Index model; columns over (the model compared with), paper, ours.
    """
    average = load_paper_comparison(run_dir)["AVG"]
    rows = {
        model: {"over": before}
        | {who: average[model, who] - average[before, who] for who in ("paper", "ours")}
        for model, before in BEFORE.items()
        if (model, "ours") in average and (before, "ours") in average
    }
    frame = pd.DataFrame.from_dict(
        rows, orient="index", columns=["over", "paper", "ours"]
    )
    return frame.rename_axis("model")


def build_score_table(
    scores: Mapping[str, dict[str, Any]], column: str | None = None
) -> pd.DataFrame:
    """Put accuracies with intervals into a table, published rows below them.

    Args:
        scores: contents of scores.json by model.
        column: column of the paper's Table 2 or 3 for a file of one task.

    Raises:
        ValueError: the column is unknown, or given for several tasks.
    """
    ours = pivot_results(build_result_table(scores))
    published = _find_published(scores, column, list(ours.columns))
    below = [f"{name} (paper)" for name in published.index]
    published = published.reindex(columns=ours.columns).map(
        lambda value: "–" if pd.isna(value) else f"{value:.2f}"
    )
    return pd.concat([ours, published.set_axis(below)]).rename_axis("model")


def _find_published(
    scores: Mapping[str, dict[str, Any]], column: str | None, columns: list[str]
) -> pd.DataFrame:
    """Return published accuracies under the columns they stand for, maybe none."""
    tasks = list(next(iter(scores.values()))["tasks"])
    if column is None and set(tasks) <= set(paper.TASK_COLUMN):
        stages = [paper.STAGE_OF_MODEL[m] for m in scores if m in paper.STAGE_OF_MODEL]
        known = paper.TABLE_1.to_frame().loc[list(PUBLISHED)]
        # two rows are in both tables
        return pd.concat(
            [known, paper.TABLE_4.to_frame().loc[stages]]
        ).drop_duplicates()
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
    return found[0].to_frame()[[column]].set_axis(columns[:1], axis=1)


# ---------------------------------------------------------------- items, groups


def count_kinds(items: Sequence[ItemScore]) -> pd.DataFrame:
    """Count the items of each task that are a hit, a near miss, ... (scoring.KINDS)."""
    counts = {"all": Counter(map(scoring.classify_result, items))}
    for task in scoring.sort_tasks({item.task for item in items}):
        of_task = (scoring.classify_result(item) for item in items if item.task == task)
        counts[paper.TASK_COLUMN.get(task, task)] = Counter(of_task)
    frame = pd.DataFrame(counts).reindex(list(scoring.KINDS)).fillna(0).astype(int).T
    return frame.rename_axis("task")


def count_statuses(scored: Scored) -> pd.DataFrame:
    """Count what the parser said to each model's replies, and those cut off."""
    rows = {}
    for name, items in scored.items():
        rows[name] = Counter(item.status for item in items)
        rows[name]["ran out of tokens"] = sum(item.truncated for item in items)
    return pd.DataFrame(rows).fillna(0).astype(int).T.rename_axis("model")


def compute_paired_gains(scored: Scored) -> pd.DataFrame:
    """Compare each model with the one before, per task: points, paired interval, p."""
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


def compute_difficulty_shares(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Compute the shares of easy, medium and hard groups at each update (Figure 3).

    Args:
        rows: rows of rollouts.jsonl, one for each group, with "step" and "mean_iou".

    Returns:
        Index step; columns easy, medium, hard (0..1) and groups (their number).
    """
    frame = pd.DataFrame(
        [(row["step"], difficulty_bin(row["mean_iou"])) for row in rows],
        columns=["step", "bin"],
    )
    counts = pd.crosstab(frame["step"], frame["bin"]).reindex(
        columns=list(SHARES), fill_value=0
    )
    groups = counts.sum(axis=1)
    return counts.div(groups, axis=0).assign(groups=groups).rename_axis(columns=None)


def _average_shares(shares: pd.DataFrame) -> pd.DataFrame:
    """Average shares over ten stretches of the training, for reading."""
    stretch = np.arange(len(shares)) * 10 // len(shares)
    counts = shares[list(SHARES)].mul(shares["groups"], axis=0)
    sums = counts.assign(groups=shares["groups"]).groupby(stretch).sum()
    frame = sums.div(sums["groups"], axis=0).assign(groups=sums["groups"].astype(int))
    frame.index = pd.Series(shares.index).groupby(stretch).first()
    return frame.rename_axis("from step")


# ---------------------------------------------------------------- writing


def format_cells(frame: pd.DataFrame, digits: int = 1) -> list[list[str]]:
    """Format the cells of a table: floats with `digits` decimals, a dash for NaN."""

    def format_cell(value: Any) -> str:
        if pd.isna(value):
            return "–"
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    rows = frame.itertuples(index=False, name=None)
    return [[format_cell(value) for value in row] for row in rows]


def format_markdown(frame: pd.DataFrame, digits: int = 1, index: bool = True) -> str:
    """Format a table as GitHub Markdown, numbers aligned right.

    Args:
        frame: the table.
        digits: decimals of floats.
        index: whether the index becomes columns.
    """
    if index:
        names = [name or "" for name in frame.index.names]
        frame = frame.rename_axis(names).reset_index()
    right = [pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]
    lines = [[str(name) for name in frame.columns]]
    lines.append(["---:" if is_right else "---" for is_right in right])
    lines += [
        [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
        for row in format_cells(frame, digits)
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_tables(run_dir: str | Path) -> list[Path]:
    """Write every table that a run has data for under tables/, as .md and .csv.

    Args:
        run_dir: the run folder.

    Returns:
        The .md files; the .csv files have full precision.

    Raises:
        ValueError: no model was scored on MIG.
    """
    run_dir = Path(run_dir)
    scored = {path.parent.name for path in run_dir.glob("eval/*/*/scores.json")}
    names = ["mig", *(name for name in BENCHMARKS[1:] if name in scored)]
    names += sorted(scored.difference(BENCHMARKS))
    # name: (table, the same for reading, decimals)
    tables: dict[str, tuple[pd.DataFrame, pd.DataFrame, int]] = {}
    for name in names:
        results = load_result_table(run_dir, name)
        tables[f"results_{name}"] = results, pivot_results(results), 1
    beside, gained = load_paper_comparison(run_dir), load_gains(run_dir)
    tables["published_beside_ours"] = beside, beside, 2
    tables["gains"] = gained, gained, 2
    for path in sorted(run_dir.glob("grpo_*/rollouts.jsonl")):
        shares = compute_difficulty_shares(read_jsonl(path))
        name = f"difficulty_shares_{path.parent.name}"
        tables[name] = shares, _average_shares(shares), 3
    for table in paper.TABLES:
        frame = table.to_frame().rename_axis("model")
        tables[f"paper_table{table.number}"] = frame, frame, 2
    written = [run_dir / "tables" / f"{name}.md" for name in tables]
    for path, (exact, shown, digits) in zip(written, tables.values(), strict=True):
        keep_index = any(name is not None for name in exact.index.names)
        write_text(path.with_suffix(".csv"), exact.to_csv(index=keep_index))
        write_text(path, format_markdown(shown, digits))
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables of a run from the command line and print the first."""
    parser = argparse.ArgumentParser(
        prog="python -m univg_nb figures",
        description="Write the tables of a run again, from its scores and logs.",
        epilog="example: python -m univg_nb figures runs/tiny",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run folder")
    written = write_tables(parser.parse_args(arguments).run_dir)
    print(written[0].read_text(encoding="utf-8"))
    print(f"{len(written)} tables in {written[0].parent}")

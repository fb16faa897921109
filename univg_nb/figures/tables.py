"""Tables of results, formatted from what a run wrote.

Accuracies are Acc@0.5 in percent with 95 % intervals. They come from the scores.json
files of a run folder, published numbers from `univg_nb.paper`.
"""

import re
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
from univg_nb.evaluate.score import format_task
from univg_nb.evaluate.scoring import ItemScore
from univg_nb.io import read_json, read_jsonl, write_text
from univg_nb.train.difficulty import difficulty_bin

BENCHMARKS = ("mig", "lisa", "video", "single")
# What each model's gain is counted against, as the paper reads its Table 4.
BEFORE = {
    "sft_nocot": "base",
    "sft_lora": "sft_nocot",
    "shipped": "base",
    "grpo_none": "shipped",
    "grpo_exp": "grpo_none",
}
SHARES = ["easy", "medium", "hard"]
PUBLISHED = ["Qwen2-VL-7B", "Migician", "UniVG-R1"]
_COLUMNS = paper.TASK_COLUMN | {"macro": "AVG", "pooled": "Pooled"}

Scored = Mapping[str, Sequence[ItemScore]]

# ---------------------------------------------------------------- accuracies


def load_result_table(run_dir: str | Path, benchmark: str = "mig") -> pd.DataFrame:
    """Load the accuracies (`build_result_table`) of a run's models, in training order.

    Raises ValueError if none was scored on the benchmark, which is called after its
    folder in eval/<model>/.
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
    names = [*MODELS, *sorted(files.keys() - set(MODELS))]
    return build_result_table({m: read_json(files[m]) for m in names if m in files})


def build_result_table(scores: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Put contents of scores.json into a table with one row for each model and task.

    Returns:
        Columns: model, task, column (the paper's name of the task), n, hits, acc, lo,
        hi (in percent). A model's last rows are "macro" (AVG) and "pooled" (Pooled).
    """
    rows = []
    for model, result in scores.items():
        macro = {key: result.get(f"macro_{key}") for key in ("acc_05", "ci_05")}
        averages = {"macro": result["pooled"] | macro, "pooled": result["pooled"]}
        for task, row in (result["tasks"] | averages).items():
            if row["n"]:
                column = _COLUMNS.get(task, task)
                percent = [100 * x for x in (row["acc_05"], *row["ci_05"])]
                rows.append((model, task, column, row["n"], row["hit_05"], *percent))
    return pd.DataFrame(
        rows, columns=["model", "task", "column", "n", "hits", "acc", "lo", "hi"]
    )


def pivot_results(results: pd.DataFrame) -> pd.DataFrame:
    """Arrange a result table for reading: models x columns, cells "45.0 [38, 52]".

    One task gets no columns for averages. Raises ValueError if the models were scored
    on different numbers of items.
    """
    if (results.groupby("task")["n"].nunique() > 1).any():
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

    Returns:
        Index model; columns over (the model compared with), paper, ours.
    """
    average = load_paper_comparison(run_dir)["AVG"].unstack()
    over = {m: b for m, b in BEFORE.items() if {m, b} <= set(average.index)}
    gains = average.loc[list(over)] - average.loc[list(over.values())].to_numpy()
    return gains.assign(over=over).reindex(columns=["over", "paper", "ours"])


def build_score_table(scores: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """Put contents of scores.json, by model, into a table, published rows below them.

    The paper has rows for MIG's tasks and for the files of RefCOCO.
    """
    ours = pivot_results(build_result_table(scores))
    tasks = list(next(iter(scores.values()))["tasks"])
    published = pd.DataFrame()
    if set(tasks) <= set(paper.TASK_COLUMN):
        stages = [paper.STAGE_OF_MODEL[m] for m in scores if m in paper.STAGE_OF_MODEL]
        known = paper.TABLE_1.to_frame().loc[PUBLISHED]
        # two rows are in both tables
        known = pd.concat([known, paper.TABLE_4.to_frame().loc[stages]])
        published = known.drop_duplicates()
    elif set(tasks) <= set(paper.REFCOCO_FILES):
        names = {column: task for task, column in paper.REFCOCO_FILES.items()}
        published = paper.TABLE_3.to_frame().rename(columns=names)
    published = format_cells(published.reindex(columns=ours.columns), digits=2)
    published.index = [f"{name} (paper)" for name in published.index]
    return pd.concat([ours, published]).rename_axis("model")


# ---------------------------------------------------------------- items, groups


def count_kinds(items: Sequence[ItemScore]) -> pd.DataFrame:
    """Count the items of each task that are a hit, a near miss, ... (scoring.KINDS)."""
    counts = {"all": Counter(map(scoring.classify_result, items))}
    for task in scoring.sort_tasks({item.task for item in items}):
        of_task = (scoring.classify_result(item) for item in items if item.task == task)
        counts[format_task(task)] = Counter(of_task)
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
            cells = {"gain of": f"{after} over {before}", "task": format_task(task)}
            cells |= {"n": row["n"], "points": 100 * gain["mean_diff"]}
            cells["95 %"] = f"{100 * gain['lo']:+.1f} .. {100 * gain['hi']:+.1f}"
            cells |= {"only earlier": test["b"], "only later": test["c"]}
            rows.append(cells | {"McNemar p": f"{test['p']:.3g}"})
    return pd.DataFrame(rows).set_index("gain of")


def compute_difficulty_shares(
    rows: Iterable[Mapping[str, Any]], adjusted: bool = False
) -> pd.DataFrame:
    """Compute the shares of easy, medium and hard groups at each update (Figure 3).

    Args:
        rows: rows of rollouts.jsonl, one for each group, with "step" and "mean_iou".
        adjusted: as if every update drew the same kinds of questions, for trends: some
            are nearly always hard, and which ones an update draws is chance. A kind is
            "task" and, where "sample_id" tells it as MiniMIG's do, the level; its share
            is fitted beside a straight line over the updates. The adjusted shares may
            leave 0..1 a little.

    Returns:
        Index step; columns easy, medium, hard (0..1) and groups (their number).
    """
    rows = list(rows)
    steps = np.array([row["step"] for row in rows])  # (N,)
    bins = np.array([difficulty_bin(row["mean_iou"]) for row in rows])
    hits = (bins[:, None] == SHARES).astype(float)  # (N, 3)
    if adjusted:
        kinds = pd.get_dummies([_find_kind(row) for row in rows]).to_numpy(float)
        fitted = np.c_[steps - steps.mean(), kinds]  # (N, 1 + kinds)
        of_kind = kinds @ np.linalg.lstsq(fitted, hits)[0][1:]  # (N, 3)
        hits += of_kind.mean(0) - of_kind
    by_step = pd.DataFrame(hits, columns=SHARES).groupby(steps)
    return by_step.mean().rename_axis("step").assign(groups=by_step.size())


def _find_kind(row: Mapping[str, Any]) -> str:
    """Return a group's task and, if its sample's id tells it, the level."""
    level = re.search(r"-(easy|medium|hard)-\d+$", row.get("sample_id", ""))
    return f"{row['task']} {level[1] if level else ''}"


# ---------------------------------------------------------------- writing


def format_cells(frame: pd.DataFrame, digits: int = 1) -> pd.DataFrame:
    """Format the cells of a table: floats with `digits` decimals, a dash for NaN."""

    def format_cell(value: Any) -> str:
        if pd.isna(value):
            return "–"
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    return frame.map(format_cell)


def format_markdown(frame: pd.DataFrame, digits: int = 1) -> str:
    """Format a table as GitHub Markdown, its index first, numbers aligned right.

    Floats have `digits` decimals.
    """
    frame = frame.rename_axis([name or "" for name in frame.index.names]).reset_index()
    right = [pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]
    cells = format_cells(frame, digits).replace({r"\|": r"\|", "\n": " "}, regex=True)
    lines = [
        map(str, frame.columns),
        ["---:" if is_right else "---" for is_right in right],
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in [*lines, *cells.to_numpy()])


def write_tables(run_dir: str | Path) -> list[Path]:
    """Write every table that a run has data for under tables/, as .md and .csv.

    The .csv files have full precision; the .md files are returned. Raises ValueError if
    no model was scored on MIG.
    """
    run_dir = Path(run_dir)
    written: list[Path] = []

    def write(
        name: str,
        frame: pd.DataFrame,
        shown: pd.DataFrame | None = None,
        digits: int = 2,
    ) -> None:
        path = run_dir / "tables" / f"{name}.md"
        write_text(path.with_suffix(".csv"), frame.to_csv())
        write_text(path, format_markdown(frame if shown is None else shown, digits))
        written.append(path)

    scored = {path.parent.name for path in run_dir.glob("eval/*/*/scores.json")}
    for name in ("mig", *sorted(scored - {"mig"})):
        results = load_result_table(run_dir, name)
        write(f"results_{name}", results.set_index("model"), pivot_results(results))
    write("published_beside_ours", load_paper_comparison(run_dir))
    write("gains", load_gains(run_dir))
    for path in sorted(run_dir.glob("grpo_*/rollouts.jsonl")):
        shares = compute_difficulty_shares(read_jsonl(path))
        write(f"difficulty_shares_{path.parent.name}", shares, digits=3)
    for table in paper.TABLES:
        write(f"paper_table{table.number}", table.to_frame().rename_axis("model"))
    return written

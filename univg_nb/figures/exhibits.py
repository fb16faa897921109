"""The paper's tables and figures, and ours, each made from the files of run folders.

`assets/exhibits.yaml` says which files each reads. A model that no run has keeps an
empty place that says so.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from univg_nb import paper
from univg_nb.evaluate import benchmarks, intervals, scoring
from univg_nb.evaluate.predictions import read_predictions
from univg_nb.evaluate.scoring import ItemScore
from univg_nb.figures import diagrams, drawing, findings, plots, report, tables
from univg_nb.io import read_asset, read_json, read_jsonl
from univg_nb.runs import Run

SPECS: dict[str, Any] = read_asset("exhibits.yaml")
# folder under eval/MODEL/: column of Table 2
ZERO_SHOT_COLUMNS = dict(zip(benchmarks.ZERO_SHOT, paper.TABLE_2.columns, strict=True))
NOT_RUN = "not run"
_WIDE = 5  # inches; from here on panels stand side by side
_SCREEN = 8  # inches; wider than a page in print

Counts = Mapping[str, Mapping[str, tuple[int, int]]]  # hits and items by model, column


class Runs:
    """Run folders, and what they hold by model; of several, it is called RUN/MODEL.

    A folder may hold the record of a study instead. Raises ValueError for a folder that
    is missing or has neither, and for two of one name.
    """

    def __init__(self, folders: Iterable[str | Path]) -> None:
        self.folders = [Path(folder).resolve() for folder in folders]
        self.studies = [p for f in self.folders for p in sorted(f.glob("study_*.json"))]
        self.trained = [f for f in self.folders if not any(f.glob("study_*.json"))]
        for folder in self.folders:
            kinds = ("manifest.json", "eval", "study_*.json")
            if not any(any(folder.glob(kind)) for kind in kinds):
                raise ValueError(
                    f"{folder}: no run folder: it has none of {', '.join(kinds)}"
                )
        names = [folder.name for folder in self.folders]
        if len(set(names)) < len(names):
            raise ValueError(f"two runs have one name: {', '.join(sorted(names))}")

    def find(self, pattern: str) -> dict[str, Path]:
        """Return the files of a pattern with one `*`, by model, in training order."""
        place = [part.count("*") for part in pattern.split("/")].index(1)
        found: dict[str, Path] = {}
        for folder in self.folders:
            files = {
                p.relative_to(folder).parts[place]: p for p in folder.glob(pattern)
            }
            order = [*benchmarks.MODELS, *sorted(files.keys() - set(benchmarks.MODELS))]
            prefix = f"{folder.name}/" if len(self.trained) > 1 else ""
            found |= {prefix + m: files[m] for m in order if m in files}
        return found

    def read_scores(self, benchmark: str = "mig") -> dict[str, dict[str, Any]]:
        """Return the contents of scores.json by model."""
        files = self.find(f"eval/*/{benchmark}/scores.json")
        return {name: read_json(path) for name, path in files.items()}

    def read_logs(self, kind: str) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of `kind`.jsonl of GRPO trainings, where there are any."""
        files = self.find(f"grpo_*/{kind}.jsonl")
        rows = {name: read_jsonl(path) for name, path in files.items()}
        return {name: some for name, some in rows.items() if some}

    @cached_property
    def items(self) -> dict[str, list[ItemScore]]:
        """The scored items of MIG by model."""
        scores = self.read_scores().items()
        return {
            name: [ItemScore(**row) for row in one["items"]] for name, one in scores
        }


def get_model(name: str) -> str:
    """Return the model of RUN/MODEL."""
    return name.rpartition("/")[2]


def find_missing(found: Iterable[str]) -> list[str]:
    """Return the models of the course that no run has."""
    known = {get_model(name) for name in found}
    return [model for model in benchmarks.MODELS if model not in known]


# ---------------------------------------------------------------- tables


def build_table(
    table: paper.PaperTable, counts: Counts, source: str, pairs: bool = False
) -> pd.DataFrame:
    """Build a published table with the run's rows below, in percent.

    `source` is what the run's rows were measured on. With `pairs`, each of them stands
    below the published row of its stage.

    Returns:
        Index (model, source); the columns, AVG with the ends lo and hi of its interval
        where every column is there.
    """
    rows: dict[tuple[str, str], dict[str, float]] = {}
    waiting = dict(counts)

    def add_ours(names: Iterable[str]) -> None:
        for name in names:
            cells = waiting.pop(name)
            total = sum(n for _, n in cells.values())
            row = {column: 100 * hits / n for column, (hits, n) in cells.items()}
            average = compute_average(cells, table.columns)
            row |= zip(("AVG", "lo", "hi"), average, strict=True)
            rows[name, f"{source}, n = {total}"] = row

    printed = table.source.startswith("paper")
    origin = table.source if printed else f"Table {table.number}, second-hand"
    for name, cells in table.rows.items():
        rows[name, origin] = dict(zip([*table.columns, "AVG"], cells, strict=True))
        if pairs:
            stages = paper.STAGE_OF_MODEL
            ours = [n for n in waiting if stages.get(get_model(n)) == name]
            add_ours(ours)
            if not ours:
                model = next((m for m, row in stages.items() if row == name), "")
                rows[model, f"{NOT_RUN}: {name}"] = {}
    add_ours(list(waiting))
    for model in find_missing([*counts, *(name for name, _ in rows)]):
        rows[model, NOT_RUN] = {}
    frame = pd.DataFrame.from_dict(rows, orient="index")
    others = [c for c in frame if c not in (*table.columns, "AVG", "lo", "hi")]
    frame = frame.reindex(columns=[*table.columns, *others, "AVG", "lo", "hi"])
    frame.index = pd.MultiIndex.from_tuples(rows, names=["model", "source"])
    return frame.astype(float)


def compute_average(
    cells: Mapping[str, tuple[int, int]], columns: Sequence[str]
) -> tuple[float, float, float]:
    """Return the mean over columns and its interval, in percent; NaN if one lacks."""
    if not columns or not set(columns) <= cells.keys():
        return math.nan, math.nan, math.nan
    hits, totals = zip(*(cells[column] for column in columns), strict=True)
    mean = float(np.mean([k / n for k, n in zip(hits, totals, strict=True)]))
    low, high = intervals.macro_interval(hits, totals)
    return 100 * mean, 100 * low, 100 * high


def format_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Format `build_table`: published cells as printed, ours with one decimal."""
    shown = frame.drop(columns=["lo", "hi"]).astype(object)
    for place, row in enumerate(frame.itertuples()):
        digits = 1 if row.Index[1].startswith("ours") else 2
        cells = [f"{x:.{digits}f}" if x == x else "–" for x in shown.iloc[place]]
        if not math.isnan(row.lo):
            cells[-1] += f" [{row.lo:.0f}, {row.hi:.0f}]"
        shown.iloc[place] = cells
    return shown


def count_mig(runs: Runs) -> tuple[Counts, str]:
    """Return the hits and items on MIG, and what was measured on."""
    counts, kinds = {}, {"MIG"}
    for name, scores in runs.read_scores().items():
        kinds = (kinds - {"MIG"}) | {scores["benchmark"]["name"]}
        rows = {paper.TASK_COLUMN.get(k, k): row for k, row in scores["tasks"].items()}
        counts[name] = {k: (r["hit_05"], r["n"]) for k, r in rows.items() if r["n"]}
    return counts, f"ours, {', '.join(sorted(kinds))}"


def count_pooled(runs: Runs, columns: Mapping[str, str]) -> Counts:
    """Return the hits and items on whole benchmarks, {benchmark: column}."""
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for benchmark, column in columns.items():
        for name, scores in runs.read_scores(benchmark).items():
            if n := scores["pooled"]["n"]:
                hits = scores["pooled"]["hit_05"]
                counts.setdefault(name, {})[column] = hits, n
    return counts


def build_table_3(runs: Runs) -> pd.DataFrame:
    """Build Table 3, with the run's own single images in a column more."""
    columns = paper.REFCOCO_FILES | {"single": "single"}
    return build_table(paper.TABLE_3, count_pooled(runs, columns), "ours")


def build_findings(runs: Runs) -> pd.DataFrame:
    """Build the table of the paper's claims; with several runs, of the first."""
    first = Runs(runs.trained[:1])
    rows = first.read_logs("rollouts").get(findings.TREND_ARM)
    shares = tables.compute_difficulty_shares(rows, adjusted=True) if rows else None
    return findings.build_findings(first.items, shares)


def build_study(runs: Runs) -> pd.DataFrame:
    """Build the table of what a study says: claims, then other weights against none."""
    found = read_json(runs.studies[0]) if runs.studies else {}
    rows = [*found.get("findings", []), *found.get("weights", [])]
    weight = {"claim": "a weight gains over none"}
    frame = pd.DataFrame([weight | row for row in rows] or [{"arms": NOT_RUN}])
    columns = ["claim", "paper", "ours", "lo", "hi", "smallest seen", "verdict"]
    return frame.set_index("arms").reindex(columns=columns)


# ---------------------------------------------------------------- figures


def draw_bars(runs: Runs, width: float) -> Figure:
    """Draw Figure 1's bars: the paper's averages, then the run's with intervals."""
    zero_shot = count_pooled(runs, ZERO_SHOT_COLUMNS)
    known = set.intersection(*map(set, zero_shot.values())) if zero_shot else set()
    shared = [column for column in ZERO_SHOT_COLUMNS.values() if column in known]
    mig, source = count_mig(runs)
    measured = [(mig, paper.TABLE_1.columns), (zero_shot, shared)]
    titles = [f"ten tasks ({source})\n(paper: MIG-Bench, Table 1)"]
    kinds = f"of the kind of {', '.join(shared)}" if shared else "zero-shot"
    titles += [f"{kinds}\n(paper: all five of Table 2)"]
    models = {*benchmarks.MODELS, *measured[0][0], *zero_shot}
    figure, axes = _draw_panels(titles, width, 0.17 * len(models) + 1.3)
    for at, (counts, columns) in enumerate(measured):
        rows = [(f"{name} (paper)", *[v[at]] * 3) for name, v in paper.FIGURE_1.items()]
        rows += [(n, *compute_average(cells, columns)) for n, cells in counts.items()]
        rows += [(m, *[math.nan] * 3) for m in find_missing(counts)]
        frame = pd.DataFrame(rows, columns=["model", "acc", "lo", "hi"])
        diagrams.plot_average_bars(frame.assign(column="AVG"), ax=axes[at])
    return figure


def _draw_panels(
    titles: Iterable[str], width: float, height: float
) -> tuple[Figure, list[Any]]:
    """Return a figure with axes of that height for each title."""
    names = list(titles)
    columns = 2 if width > _WIDE and len(names) > 1 else 1
    lines = math.ceil(len(names) / columns)
    figure = drawing.create_figure(width, height * lines + 0.3)
    axes = [figure.add_subplot(lines, columns, k + 1) for k in range(len(names))]
    for ax, name in zip(axes, names, strict=True):
        ax.set_title(name)
    return figure, axes


def _share_legend(figure: Figure, columns: int = 2) -> Figure:
    """Put the legend of the first axes above all of them, away from the data."""
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes)]
    for legend in filter(None, legends):
        legend.remove()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    look: dict[str, Any] = {"loc": "outside upper center", "frameon": False}
    figure.legend(handles, labels, ncols=columns, **look)
    return figure


def _resize(figure: Figure, width: float, height: float) -> Figure:
    figure.set_size_inches(width, height)
    return figure


def draw_difficulty(runs: Runs, width: float) -> Figure:
    """Draw Figure 3 for each GRPO training."""
    rows = runs.read_logs("rollouts")
    figure, axes = _draw_panels(rows, width, 2.1)
    for ax, groups in zip(axes, rows.values(), strict=True):
        plots.plot_difficulty_shares(tables.compute_difficulty_shares(groups), ax=ax)
        ax.set_xlabel("update")  # the caption says the rest
        for line in ax.lines if width < _SCREEN else ():  # finer in print
            line.set(lw=0.65 * line.get_lw(), ms=0.6 * line.get_ms())
    return _share_legend(figure)


def draw_groups(runs: Runs, width: float) -> Figure:
    """Draw how the mean IoUs of groups are spread, early and late."""
    rows = runs.read_logs("rollouts")
    figure, axes = _draw_panels(rows, width, 1.7)
    for ax, groups in zip(axes, rows.values(), strict=True):
        plots.plot_group_histogram(groups, ax)
    return _share_legend(figure)


def draw_curves(runs: Runs, width: float) -> Figure:
    """Draw reward, mean IoU and length of the replies over GRPO trainings."""
    names = {"reward": "reward", "groups/mean_iou": "mean IoU"}
    names |= {"completions/mean_length": "tokens of a reply"}
    wide = width > _WIDE
    figure = plots.plot_training_curves(
        runs.read_logs("metrics"), tuple(names), columns=3 if wide else 1
    )
    for ax, name in zip(figure.axes, names.values(), strict=True):
        ax.set_ylabel(name)
    _resize(figure, width, 2.2 if wide else 4.6)
    return figure if wide else _share_legend(figure)


def draw_forest(runs: Runs, width: float) -> Figure:
    """Draw what each model gains over the one before, paired over the items of MIG."""
    published = paper.TABLE_4.to_frame()["AVG"]
    rows = {}
    for folder in runs.trained:
        scored = Runs([folder]).items
        for after, before in find_pairs(folder, scored).items():
            row = dict.fromkeys(("ours", "lo", "hi", "paper"), math.nan)
            if {after, before} <= scored.keys():
                effect = findings.compute_item_effect(scored[after], scored[before])
                row |= {k: 100 * getattr(effect, k) for k in ("lo", "hi")}
                row["ours"] = 100 * effect.mean
            stages = [paper.STAGE_OF_MODEL.get(model) for model in (after, before)]
            if all(stages):
                row["paper"] = published[stages[0]] - published[stages[1]]
            prefix = f"{folder.name}: " if len(runs.trained) > 1 else ""
            rows[f"{prefix}{after}\nover {before}"] = row
    figure = plots.plot_forest(pd.DataFrame.from_dict(rows, orient="index"))
    return _resize(figure, width, 0.36 * len(rows) + 0.8)


def draw_study(runs: Runs, width: float) -> Figure:
    """Draw the gains of `build_study`, without the trends."""
    frame = build_study(runs)
    frame = frame[frame.index.str.contains(" over ") & frame["ours"].notna()]
    frame.index = frame.index.str.replace(" over ", "\nover ")
    return _resize(plots.plot_forest(frame), width, 0.36 * len(frame) + 0.8)


def find_pairs(folder: Path, scored: Iterable[str]) -> dict[str, str]:
    """Return which model each is compared with: GRPO with what it began from.

    Weights are compared with GRPO without one.
    """
    stage = folder / "grpo_none" / "stage.json"
    needs = read_json(stage)["needs"] if stage.is_file() else {}
    begun = [model for model in benchmarks.MODELS if model in needs]
    pairs = tables.BEFORE | dict(zip(["grpo_none"], begun[-1:], strict=False))
    weighted = sorted(m for m in scored if m.startswith("grpo_") and m not in pairs)
    return pairs | dict.fromkeys(weighted, "grpo_none")


def draw_iou_curve(runs: Runs, width: float) -> Figure:
    """Draw the accuracy over the IoU threshold."""
    ious = {name: [item.iou for item in items] for name, items in runs.items.items()}
    figure = _resize(plots.plot_iou_curve(ious), width, 2.9)
    return _share_legend(figure, columns=3)


def draw_failures(runs: Runs, width: float) -> Figure:
    """Draw what became of the items of MIG, for each model."""
    kinds = list(scoring.KINDS)
    rows = {
        name: tables.count_kinds(some).loc["all"] for name, some in runs.items.items()
    }
    rows |= dict.fromkeys(find_missing(rows), pd.Series(0, index=kinds))
    figure = plots.plot_kinds(pd.DataFrame(rows).T[kinds])
    _resize(figure, width, 0.2 * len(rows) + 1.2)
    return _share_legend(figure, columns=3 if width > _WIDE else 2)


def draw_cases(runs: Runs, width: float) -> Figure:
    """Draw two items of the first run that its last model won or lost over the base."""
    folder, scored = runs.trained[0], Runs(runs.trained[:1]).items
    main = [model for model in ("base", "shipped", "grpo_exp") if model in scored]
    shown = {model: scored[model] for model in main or scored}
    config = {"data": read_json(folder / "data" / "stage.json")["config"]}
    run = Run(folder.name, folder, 0, config)
    bench, last = benchmarks.load_benchmark(run, "mig"), list(shown)[-1]
    replies = read_predictions(benchmarks.get_predictions_path(run, last, "mig"))
    picked = report.pick_cases(shown, 1)
    titles = {place: title for title, places in picked.items() for place in places}
    order = [place for title in list(picked)[::-1] for place in picked[title]]
    cases = []
    for place in list(dict.fromkeys(order))[:2]:
        boxes = {name: items[place].box for name, items in shown.items()}
        index = shown[last][place].index
        said = f"{last}: {replies[index].text}"
        cases.append((titles[place], bench.items[index], boxes, said))
    return diagrams.draw_cases(cases, width)


# ---------------------------------------------------------------- all of them

TABLES: dict[str, Callable[[Runs], pd.DataFrame]] = {
    "table1": lambda runs: build_table(paper.TABLE_1, *count_mig(runs)),
    "table2": lambda runs: build_table(
        paper.TABLE_2, count_pooled(runs, ZERO_SHOT_COLUMNS), "ours"
    ),
    "table3": build_table_3,
    "table4": lambda runs: build_table(paper.TABLE_4, *count_mig(runs), pairs=True),
    "findings": build_findings,
    "study": build_study,
}
FIGURES: dict[str, Callable[[Runs, float], Figure]] = {
    "figure1": draw_bars,
    "figure2": lambda _, width: diagrams.draw_pipeline(width),
    "figure3": draw_difficulty,
    "cases": draw_cases,
    "curves": draw_curves,
    "weights": lambda _, width: _resize(plots.plot_weight_functions(), width, 2.3),
    "forest": draw_forest,
    "ablation": draw_study,
    "iou_curve": draw_iou_curve,
    "failures": draw_failures,
    "groups": draw_groups,
}


def draw(name: str, runs: Runs, width: float) -> Figure:
    """Draw one of `FIGURES`, in inches; what the runs lack is written into it."""
    for pattern in SPECS[name].get("needs", ()):
        if not any(any(folder.glob(pattern)) for folder in runs.folders):
            figure = drawing.create_figure(width, 1)
            figure.text(0.5, 0.5, f"{NOT_RUN}: no {pattern}", ha="center")
            return figure
    return FIGURES[name](runs, width)

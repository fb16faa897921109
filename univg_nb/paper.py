"""The numbers that the paper prints; we measured none of them.

They are read from `assets/paper.yaml`, which says where each is from. Accuracies are
Acc@0.5 in percent, and the last column of a table is its printed average.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from univg_nb import io


@dataclass(frozen=True)
class Task:
    """A task of MIG-Bench.

    The numbers of the revised benchmark are inferred: with them the printed percentages
    are exact k/N.
    """

    name: str  # in the JSON file
    column: str  # in the paper's tables
    original: int  # items, counted in the public file
    revised: int  # items in the revised benchmark
    hits: int  # revised items that UniVG-R1 got right


@dataclass(frozen=True)
class Misprint:
    """A printed number that cannot be right, the likely number, and the reason."""

    row: str
    column: str
    printed: float
    likely: float
    reason: str


@dataclass(frozen=True)
class PaperTable:
    """One printed table; `rows` maps a row's name to its cells, the average last."""

    number: int
    title: str
    source: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float, ...]]
    misprints: tuple[Misprint, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """Return the table as printed: rows x (columns and "AVG"), in percent."""
        columns = [*self.columns, "AVG"]
        return pd.DataFrame.from_dict(self.rows, orient="index", columns=columns)

    def compute_average(self, row: str) -> float:
        """Return the unweighted mean of a row's cells, to 2 places as printed."""
        cells = self.rows[row][:-1]
        return round(sum(cells) / len(cells), 2)


@dataclass(frozen=True)
class Figure3:
    """Shares of easy, medium and hard groups during training, read off drawn curves."""

    iteration: tuple[int, ...]
    easy: tuple[float, ...]
    medium: tuple[float, ...]
    hard: tuple[float, ...]
    easy_trend: tuple[float, float]  # the two ends of a dashed line
    hard_trend: tuple[float, float]
    tolerance: float  # of the reading


def find_hits(percent: float, n: int) -> int | None:
    """Return the k whose 100 k/n prints as `percent` (2 places), or None."""
    k = round(percent * n / 100)
    # half a unit of the last printed place, plus room for binary rounding
    return k if abs(100 * k / n - percent) <= 0.005 + 1e-9 else None


def _read_table(misprints: tuple[dict[str, Any], ...] = (), **rest: Any) -> PaperTable:
    return PaperTable(**rest, misprints=tuple(Misprint(**m) for m in misprints))


_DATA = io.read_asset("paper.yaml")

MIG_TASKS = tuple(Task(**task) for task in _DATA["mig_tasks"])
TASK_COLUMN = {task.name: task.column for task in MIG_TASKS}
TABLES = tuple(_read_table(**table) for table in _DATA["tables"])
TABLE_1, TABLE_2, TABLE_3, TABLE_4 = TABLES
ROWS_ON_ORIGINAL_BENCH: tuple[str, ...] = _DATA["rows_on_original_bench"]
REFCOCO_FILES: dict[str, str] = _DATA["refcoco_files"]
STAGE_OF_MODEL: dict[str, str] = _DATA["stage_of_model"]
# Figure 1, bottom right: averages of MIG-Bench (Table 1) and zero-shot (Table 2).
FIGURE_1 = {
    name: (TABLE_1.rows[name][-1], TABLE_2.rows[name][-1])
    for name in ("Qwen2-VL-7B", "Migician", "UniVG-R1")
}
FIGURE_3 = Figure3(**_DATA["figure_3"])

"""The numbers that the paper prints, each with its source; we measured none of them.

They were read from images of the paper's tables and figures (arXiv 2505.14231) unless a
table says otherwise; docs/paper_facts.md#tables says how sure each is. Accuracies are
Acc@0.5 in percent, and the last column of a table is its printed average.
"""

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Task:
    """A task of MIG-Bench.

    Attributes:
        name: in the JSON file.
        column: in the paper's tables.
        original: number of items, counted in the public file.
        revised: number of items in the revised benchmark, inferred: with it the printed
            percentages are exact k/N.
        hits: items that UniVG-R1 got right, inferred likewise.
    """

    name: str
    column: str
    original: int
    revised: int
    hits: int


MIG_TASKS = (
    Task("diff", "Static", 528, 528, 380),
    Task("view_diff", "Robust", 94, 94, 55),
    Task("common_object", "Common", 816, 815, 759),
    Task("object_tracking", "OT", 550, 550, 420),
    Task("multi_view", "MV", 288, 288, 191),
    Task("region", "Region", 1203, 1203, 983),
    Task("refer_grounding", "Refer", 99, 99, 82),
    Task("group_grounding", "GG", 499, 485, 427),
    Task("reasoning", "Reason", 101, 97, 61),
    Task("correspondence", "Co-Re", 117, 117, 52),
)
TASK_COLUMN = {task.name: task.column for task in MIG_TASKS}
_MIG_COLUMNS = tuple(TASK_COLUMN.values())


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
        return pd.DataFrame.from_dict(
            self.rows, orient="index", columns=[*self.columns, "AVG"]
        )

    def compute_average(self, row: str) -> float:
        """Return the unweighted mean of a row's cells, to 2 places as printed."""
        cells = self.rows[row][:-1]
        return round(sum(cells) / len(cells), 2)


def find_hits(percent: float, n: int) -> int | None:
    """Return the k whose 100 k/n prints as `percent` (2 places), or None."""
    k = round(percent * n / 100)
    # half a unit of the last printed place, plus room for binary rounding
    return k if abs(100 * k / n - percent) <= 0.005 + 1e-9 else None


# fmt: off
TABLE_1 = PaperTable(
    1,
    "Revised MIG-Bench, Acc@0.5 %",
    "paper, Table 1",
    _MIG_COLUMNS,
    {
        "Qwen2-VL-72B": (
            51.13, 43.61, 73.74, 24.54, 32.63, 19.86, 37.37, 67.83, 50.51, 17.94, 41.91
        ),
        "Mantis": (
            1.52, 0.00, 3.31, 12.18, 2.08, 1.00, 1.01, 10.02, 0.00, 0.85, 3.20
        ),
        "LLaVA-OV-7B": (
            6.06, 3.19, 3.43, 0.18, 1.04, 1.08, 9.09, 15.43, 6.93, 0.85, 4.73
        ),
        "MiniCPM2.6": (
            14.58, 2.13, 14.34, 9.82, 6.25, 1.75, 11.11, 10.02, 2.97, 2.56, 7.55
        ),
        "mPLUG-Owl3": (
            18.56, 6.38, 34.93, 8.55, 7.64, 2.41, 7.07, 22.85, 9.09, 5.98, 12.35
        ),
        "InternVL2-8B": (
            8.52, 19.15, 38.40, 19.82, 10.07, 5.24, 34.34, 39.79, 26.80, 7.69, 20.98
        ),
        "Qwen2-VL-7B": (
            29.92, 36.17, 43.07, 14.55, 9.38, 15.54, 29.29, 63.51, 44.33, 16.24, 30.20
        ),
        "Migician": (
            70.64, 45.74, 72.76, 67.82, 60.07, 72.57, 75.76, 84.12, 52.58, 33.33, 63.54
        ),
        "UniVG-R1": (
            71.97, 58.51, 93.13, 76.36, 66.32, 81.71, 82.83, 88.04, 62.89, 44.44, 72.64
        ),
    },
    (
        Misprint("UniVG-R1", "AVG", 72.64, 72.62, "the mean of its cells is 72.62"),
    ),
)
# Four rows fit only the item counts of the original benchmark, so they look copied from
# Migician's paper; Qwen2-VL-72B fits neither benchmark in half of its cells.
ROWS_ON_ORIGINAL_BENCH = ("Mantis", "LLaVA-OV-7B", "MiniCPM2.6", "mPLUG-Owl3")

TABLE_2 = PaperTable(
    2,
    "Zero-shot, Acc@0.5 %",
    "paper, Table 2",
    ("LISA val", "LISA test", "LLMSeg", "ReasonVOS", "ReVOS"),
    {
        "Qwen2-VL-7B": (52.00, 49.17, 35.53, 9.83, 23.55, 34.02),
        "Migician": (36.00, 32.09, 34.68, 33.41, 39.70, 35.18),
        "UniVG-R1": (64.00, 59.69, 50.60, 58.73, 60.03, 58.61),
    },
)

TABLE_3 = PaperTable(
    3,
    "RefCOCO/+/g, Acc@0.5 %",
    "reported by another paper, not seen in this one",
    (
        "RefCOCO val", "RefCOCO testA", "RefCOCO testB",
        "RefCOCO+ val", "RefCOCO+ testA", "RefCOCO+ testB",
        "RefCOCOg val", "RefCOCOg test",
    ),
    {
        "Qwen2.5-VL-7B": (
            90.00, 92.50, 85.40, 84.20, 89.10, 76.90, 87.20, 87.20, 86.56
        ),
        "Migician": (91.62, 93.49, 87.22, 86.13, 91.06, 79.93, 88.06, 87.80, 88.16),
        "UniVG-R1": (91.64, 93.11, 87.16, 85.91, 90.53, 80.04, 88.67, 88.56, 88.20),
    },
)

# The files that RefCOCO/+/g are distributed in, and the columns they stand for.
_FILES = (
    "refcoco_val", "refcoco_testA", "refcoco_testB",
    "refcocop_val", "refcocop_testA", "refcocop_testB",
    "refcocog_val", "refcocog_test",
)
REFCOCO_FILES = dict(zip(_FILES, TABLE_3.columns, strict=True))

TABLE_4 = PaperTable(
    4,
    "Stages on the revised MIG-Bench, Acc@0.5 %",
    "paper, Table 4",
    _MIG_COLUMNS,
    {
        "Qwen2-VL-7B": TABLE_1.rows["Qwen2-VL-7B"],
        "Pure RL 21k": (
            46.02, 59.47, 88.59, 57.09, 48.96, 26.77, 78.79, 84.95, 54.64, 29.06, 57.43
        ),
        "CoT-SFT 21k": (
            57.58, 48.94, 90.18, 68.91, 58.68, 52.78, 80.81, 84.54, 64.95, 37.61, 64.50
        ),
        "SFT 90k": (
            73.48, 45.74, 89.69, 71.27, 62.85, 86.62, 77.78, 84.74, 49.48, 31.62, 67.30
        ),
        "CoT-SFT 90k": (
            68.75, 48.94, 90.55, 74.55, 61.46, 80.88, 78.79, 83.30, 60.82, 41.89, 69.00
        ),
        "+ CoT-SFT 10k": (
            70.64, 52.13, 89.69, 75.45, 60.42, 76.64, 78.79, 83.30, 58.76, 41.88, 68.77
        ),
        "+ GRPO 10k": (
            71.59, 53.19, 93.01, 77.09, 64.24, 80.96, 81.82, 86.19, 55.67, 42.74, 70.65
        ),
        "+ GRPO-Difficulty 10k": TABLE_1.rows["UniVG-R1"],
    },
    (
        Misprint("Pure RL 21k", "Robust", 59.47, 59.57, "no k/94 prints as 59.47"),
        Misprint("CoT-SFT 90k", "Co-Re", 41.89, 41.88, "no k/117 prints as 41.89"),
        Misprint("SFT 90k", "AVG", 67.30, 67.33, "the mean of its cells is 67.33"),
        Misprint("+ GRPO-Difficulty 10k", "AVG", 72.64, 72.62, "same row as Table 1"),
    ),
)
# fmt: on
TABLES = (TABLE_1, TABLE_2, TABLE_3, TABLE_4)

# Which row of Table 4 a model of ours stands beside (the run folder's model names).
STAGE_OF_MODEL = {
    "base": "Qwen2-VL-7B",
    "sft_nocot": "SFT 90k",
    "sft_lora": "CoT-SFT 90k",
    "grpo_none": "+ GRPO 10k",
    "grpo_exp": "+ GRPO-Difficulty 10k",
}

# Figure 1, bottom right: averages of MIG-Bench (Table 1) and zero-shot (Table 2).
FIGURE_1 = {
    name: (TABLE_1.rows[name][-1], TABLE_2.rows[name][-1])
    for name in ("Qwen2-VL-7B", "Migician", "UniVG-R1")
}


@dataclass(frozen=True)
class Figure3:
    """Shares of easy, medium and hard groups during training.

    They were read off the drawn, smoothed curves, to within `tolerance`
    (docs/paper_facts.md#figure-3). A trend holds the two ends of a dashed line.
    """

    # fmt: off
    iteration: tuple[int, ...] = (10, 60, 110, 160, 200, 260, 310, 360, 410, 450, 495)
    easy: tuple[float, ...] = (
        0.35, 0.37, 0.49, 0.50, 0.51, 0.53, 0.44, 0.52, 0.56, 0.67, 0.63
    )
    medium: tuple[float, ...] = (
        0.36, 0.43, 0.25, 0.29, 0.30, 0.32, 0.36, 0.38, 0.28, 0.21, 0.30
    )
    hard: tuple[float, ...] = (
        0.29, 0.20, 0.26, 0.21, 0.18, 0.16, 0.20, 0.11, 0.16, 0.12, 0.08
    )
    # fmt: on
    easy_trend: tuple[float, float] = (0.385, 0.60)
    hard_trend: tuple[float, float] = (0.258, 0.12)
    tolerance: float = 0.015


FIGURE_3 = Figure3()

"""What the reference trainings come to: differences with intervals, curves, tasks.

`results` is everywhere results[method][seed][measure], one value per item.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import intervals
from univg_nb.io import read_jsonl
from univg_nb.study.data import has_reasoning

Results = Mapping[str, Mapping[int, Mapping[str, list[float]]]]
MEASURES = ("expected_iou", "greedy_iou", "hit")
SFT = "sft"  # the model every training starts from
PAIRS = (
    ("none", SFT),
    ("exp", SFT),
    ("exp", "none"),
    ("exp", "constant"),
    ("exp", "exp_unit_mean"),
    ("exp_unit_mean", "none"),
    ("constant", "none"),
)
# Student's t, 97.5 %, for 1 to 9 degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def compare_methods(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Return a - b of two methods, (seeds, items) each, with paired 95 % intervals.

    items_95: chance of the items drawn, for the mean of these trainings (bootstrap).
    seeds_95: chance of the training, from the differences of the seeds (Student's t);
    None for one seed.
    """
    difference = a - b
    by_seed = difference.mean(axis=1)  # (seeds,)
    over_items = intervals.paired_bootstrap(a.mean(axis=0), b.mean(axis=0))
    over_seeds = None
    if (count := len(by_seed)) > 1:
        half = T_975[count - 2] * by_seed.std(ddof=1) / math.sqrt(count)
        over_seeds = [float(by_seed.mean() - half), float(by_seed.mean() + half)]
    return {
        "mean_diff": float(difference.mean()),
        "by_seed": by_seed.tolist(),
        "items_95": [over_items["lo"], over_items["hi"]],
        "seeds_95": over_seeds,
    }


def compare(results: Results) -> dict[str, dict[str, Any]]:
    """Return {"exp - none": {measure: `compare_methods`}, ...} of `PAIRS`."""

    def stack(method: str, measure: str) -> np.ndarray:
        seeds = results[method].values()
        return np.array([one[measure] for one in seeds])  # (seeds, items)

    return {
        f"{a} - {b}": {m: compare_methods(stack(a, m), stack(b, m)) for m in MEASURES}
        for a, b in PAIRS
    }


def compute_means(
    results: Results, keep: Any = slice(None), measures: Sequence[str] = MEASURES
) -> dict[str, dict[str, list[float]]]:
    """Return {method: {measure: mean over the items to `keep`, one a seed}}."""
    return {
        method: {
            measure: [
                float(np.array(one[measure])[keep].mean()) for one in seeds.values()
            ]
            for measure in measures
        }
        for method, seeds in results.items()
    }


def compute_task_means(
    items: Sequence[GroundingSample], results: Results
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return {method: {task: {"hit" or "thinks": mean over its items, one a seed}}}."""
    tasks = np.array([item.task for item in items])  # (items,)
    measures = ("hit", "thinks")
    return {
        method: {
            str(task): compute_means({method: seeds}, tasks == task, measures)[method]
            for task in dict.fromkeys(tasks)
        }
        for method, seeds in results.items()
    }


def read_curves(folder: Path) -> dict[str, list[float]]:
    """Read mean IoU, length in tokens and reasoning share of replies, by update."""
    log = read_jsonl(folder / "metrics.jsonl")
    thinking: dict[int, list[bool]] = {row["step"]: [] for row in log}
    for group in read_jsonl(folder / "rollouts.jsonl"):
        thinking[group["step"]] += map(has_reasoning, group["replies"])
    return {
        "mean_iou": [round(row["groups/mean_iou"], 4) for row in log],
        "length": [round(row["completions/mean_length"], 1) for row in log],
        "thinks": [round(float(np.mean(some)), 4) for some in thinking.values()],
    }

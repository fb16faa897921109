"""What the reference trainings come to: differences with intervals, curves, tasks.

`results` is everywhere results[method][seed][measure], one value per item.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from univg_nb import io
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import intervals
from univg_nb.study import data

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


def over_seeds_and_items(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """a - b of two methods, (seeds, items) each, with two paired 95 % intervals.

    items: chance of the items drawn, for the mean of these very trainings (bootstrap).
    seeds: chance of the training, from the differences of the seeds (Student's t);
    None for one seed.
    """
    difference = a - b
    by_seed = difference.mean(axis=1)  # (seeds,)
    over_items = intervals.paired_bootstrap(a.mean(axis=0), b.mean(axis=0))
    over_seeds = None
    count = len(by_seed)
    if count > 1:
        half = T_975[count - 2] * by_seed.std(ddof=1) / math.sqrt(count)
        over_seeds = [float(by_seed.mean() - half), float(by_seed.mean() + half)]
    return {
        "mean_diff": float(difference.mean()),
        "by_seed": by_seed.tolist(),
        "items_95": [over_items["lo"], over_items["hi"]],
        "seeds_95": over_seeds,
    }


def compare(results: Results) -> dict:
    """{"exp - none": {measure: over_seeds_and_items()}, ...} of the pairs at hand."""
    made = {}
    for first, second in PAIRS:
        if not {first, second} <= results.keys():
            continue
        pair = [list(results[method].values()) for method in (first, second)]
        made[f"{first} - {second}"] = {
            measure: over_seeds_and_items(
                *(np.array([seed[measure] for seed in seeds]) for seeds in pair)
            )
            for measure in MEASURES
        }
    return made


def means(results: Results) -> dict[str, dict[str, list[float]]]:
    """{method: {measure: mean over the items, one a seed}}."""
    return {
        method: {
            measure: [float(np.mean(one[measure])) for one in seeds.values()]
            for measure in MEASURES
        }
        for method, seeds in results.items()
    }


def by_task(
    items: Sequence[GroundingSample], results: Results
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """{method: {task: {measure: mean over the task's items, one a seed}}} of the greedy
    replies."""
    tasks = np.array([item.task for item in items])  # (items,)
    return {
        method: {
            str(task): {
                measure: [
                    float(np.array(one[measure])[tasks == task].mean())
                    for one in seeds.values()
                ]
                for measure in ("hit", "thinks")
            }
            for task in dict.fromkeys(tasks)
        }
        for method, seeds in results.items()
    }


def curves(folder: Path) -> dict[str, list[float]]:
    """Per update of a training: mean IoU and length in tokens of the sampled replies,
    and the share of them that think."""
    log = io.read_jsonl(folder / "metrics.jsonl")
    thinking: dict[int, list[bool]] = {row["step"]: [] for row in log}
    for group in io.read_jsonl(folder / "rollouts.jsonl"):
        thinking[group["step"]] += map(data.thinks, group["replies"])
    return {
        "mean_iou": [round(row["groups/mean_iou"], 4) for row in log],
        "length": [round(row["completions/mean_length"], 1) for row in log],
        "thinks": [round(float(np.mean(some)), 4) for some in thinking.values()],
    }

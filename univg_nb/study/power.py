"""How many seeds and items it takes to see a difference of so many points.

The difference of two arms on one item and one seed varies by the item, by the seed
(the luck of the training) and by what is left. More items lower the first, more seeds
the second, both the third.
"""

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import pandas as pd

from univg_nb.figures.findings import Effect, find_t_quantile
from univg_nb.minimig.items import TASKS
from univg_nb.study.design import Goal

MOST_SEEDS = 30


@dataclass(frozen=True)
class Spread:
    """Variances of a difference in hits, of one item, one seed, and the rest of both.

    That of the mean over N items and S seeds is items/N + seeds/S + rest/(N S).
    """

    items: float
    seeds: float
    rest: float


def estimate_spread(effect: Effect) -> Spread:
    """Estimate variances from a pilot of two seeds or more."""
    rest = effect.se_rest**2  # a part of both standard errors
    return Spread(
        max(0.0, effect.se_items**2 - rest) * effect.items,
        max(0.0, effect.se_seeds**2 - rest) * effect.seeds,
        rest * effect.items * effect.seeds,
    )


def compute_half_width(spread: Spread, seeds: int, items: int) -> float:
    """Compute the half-width to expect of the interval of `findings.compute_effect`."""
    rest = spread.rest / (seeds * items)
    by_items, by_seeds = spread.items / items + rest, spread.seeds / seeds + rest
    variance = by_items + by_seeds - rest
    if not variance:
        return 0.0
    parts = by_items**2 / max(1, items - len(TASKS)) + by_seeds**2 / (seeds - 1)
    return find_t_quantile(variance**2 / parts) * math.sqrt(variance)


def find_items(spread: Spread, seeds: int, goal: Goal, least: int) -> int | None:
    """Return the fewest items that reach the goal; None if its most are too few."""
    normal = NormalDist()
    ratio = normal.inv_cdf(goal.power) / normal.inv_cdf(0.975)
    widest, step = goal.points / 100 / (1 + ratio), len(TASKS)
    low, high = -(-least // step), max(least, goal.most_items) // step
    if compute_half_width(spread, seeds, high * step) > widest:
        return None
    while low < high:
        middle = (low + high) // 2
        if compute_half_width(spread, seeds, middle * step) <= widest:
            high = middle
        else:
            low = middle + 1
    return low * step


def make_plan(
    spread: Spread, goal: Goal, seeds: int, items: int, seconds: tuple[float, float]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Find the fewest seeds, and with them the fewest items, that reach the goal.

    Seeds are to be few first because a training takes longer than its answers.

    Args:
        spread: the variances of a pilot.
        goal: what is to be resolved, and how surely.
        seeds: the least number of seeds.
        items: the least number of items, of all tasks.
        seconds: of one seed of both arms: the trainings, and the answers to one item.

    Returns:
        The plan; and for numbers of seeds the items they take, the half-width and the
        smallest effect seen, both in points, and the hours of all one after another.

    Raises:
        ValueError: `MOST_SEEDS` are too few.
    """
    needed = {s: find_items(spread, s, goal, items) for s in range(seeds, MOST_SEEDS)}
    enough = next((s for s, n in needed.items() if n), None)
    if enough is None:
        raise ValueError(
            f"{goal.points:g} points are not seen with {MOST_SEEDS} seeds and "
            f"{goal.most_items} items; raise plan.points or plan.most_items"
        )
    rows = {}
    for s in range(seeds, enough + 4):
        n = needed.get(s) or goal.most_items
        half = 100 * compute_half_width(spread, s, n)
        seen = Effect(0.0, -half, half, n).find_smallest_detectable(goal.power)
        row = {"items": n, "enough": bool(needed.get(s)), "half-width": half}
        hours = s * (seconds[0] + n * seconds[1]) / 3600
        rows[s] = row | {"smallest seen": seen, "hours": hours}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("seeds")
    plan = {"seeds": enough, "items": needed[enough], "goal": asdict(goal)}
    return plan | {"spread": asdict(spread)}, table

"""How certain a number is: intervals of accuracies, tests of paired differences.

The benchmarks have a few hundred items and their smallest tasks about a hundred, where
one standard error is 4 to 5 points (docs/paper_facts.md#tables). So every accuracy has
a 95 % interval, and two models are compared on the same items.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval
_CHUNK = 2_000_000  # resampled values held at once: 16 MB


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """Return the Wilson score interval of k successes in n trials, both ends in 0..1.

    Unlike p +- z s.e. it stays inside 0..1 and is not empty at k = 0 or k = n. Without
    trials it is (0, 1). Raises ValueError unless 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"{k} successes of {n} trials is impossible")
    if n == 0:
        return 0.0, 1.0
    p, z = k / n, _Z
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # at the ends the exact values are 0 and 1; rounding must not lose them
    low = 0.0 if k == 0 else max(0.0, center - half)
    high = 1.0 if k == n else min(1.0, center + half)
    return low, high


def macro_interval(hits: Sequence[int], totals: Sequence[int]) -> tuple[float, float]:
    """Return the interval of the unweighted mean of several accuracies, in 0..1.

    The errors of the T tasks are independent, so the variance is sum p(1-p)/n over T^2,
    with p shrunk as (k+2)/(n+4) so that a task at 0 or 1 still counts as uncertain.

    `hits` are the successes of each task, `totals` its trials, at least 1.
    """
    if min(totals, default=0) < 1:
        raise ValueError(f"totals {list(totals)}: leave empty tasks out")
    mean = sum(k / n for k, n in zip(hits, totals, strict=True)) / len(hits)
    shrunk = [((k + 2) / (n + 4), n) for k, n in zip(hits, totals, strict=True)]
    error = math.sqrt(sum(p * (1 - p) / n for p, n in shrunk)) / len(hits)
    return max(0.0, mean - _Z * error), min(1.0, mean + _Z * error)


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"paired samples have shapes {first.shape} and {second.shape}: give one "
            "value per item for both models, in the same order"
        )
    return first, second


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, n_boot: int = 10_000
) -> dict[str, float]:
    """Test whether model a is better than model b by resampling their common items.

    `a` and `b` are the values (N,) of the same items, hits (0/1) or IoUs.

    Returns:
        mean_diff = mean(a - b), its percentile interval lo, hi, and a two-sided p:
        twice the smaller share of resamples on either side of 0, counting the sample
        itself, so never exactly 0. Differences that are all 0 have the interval of the
        rule of three, +- 3/N.
    """
    first, second = _pair(a, b)
    difference = first - second  # (N,)
    rng = np.random.default_rng(0)
    n, rows = len(difference), max(1, _CHUNK // len(difference))
    sizes = [min(rows, n_boot - start) for start in range(0, n_boot, rows)]
    resampled = (difference[rng.integers(n, size=(k, n))] for k in sizes)  # (k, N)
    means = np.concatenate([values.mean(axis=1) for values in resampled])
    low, high = np.quantile(means, [0.025, 0.975])
    if not difference.any():  # nothing to resample: the rule of three, at most 3/n
        high = min(1.0, -math.log(0.05) / n)
        low = -high
    below = (np.sum(means <= 0) + 1) / (n_boot + 1)
    above = (np.sum(means >= 0) + 1) / (n_boot + 1)
    return {
        "mean_diff": float(difference.mean()),
        "lo": float(low),
        "hi": float(high),
        "p": float(min(1.0, 2 * min(below, above))),
    }


def mcnemar_test(a: ArrayLike, b: ArrayLike) -> dict[str, Any]:
    """Run the exact McNemar test on hits (N,) of two models on the same items.

    Returns:
        b, c: items that only the first or only the second model got; p: the two-sided
        binomial p of that split.
    """
    first, second = (values > 0 for values in _pair(a, b))
    only_first = int(np.sum(first & ~second))
    only_second = int(np.sum(second & ~first))
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    # integers until the end: 2^n overflows a float beyond n = 1023
    return {"b": only_first, "c": only_second, "p": min(1.0, 2 * tail / 2**n)}

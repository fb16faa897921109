"""What the measurements say about a claim: an effect, its interval, a verdict.

The rule of the verdict was written before any training that it judges. A claim says
that one arm is better than another; the effect is the difference in macro Acc@0.5 on
the same items, with a 95 % interval.

* supported: the whole interval is above 0.
* contradicted: otherwise, if the whole interval is below `MATTERS`, so that a gain that
  matters is excluded.
* undecided: everything else. The smallest detectable effect says what this measurement
  could have seen.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from textwrap import fill

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from univg_nb import paper
from univg_nb.evaluate.scoring import ItemScore, sort_tasks
from univg_nb.io import read_asset

MATTERS = 0.01  # the smallest gain in accuracy that matters: one point
VERDICTS = ("supported", "contradicted", "undecided")
_NORMAL = NormalDist()
_RULE_OF_THREE = -math.log(0.05)  # an event never seen in n trials: at most 3/n
# Where seeds do not differ, the estimate of what they add scatters around 0 and may
# leave too small a variance. With this least share of the items' own, intervals of
# five seeds or more cover 94 to 97 % in simulation, whatever varies.
_LEAST_SHARE = 0.6


@dataclass(frozen=True)
class Effect:
    """A difference with its 95 % interval, and the standard errors behind it.

    se_items is the chance of the items drawn, se_seeds that of the training (NaN for
    one seed: then the interval is of these very models). Both contain se_rest, what is
    left of single answers when the means of items and of seeds are taken off.
    """

    mean: float
    lo: float
    hi: float
    items: int
    seeds: int = 1
    se_items: float = math.nan
    se_seeds: float = math.nan
    se_rest: float = math.nan

    def find_smallest_detectable(self, power: float = 0.8) -> float:
        """Return the effect whose interval would exclude 0 with this probability."""
        half = (self.hi - self.lo) / 2
        return half * (1 + _NORMAL.inv_cdf(power) / _NORMAL.inv_cdf(0.975))


@dataclass(frozen=True)
class Claim:
    """Arm `after` is better than `before`; `published` are their rows of Table 4."""

    text: str
    after: str
    before: str
    published: tuple[str, str] | None = None


CLAIMS = tuple(Claim(**claim) for claim in read_asset("claims.yaml"))
# Groups change over the training of this arm; its ends are those of Figure 3.
TREND_ARM = "grpo_none"
TRENDS = {
    "easy groups become more": ("easy", 1, paper.FIGURE_3.easy_trend),
    "hard groups become fewer": ("hard", -1, paper.FIGURE_3.hard_trend),
}


def find_t_quantile(df: float) -> float:
    """Return the 97.5 % quantile of Student's t, for any df > 0."""
    angle = np.linspace(0, np.pi / 2, 20_001)  # t = sqrt(df) tan(angle)
    density = np.cos((angle[:-1] + angle[1:]) / 2) ** (df - 1)
    share = np.cumsum(density) / density.sum()
    return math.sqrt(df) * math.tan(np.interp(0.95, share, angle[1:]))


def compute_effect(
    after: ArrayLike, before: ArrayLike, tasks: Sequence[str] | None = None
) -> Effect:
    """Compute after - before of the macro mean over tasks, paired over items and seeds.

    Items and seeds are crossed: every seed answers every item. Both are drawn by
    chance, so the variances of the two means are added and what they share, the
    residual, is taken off once. Tasks are not drawn: items vary within them. Degrees of
    freedom are Satterthwaite's. Of few seeds the interval covers less at worst: of
    three 93 %, of two 88 %.
    The interval is never narrower than three differing items would make it, which is
    the rule of three when no item differs at all.

    Args:
        after: (N,) or (seeds, N), hits or IoUs in 0..1.
        before: the same shape, the same items in the same order.
        tasks: (N,) names; None for one task.
    """
    first, second = (np.atleast_2d(np.asarray(x, dtype=float)) for x in (after, before))
    names = np.asarray(tasks if tasks is not None else [""] * first.shape[1])
    if first.shape != second.shape or len(names) != first.shape[1] or not first.size:
        raise ValueError(
            f"paired values of shapes {first.shape} and {second.shape} with "
            f"{len(names)} tasks: give one value for each seed and item of both arms"
        )
    difference = first - second  # (S, N)
    seeds, items = difference.shape
    _, place, counts = np.unique(names, return_inverse=True, return_counts=True)
    weights = 1 / (len(counts) * counts[place])  # (N,), of the mean over tasks
    by_seed = difference @ weights  # (S,)
    mean = float(by_seed.mean())
    # tasks of one item have no spread of their own: they are one stratum together
    strata = np.where(counts[place] > 1, place, -1)
    over_items, shared, free = 0.0, 0.0, 0
    for stratum in np.unique(strata):
        part, weight = difference[:, strata == stratum], weights[strata == stratum][0]
        n = part.shape[1]
        if n == 1:
            over_items = math.inf
            continue
        free += n - 1
        over_items += n * weight**2 * part.mean(axis=0).var(ddof=1)
        rest = part - part.mean(axis=0) - part.mean(axis=1, keepdims=True) + part.mean()
        if seeds > 1:
            square = (rest**2).sum() / ((seeds - 1) * (n - 1))
            shared += n * weight**2 * square / seeds
    over_seeds = float(by_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    variance = max(over_items + over_seeds - shared, _LEAST_SHARE * over_items)
    least = _RULE_OF_THREE / (len(counts) * counts.min())
    if not math.isfinite(variance):
        half = 1.0
    elif variance == 0:
        half = least
    else:
        parts = over_items**2 / free + over_seeds**2 / max(seeds - 1, 1)
        freedom = max(variance**2 / parts, seeds - 1)
        half = max(least, find_t_quantile(freedom) * math.sqrt(variance))
    low, high = max(-1.0, mean - half), min(1.0, mean + half)
    errors = [math.sqrt(over_items), math.nan, math.nan]
    if seeds > 1:
        errors[1:] = math.sqrt(over_seeds), math.sqrt(shared)
    return Effect(mean, low, high, items, seeds, *errors)


def compute_item_effect(
    after: Sequence[ItemScore], before: Sequence[ItemScore]
) -> Effect:
    """Compute the effect on hits at IoU 0.5 of the items that both were scored on."""
    earlier = {item.index: item for item in before}
    pairs = [(item, earlier[item.index]) for item in after if item.index in earlier]
    hits = [[one.iou >= 0.5 for one in pair] for pair in pairs]
    first, second = np.array(hits, dtype=float).reshape(-1, 2).T
    return compute_effect(first, second, [item.task for item, _ in pairs])


def compute_trend(values: ArrayLike) -> Effect:
    """Compute the change of a straight line through shares, first to last update.

    Of one training, (updates,), the interval knows how updates scatter about the line;
    of several, (trainings, updates), how their lines differ, which is the luck of the
    training too. Raises ValueError for fewer than three updates.
    """
    y = np.atleast_2d(np.asarray(values, dtype=float))  # (S, T)
    seeds, updates = y.shape
    if updates < 3:
        raise ValueError(f"{updates} updates are too few for a trend: it takes three")
    x = np.linspace(-0.5, 0.5, updates)
    slopes = y @ x / (x @ x)  # (S,)
    slope = float(slopes.mean())
    if seeds > 1:
        free, error = seeds - 1, float(slopes.std(ddof=1)) / math.sqrt(seeds)
    else:
        rest = y[0] - y[0].mean() - slope * x
        free, error = updates - 2, math.sqrt(rest @ rest / (updates - 2) / (x @ x))
    half = find_t_quantile(free) * error
    low, high = max(-1.0, slope - half), min(1.0, slope + half)
    return Effect(slope, low, high, updates, seeds)


def judge(effect: Effect, matters: float = MATTERS) -> str:
    """Return the verdict on a claim that the effect is above 0 (see the module)."""
    if effect.lo > 0:
        return "supported"
    return "contradicted" if effect.hi < matters else "undecided"


def explain(effect: Effect, matters: float = MATTERS) -> str:
    """Return the reason for the verdict as a sentence, in points."""
    low, high, least = 100 * effect.lo, 100 * effect.hi, 100 * matters
    seen = f"an effect of {100 * effect.find_smallest_detectable():.1f} would be seen"
    if effect.lo > 0:
        return f"the interval begins at {low:+.1f}, above 0"
    if effect.hi < matters:
        return f"the interval ends at {high:+.1f}, so {least:.0f} or more is excluded"
    return f"the interval reaches from {low:+.1f} to {high:+.1f}; {seen}"


def state_finding(claim: str, effect: Effect, matters: float = MATTERS) -> str:
    """Return a finding in words: the claim, the effect in points, verdict and reason.

    The claim is that the effect is above 0, as "chains help"; `matters` is the smallest
    effect that matters, 0..1.
    """
    mean, low, high = (100 * x for x in (effect.mean, effect.lo, effect.hi))
    text = f"{claim}: {mean:+.1f} points [{low:+.1f}, {high:+.1f}], "
    return fill(f"{text}{judge(effect, matters)}; {explain(effect, matters)}.", 88)


def compute_task_gains(
    after: Sequence[ItemScore], before: Sequence[ItemScore]
) -> pd.DataFrame:
    """Compute the effect on each task and on their mean, for `plots.plot_forest`.

    Returns:
        Index: the paper's names of the tasks, then AVG; columns ours, lo, hi in points,
        and paper, which is empty.
    """
    parts = {
        paper.TASK_COLUMN.get(task, task): [s for s in after if s.task == task]
        for task in sort_tasks({score.task for score in after})
    }
    rows = {}
    for name, part in (parts | {"AVG": list(after)}).items():
        effect = compute_item_effect(part, before)
        rows[name] = [100 * x for x in (effect.mean, effect.lo, effect.hi)]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["ours", "lo", "hi"])
    return frame.assign(paper=math.nan)


def build_findings(
    scored: Mapping[str, Sequence[ItemScore]], shares: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Build the table of the claims: ours beside the paper's, in points.

    Args:
        scored: item scores by model; a claim whose models are not all here is "not
            run".
        shares: of the groups of `TREND_ARM`, adjusted for the kinds of questions that
            its updates drew (`tables.compute_difficulty_shares`).

    Returns:
        Index claim; columns arms, paper, ours, lo, hi, smallest seen, verdict, why.
    """
    effects = {
        claim.text: compute_item_effect(scored[claim.after], scored[claim.before])
        for claim in CLAIMS
        if claim.after in scored and claim.before in scored
    }
    return judge_claims(effects, scored, shares)


def judge_claims(
    effects: Mapping[str, Effect],
    arms: Collection[str],
    shares: Mapping[str, ArrayLike] | None = None,
) -> pd.DataFrame:
    """Build the table of `build_findings` from the effects of claims, by their text.

    `arms` are those that were run: a claim without an effect says which are missing.
    `shares` has easy and hard as `compute_trend` takes them, of `TREND_ARM`.
    """
    rows = {}
    published = paper.TABLE_4.to_frame()["AVG"]
    for claim in CLAIMS:
        row: dict[str, object] = {"arms": f"{claim.after} over {claim.before}"}
        if claim.published:
            after, before = published[list(claim.published)]
            row["paper"] = round(after - before, 2)
        missing = [m for m in (claim.after, claim.before) if m not in arms]
        if claim.text in effects:
            row |= describe(effects[claim.text])
        else:
            row |= {"verdict": "not run", "why": f"no scores of {', '.join(missing)}"}
        rows[claim.text] = row
    for text, (column, sign, (begin, end)) in TRENDS.items():
        row = {"arms": TREND_ARM, "paper": round(100 * sign * (end - begin), 1)}
        if shares is None or np.shape(shares[column])[-1] < 3:
            why = f"fewer than three updates of {TREND_ARM}"
            rows[text] = row | {"verdict": "not run", "why": why}
        else:
            trend = compute_trend(sign * np.asarray(shares[column]))
            rows[text] = row | describe(trend, 0.0)
    order = ["arms", "paper", "ours", "lo", "hi", "smallest seen", "verdict", "why"]
    frame = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=order)
    return frame.rename_axis("claim")


def format_published(frame: pd.DataFrame) -> pd.DataFrame:
    """Write the column paper of `build_findings` as the paper does.

    Gains of its Table 4 have two decimals, the trends are read off a picture to 0.1.
    """
    digits = {claim: 1 if claim in TRENDS else 2 for claim in frame.index}
    shown = [
        f"{x:.{digits[claim]}f}" if x == x else "–"
        for claim, x in frame["paper"].items()
    ]
    return frame.assign(paper=shown)


def describe(effect: Effect, matters: float = MATTERS) -> dict[str, object]:
    """Return an effect in points, the verdict and why, as columns of a table."""
    points = {"ours": effect.mean, "lo": effect.lo, "hi": effect.hi}
    points["smallest seen"] = effect.find_smallest_detectable()
    row: dict[str, object] = {name: 100 * value for name, value in points.items()}
    return row | {"verdict": judge(effect, matters), "why": explain(effect, matters)}

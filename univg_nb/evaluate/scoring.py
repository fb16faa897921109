"""Scores of recorded replies: accuracy at IoU thresholds, intervals, paired tests.

Nothing here needs a model or torch, so 4,295 items are scored in about a second. Metric
and parsers: PF sec. 9. What the released scorers do wrong is kept behind an option
where a published number depends on it (`parser="released"`) and refused otherwise.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from univg_nb.data.boxes import NO_ANSWER, NO_BOX, OK, Box, iou, parse_box, stretched
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import intervals
from univg_nb.evaluate.predictions import Reply as Reply
from univg_nb.evaluate.predictions import read_predictions as read_predictions
from univg_nb.io import sha256_of as sha256_of
from univg_nb.paper import TASK_COLUMN

PARSERS = ("answer", "released")
RULES = ("one", "any")
# What can become of an item, best first; see failure_kind.
KINDS = (
    "hit",
    "near miss (IoU 0.3 to 0.5)",
    "off (0.05 to 0.3)",
    "elsewhere",
    "no usable box",
)
_KIND_LIMITS = (0.5, 0.3, 0.05)
_CURVE = tuple(round(0.05 * k, 2) for k in range(1, 20))


@dataclass(frozen=True)
class ItemScore:
    """One scored item: its best-known box, its IoU in 0..1, and how parsing went.

    `status` is the parser's (boxes.parse_box), or "truncated" for a cut-off reply in
    which no box was found.
    """

    index: int
    sample_id: str
    task: str
    iou: float
    status: str
    box: Box | None
    truncated: bool


def score_items(
    samples: Sequence[GroundingSample],
    replies: dict[int, list[Reply]],
    *,
    parser: str = "answer",
    rule: str = "one",
    stretch: bool = False,
    indices: Iterable[int] | None = None,
    allow_missing: bool = False,
) -> list[ItemScore]:
    """Score the first reply of every item (or of `indices`), in index order.

    parser: "answer" or "released" (boxes.parse_box).
    rule: "one" compares with the one box the released scorers take, "any" with the best
        of all instances of the item (E8: the released rule fails a right answer there).
    stretch: boxes are stretched first as for Migician's row (boxes.stretched); for no
        other model.
    Raises ValueError for a missing prediction (unless allow_missing), for an index
    beyond the records, and for several replies to an item (use `expected`).
    """
    return [
        _score_reply(samples[i], i, replies[i][0], parser, rule, stretch)
        for i in _wanted(samples, replies, indices, allow_missing, single=True)
    ]


def _score_reply(
    sample: GroundingSample,
    index: int,
    reply: Reply,
    parser: str,
    rule: str,
    stretch: bool,
) -> ItemScore:
    parsed = parse_box(reply.text, mode=parser)
    truths = sample.boxes if rule == "any" and sample.boxes else (sample.answer,)
    value = 0.0
    if parsed.box is not None:
        box = stretched(parsed.box) if stretch else parsed.box
        value = max(iou(box, truth) for truth in truths)
    lost = reply.truncated and parsed.status in (NO_ANSWER, NO_BOX)
    return ItemScore(
        index=index,
        sample_id=sample.id,
        task=sample.task,
        iou=value,
        status="truncated" if lost else parsed.status,
        box=parsed.box,
        truncated=reply.truncated,
    )


def _wanted(
    samples: Sequence[GroundingSample],
    replies: dict[int, list[Reply]],
    indices: Iterable[int] | None,
    allow_missing: bool,
    single: bool,
) -> list[int]:
    """The indices to score, after the checks that make a score trustworthy."""
    wanted = sorted(set(range(len(samples)) if indices is None else indices))
    beyond = [i for i in replies if i >= len(samples)]
    if beyond:
        raise ValueError(
            f"prediction for item {beyond[0]}, but the records hold {len(samples)} "
            "items: these predictions belong to another file"
        )
    several = [i for i in wanted if len(replies.get(i, ())) > 1]
    if single and several:
        raise ValueError(
            f"item {several[0]} has {len(replies[several[0]])} sampled replies; "
            "score them with --expected"
        )
    missing = [i for i in wanted if i not in replies]
    if missing and not allow_missing:
        raise ValueError(
            f"{len(missing)} of {len(wanted)} items have no prediction, first "
            f"{samples[missing[0]].id!r} (index {missing[0]}); generate them, or pass "
            "--allow-missing to score the others"
        )
    return [i for i in wanted if i in replies]


def summarise(items: Sequence[ItemScore], missing: Counter | None = None) -> dict:
    """Counts and rates of scored items: the `tasks` and averages of scores.json.

    Per task: n, hit_03/05/07 (counts), acc_03/05/07 and mean_iou (0..1), ci_05 (95 %
    Wilson interval), status (counts that add up to n), truncated, missing. A task whose
    items are all missing has n = 0, None for its rates, and no part in the macro mean.
    "curve" is the pooled accuracy over IoU thresholds: {"iou": [...], "acc": [...]}.
    """
    missing = missing or Counter()
    groups: dict[str, list[ItemScore]] = {t: [] for t in missing}
    for item in items:
        groups.setdefault(item.task, []).append(item)
    tasks = {
        task: _summary(groups[task]) | {"missing": missing[task]}
        for task in sort_tasks(groups)
    }
    pooled = _summary(items) | {"missing": missing.total()}
    scored = [t for t in tasks.values() if t["n"]]
    macro = {
        f"macro_{key}": float(np.mean([t[key] for t in scored])) if scored else None
        for key in ("acc_03", "acc_05", "acc_07", "mean_iou")
    }
    if scored:
        hits, totals = [t["hit_05"] for t in scored], [t["n"] for t in scored]
        macro["macro_ci_05"] = list(intervals.macro_interval(hits, totals))
    return {
        "tasks": tasks,
        "pooled": pooled,
        **macro,
        "pooled_acc_05": pooled["acc_05"],
        "curve": _curve(items),
    }


def _summary(items: Sequence[ItemScore]) -> dict:
    n = len(items)
    values = np.array([i.iou for i in items])
    row: dict = {"n": n}
    for name, threshold in (("03", 0.3), ("05", 0.5), ("07", 0.7)):
        hits = int((values >= threshold).sum())
        row |= {f"hit_{name}": hits, f"acc_{name}": hits / n if n else None}
    row["mean_iou"] = float(values.mean()) if n else None
    row["ci_05"] = list(intervals.wilson(row["hit_05"], n)) if n else None
    row["status"] = dict(sorted(Counter(i.status for i in items).items()))
    row["truncated"] = sum(i.truncated for i in items)
    return row


def _curve(items: Sequence[ItemScore]) -> dict[str, list[float]] | None:
    if not items:
        return None
    values = np.array([i.iou for i in items])
    reached = (values[:, None] >= np.array(_CURVE)).mean(axis=0)  # (N, 19) -> (19,)
    return {"iou": list(_CURVE), "acc": reached.tolist()}


def failure_kind(item: ItemScore) -> str:
    """One of `KINDS`: how far the item's box is from the target, if there is a box.

    "elsewhere" usually is another thing pointed at well, "near miss" the right one with
    sloppy edges.
    """
    if item.box is None or item.status != OK:
        return KINDS[-1]
    for kind, limit in zip(KINDS, _KIND_LIMITS, strict=False):
        if item.iou >= limit:
            return kind
    return KINDS[3]


def sort_tasks(tasks: Iterable[str]) -> list[str]:
    """Task names in the order of the paper's columns, others after them by name."""
    order = {task: k for k, task in enumerate(TASK_COLUMN)}
    return sorted(tasks, key=lambda t: (order.get(t, len(order)), t))


def expected(
    samples: Sequence[GroundingSample],
    replies: dict[int, list[Reply]],
    *,
    parser: str = "answer",
    rule: str = "one",
    stretch: bool = False,
    indices: Iterable[int] | None = None,
    allow_missing: bool = False,
) -> dict:
    """Expected scores of sampled replies: what GRPO's reward sees, not the greedy one.

    Returns {"tasks": {task: {n, replies, mean_iou, se_iou, acc_05, best_iou}},
    "pooled"}: means over items of the mean over their replies; se_iou is the standard
    error over items; best_iou the mean over items of their best reply. All in 0..1.
    """
    per_task: dict[str, list[list[float]]] = {}
    for i in _wanted(samples, replies, indices, allow_missing, single=False):
        values = [
            _score_reply(samples[i], i, reply, parser, rule, stretch).iou
            for reply in replies[i]
        ]
        per_task.setdefault(samples[i].task, []).append(values)
    everything = [v for rows in per_task.values() for v in rows]
    return {
        "tasks": {t: _expected_row(per_task[t]) for t in sort_tasks(per_task)},
        "pooled": _expected_row(everything),
    }


def _expected_row(rows: list[list[float]]) -> dict:
    if not rows:
        raise ValueError("no item has a prediction; generate some first")
    means = np.array([np.mean(r) for r in rows])
    spread = means.std(ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else 0.0
    return {
        "n": len(rows),
        "replies": sum(len(r) for r in rows),
        "mean_iou": float(means.mean()),
        "se_iou": float(spread),
        "acc_05": float(np.mean([np.mean(np.array(r) >= 0.5) for r in rows])),
        "best_iou": float(np.mean([max(r) for r in rows])),
    }


def compare_items(
    a: Sequence[ItemScore], b: Sequence[ItemScore], n_boot: int = 10_000, seed: int = 0
) -> dict:
    """Two models on the same items: differences b - a per task and overall.

    Each row: n, acc_05_a, acc_05_b, acc_05 and mean_iou (paired bootstrap: mean_diff,
    lo, hi, p), mcnemar (on hits at IoU 0.5: b, c, p). Raises ValueError when the item
    sets differ.
    """
    if [i.index for i in a] != [i.index for i in b]:
        only = {i.index for i in a} ^ {i.index for i in b}
        raise ValueError(
            f"the two runs differ in {len(only)} items, first index {min(only)}; "
            "compare predictions of the same items"
        )
    if not a:
        raise ValueError("nothing to compare: no item has a prediction in both runs")

    def row(keep: list[int]) -> dict:
        # (n,) each
        iou_a = np.array([a[k].iou for k in keep])
        iou_b = np.array([b[k].iou for k in keep])
        hit_a, hit_b = iou_a >= 0.5, iou_b >= 0.5
        boot = {"n_boot": n_boot, "seed": seed}
        # The bootstrap takes (a, b) and gives mean(a - b): ours is b's gain over a.
        return {
            "n": len(keep),
            "acc_05_a": float(hit_a.mean()),
            "acc_05_b": float(hit_b.mean()),
            "acc_05": intervals.paired_bootstrap(
                hit_b.astype(float), hit_a.astype(float), **boot
            ),
            "mean_iou": intervals.paired_bootstrap(iou_b, iou_a, **boot),
            "mcnemar": intervals.mcnemar(hit_a, hit_b),
        }

    tasks: dict[str, list[int]] = {}
    for k, item in enumerate(a):
        tasks.setdefault(item.task, []).append(k)
    return {
        "tasks": {t: row(tasks[t]) for t in sort_tasks(tasks)},
        "overall": row(list(range(len(a)))),
    }

"""Scores of recorded replies: accuracy at IoU thresholds, intervals, paired tests.

Neither a model nor torch is needed. The metric and the parsers are those of
docs/paper_facts.md#evaluation. A defect of the released scorers is kept as an option
where a published number depends on it, and corrected otherwise.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from univg_nb.data.boxes import NO_ANSWER, NO_BOX, OK, Box, iou, parse_box, stretch_box
from univg_nb.data.conventions import BoxConvention
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import intervals
from univg_nb.evaluate.predictions import Reply, convert_reply
from univg_nb.paper import TASK_COLUMN

logger = logging.getLogger(__name__)

RULES = ("one", "any")
# What can become of an item, best first, and the least IoU of each kind.
_LEAST_IOU = {
    "hit": 0.5,
    "near miss (IoU 0.3 to 0.5)": 0.3,
    "off (0.05 to 0.3)": 0.05,
    "elsewhere": 0.0,
}
KINDS = (*_LEAST_IOU, "no usable box")


@dataclass(frozen=True)
class ScoringOptions:
    """How replies are read and compared with the target."""

    parser: Literal["answer", "released"] = "answer"  # see `boxes.parse_box`
    # The one released box, or the best of any (docs/paper_facts.md#e8).
    rule: Literal["one", "any"] = "one"
    stretch: bool = False  # as for Migician's published row (`boxes.stretch_box`)
    allow_missing: bool = False  # leave out items without a reply, not refuse them
    convention: BoxConvention | None = None  # of files that `generate` did not write


DEFAULT_OPTIONS = ScoringOptions()


@dataclass(frozen=True)
class ItemScore:
    """The score of one item; a row of "items" in scores.json."""

    index: int  # position of the item in the records file, which has its id and task
    id: str
    task: str
    iou: float  # of the box with the target, 0..1
    status: str  # the parser's, or "truncated" for a cut-off reply without a box
    box: Box | None  # that was read, on 0..1000
    truncated: bool  # the reply ran out of tokens


def score_items(
    samples: Sequence[GroundingSample],
    replies: Mapping[int, Reply],
    options: ScoringOptions = DEFAULT_OPTIONS,
    indices: Iterable[int] | None = None,
) -> list[ItemScore]:
    """Score the replies to items of a records file, in index order.

    `samples` are all items of the file, `replies` those of `read_predictions` by index;
    only the items `indices` are scored if they are given.

    Raises:
        ValueError: an item has no reply, a reply belongs to no item, or nothing says
            in which unit JSON boxes of another program are.
    """
    _check_units(replies.values(), options)
    wanted = sorted(set(range(len(samples)) if indices is None else indices))
    beyond = [i for i in replies if i >= len(samples)]
    if beyond:
        raise ValueError(
            f"prediction for item {beyond[0]}, but the records hold {len(samples)} "
            "items: these predictions belong to another file"
        )
    missing = [i for i in wanted if i not in replies]
    if missing and not options.allow_missing:
        raise ValueError(
            f"{len(missing)} of {len(wanted)} items have no prediction, first "
            f"{samples[missing[0]].id!r} (index {missing[0]}); generate them, or pass "
            "--allow-missing to score the others"
        )
    return [
        _score_reply(samples[i], i, replies[i], options) for i in wanted if i in replies
    ]


def _check_units(replies: Iterable[Reply], options: ScoringOptions) -> None:
    """Warn of boxes in an unknown unit; refuse JSON, in which two are usual."""
    foreign = [reply for reply in replies if reply.foreign]
    if options.convention or not foreign:
        return
    if found := sum("bbox_2d" in reply.text for reply in foreign):
        raise ValueError(
            f"{found} replies hold JSON boxes (bbox_2d), in pixels if a Qwen2.5-VL "
            "wrote them, in thousandths if a Qwen3-VL did, and no settings beside the "
            "predictions say which; give --boxes pixels or thousandths"
        )
    logger.warning(
        "%d replies have no settings beside them that say how boxes are written; read "
        "as thousandths. --boxes says so, or pixels",
        len(foreign),
    )


def _score_reply(
    sample: GroundingSample, index: int, reply: Reply, options: ScoringOptions
) -> ItemScore:
    if options.convention and reply.foreign:
        reply = convert_reply(reply, sample, options.convention)
    parsed = parse_box(reply.text, mode=options.parser)
    targets = sample.boxes if options.rule == "any" else ()
    value = 0.0
    if parsed.box is not None:
        box = stretch_box(parsed.box) if options.stretch else parsed.box
        value = max(iou(box, target) for target in targets or (sample.answer,))
    lost = reply.truncated and parsed.status in (NO_ANSWER, NO_BOX)
    status = "truncated" if lost else parsed.status
    return ItemScore(
        index, sample.id, sample.task, value, status, parsed.box, reply.truncated
    )


def summarize_items(
    items: Sequence[ItemScore], missing: Counter | None = None
) -> dict[str, Any]:
    """Compute the numbers of scores.json from scored items.

    `missing` counts items without a reply, by task.

    Returns:
        "tasks", "pooled": n, hit_03, hit_05, hit_07 (counts), acc_03, acc_05, acc_07,
        mean_iou, ci_05 (0..1; None where n = 0), status, truncated, missing (counts).
        "macro_acc_05", "macro_ci_05": the unweighted mean over the scored tasks.
        "items": the fields of each `ItemScore`.
    """
    missing = missing or Counter()
    tasks = {
        task: _summarize([item for item in items if item.task == task])
        | {"missing": missing[task]}
        for task in sort_tasks({item.task for item in items} | missing.keys())
    }
    pooled = _summarize(items) | {"missing": missing.total()}
    scored = [row for row in tasks.values() if row["n"]]
    mean, interval = None, pooled["ci_05"]  # of one task that task's interval
    if scored:
        mean = float(np.mean([row["acc_05"] for row in scored]))
    if len(scored) > 1:
        hits, totals = [row["hit_05"] for row in scored], [row["n"] for row in scored]
        interval = list(intervals.macro_interval(hits, totals))
    return {
        "tasks": tasks,
        "pooled": pooled,
        "macro_acc_05": mean,
        "macro_ci_05": interval,
        "pooled_acc_05": pooled["acc_05"],
        "items": [asdict(item) for item in items],
    }


def _summarize(items: Sequence[ItemScore]) -> dict[str, Any]:
    n = len(items)
    values = np.array([item.iou for item in items])
    row: dict[str, Any] = {"n": n}
    for name, threshold in (("03", 0.3), ("05", 0.5), ("07", 0.7)):
        hits = int((values >= threshold).sum())
        row |= {f"hit_{name}": hits, f"acc_{name}": hits / n if n else None}
    row["mean_iou"] = float(values.mean()) if n else None
    row["ci_05"] = list(intervals.wilson_interval(row["hit_05"], n)) if n else None
    row["status"] = dict(sorted(Counter(item.status for item in items).items()))
    row["truncated"] = sum(item.truncated for item in items)
    return row


def classify_result(item: ItemScore) -> str:
    """Return the one of `KINDS` that an item is, by its box and IoU."""
    if item.box is None or item.status != OK:
        return KINDS[-1]
    return next(kind for kind, least in _LEAST_IOU.items() if item.iou >= least)


def sort_tasks(tasks: Iterable[str]) -> list[str]:
    """Return task names in the order of the paper's columns, others after them."""
    order = {task: k for k, task in enumerate(TASK_COLUMN)}
    return sorted(tasks, key=lambda task: (order.get(task, len(order)), task))


def compare_items(
    a: Sequence[ItemScore], b: Sequence[ItemScore], n_boot: int = 10_000
) -> dict[str, Any]:
    """Compare two models on the items that both were scored on.

    Returns:
        "tasks", "overall": n, acc_05_a, acc_05_b, paired bootstraps of b - a (acc_05,
        mean_iou) and mcnemar on hits at IoU 0.5.

    Raises:
        ValueError: no item was scored for both.
    """
    after = {item.index: item for item in b}
    pairs = [(item, after[item.index]) for item in a if item.index in after]
    if not pairs:
        raise ValueError("nothing to compare: no item has a prediction in both runs")
    ious = np.array([[one.iou for one in pair] for pair in pairs]).T  # (2, N)
    tasks = np.array([item.task for item, _ in pairs])

    def compare(chosen: np.ndarray | slice) -> dict[str, Any]:
        iou_a, iou_b = ious[:, chosen]
        hit_a, hit_b = iou_a >= 0.5, iou_b >= 0.5
        return {
            "n": len(iou_a),
            "acc_05_a": float(hit_a.mean()),
            "acc_05_b": float(hit_b.mean()),
            "acc_05": intervals.paired_bootstrap(hit_b, hit_a, n_boot),
            "mean_iou": intervals.paired_bootstrap(iou_b, iou_a, n_boot),
            "mcnemar": intervals.mcnemar_test(hit_a, hit_b),
        }

    return {
        "tasks": {
            task: compare(tasks == task) for task in sort_tasks({*tasks.tolist()})
        },
        "overall": compare(slice(None)),
    }

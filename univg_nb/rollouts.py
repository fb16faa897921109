"""What one GRPO update saw: one row per group in rollouts.jsonl, and its summary.

The rows feed the rollout browser and the difficulty-bias figure (PF sec. 6), so they
hold everything about a group that the loss was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .boxes import parse_box
from .difficulty import difficulty_bin


@dataclass(frozen=True)
class Reply:
    """One sampled reply as text, with what is known only where it was sampled."""

    sample_id: str
    task: str
    text: str
    length: int  # tokens, the end token included
    truncated: bool  # hit max_completion_length before an end token


def group_rows(
    step: int,
    replies: Sequence[Reply],
    iou: Tensor,
    form: Tensor,
    rewards: Tensor,
    advantages: Tensor,
    weights: Tensor,
) -> list[dict[str, Any]]:
    """Rows of rollouts.jsonl, one per group.

    step: number of the (first) update that uses these replies, from 1, as in
    metrics.jsonl. replies, iou, form (format reward), rewards (total), advantages
    (before weighting): N values with a group's replies adjacent; weights: (N / G,) phi.
    `mean_iou` is the group's difficulty; `boxes` come from `parse_box`, so they are
    what scoring would read.
    """
    size = len(replies) // len(weights)
    assert size * len(weights) == len(replies), (len(replies), len(weights))
    rows = []
    for group, weight in enumerate(weights.tolist()):
        part = slice(group * size, (group + 1) * size)
        members = replies[part]
        assert len({m.sample_id for m in members}) == 1, "a group mixes samples"
        parsed = [parse_box(m.text) for m in members]
        rows.append(
            {
                "step": step,
                "sample_id": members[0].sample_id,
                "task": members[0].task,
                "replies": [m.text for m in members],
                "boxes": [None if p.box is None else list(p.box) for p in parsed],
                "status": [p.status for p in parsed],
                "iou": _rounded(iou[part]),
                "format": _rounded(form[part]),
                "rewards": _rounded(rewards[part]),
                "mean_iou": round(iou[part].mean().item(), 6),
                "weight": round(weight, 6),
                "advantages": _rounded(advantages[part]),
                "length": [m.length for m in members],
                "truncated": [m.truncated for m in members],
            }
        )
    return rows


def group_summary(
    mean_iou: Tensor, weights: Tensor, rewards: Tensor
) -> dict[str, float]:
    """Numbers of one update for metrics.jsonl.

    mean_iou, weights: (groups,); rewards: (groups, G) totals. Shares are of groups: by
    difficulty (PF sec. 6 bins) and those whose rewards are all equal, which give no
    gradient whatever their weight.
    """
    bins = [difficulty_bin(value) for value in mean_iou.tolist()]
    flat = rewards.amax(dim=1) - rewards.amin(dim=1) < 1e-8
    return {
        "groups/mean_iou": mean_iou.mean().item(),
        "groups/zero_variance": flat.float().mean().item(),
        "groups/weight_mean": weights.mean().item(),
        **{
            f"groups/{name}": bins.count(name) / len(bins)
            for name in ("hard", "medium", "easy")
        },
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(v, 6) for v in values.to(torch.float64).tolist()]

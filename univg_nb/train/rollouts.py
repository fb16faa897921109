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

from univg_nb.data.boxes import parse_box
from univg_nb.train.difficulty import BINS, difficulty_bin, silent


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
    difficulty (PF sec. 6 bins), and of silent ones, whose rewards are all equal and
    which give no gradient whatever their weight: of all groups, and of each bin.
    """
    bins = [difficulty_bin(value) for value in mean_iou.tolist()]
    flat = silent(rewards)
    summary = {
        "groups/mean_iou": mean_iou.mean().item(),
        "groups/zero_variance": flat.float().mean().item(),
        "groups/weight_mean": weights.mean().item(),
    }
    for name in BINS:
        mine = [
            quiet
            for found, quiet in zip(bins, flat.tolist(), strict=True)
            if found == name
        ]
        summary[f"groups/{name}"] = len(mine) / len(bins)
        if mine:
            summary[f"zero_variance/{name}"] = sum(mine) / len(mine)
    return summary


def logit_gradient(
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon: tuple[float, float],
) -> Tensor:
    """How hard each reply pushes at the model's output, (B,); needs no backward pass.

    The L1 norm of the gradient of the clipped surrogate with respect to the logits a
    token is sampled from, mean over the reply's tokens: |A| rho 2 (1 - p), or 0 where
    the clip has cut the gradient. It is small where all rewards are equal (A = 0), and
    where the model is sure of every token (p = 1).

    logps, old, mask: (B, T) log p of the sampled tokens now and when sampled, which
    are real; advantages: (B,), weights included; epsilon: clip range below and above.
    """
    ratio, side = torch.exp(logps - old), advantages[:, None]
    cut = ((side > 0) & (ratio > 1 + epsilon[1])) | (
        (side < 0) & (ratio < 1 - epsilon[0])
    )
    size = side.abs() * ratio * 2 * (1 - logps.exp()) * ~cut * mask
    return size.sum(1) / mask.sum(1).clamp(min=1)


def _rounded(values: Tensor) -> list[float]:
    return [round(v, 6) for v in values.to(torch.float64).tolist()]

"""The log of GRPO's groups: one row per group in rollouts.jsonl, and their gradient.

The rows feed the rollout browser and the figure of the difficulty bias, so they hold
everything about a group that the loss was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from univg_nb.data.boxes import parse_box


def make_group_rows(
    step: int,
    names: Sequence[tuple[str, str]],
    weights: Tensor,
    replies: Sequence[str],
    columns: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    """Make the rows of rollouts.jsonl, one per group.

    Args:
        step: number of the first update that uses these replies, from 1, as in
            metrics.jsonl.
        names: (sample_id, task) of the groups.
        weights: phi of the groups.
        replies: N texts, the G of a group adjacent.
        columns: iou, format, rewards (total) and advantages (before weighting), (N,).
    """
    size = len(replies) // len(names)
    rows = []
    for group, (sample_id, task) in enumerate(names):
        part = slice(group * size, (group + 1) * size)
        parsed = [parse_box(text) for text in replies[part]]  # as scoring reads them
        numbers = {
            name: [round(value, 6) for value in values[part].tolist()]
            for name, values in columns.items()
        }
        rows.append(
            {
                "step": step,
                "sample_id": sample_id,
                "task": task,
                "replies": replies[part],
                "boxes": [None if p.box is None else list(p.box) for p in parsed],
                "status": [p.status for p in parsed],
                **numbers,
                "mean_iou": round(columns["iou"][part].mean().item(), 6),
                "weight": round(weights[group].item(), 6),
            }
        )
    return rows


def compute_logit_gradient(
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon: tuple[float, float],
) -> Tensor:
    """Compute how hard each reply pushes at the model's output, (B,).

    This is the L1 norm of the gradient of the clipped surrogate with respect to the
    logits that a token is sampled from, mean over the reply's tokens: |A| rho 2 (1-p),
    or 0 where the clip has cut the gradient; no backward pass is needed. It is small
    where all rewards are equal (A = 0), and where the model is sure (p = 1).

    Args:
        logps: (B, T) log p of the sampled tokens now.
        old: (B, T) log p when they were sampled.
        advantages: (B,), weights included.
        mask: (B, T) which tokens are real.
        epsilon: clip range below and above.
    """
    ratio, side = torch.exp(logps - old), advantages[:, None]
    above, below = ratio > 1 + epsilon[1], ratio < 1 - epsilon[0]
    cut = ((side > 0) & above) | ((side < 0) & below)
    size = side.abs() * ratio * 2 * (1 - logps.exp()) * ~cut * mask
    return size.sum(1) / mask.sum(1).clamp(min=1)

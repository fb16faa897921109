"""Weights that make hard groups count more (the paper's difficulty-aware GRPO).

A group is the G replies to one sample; its difficulty is the mean IoU m of those
replies. Group normalisation of advantages hides m: a group at 0.8 and one at 0.2 push
equally hard. The weight phi(m) puts the difference back (PF sec. 5).

phi multiplies the policy-gradient term and leaves the KL term alone. For phi > 0 that
is the same as multiplying the group's advantages, which is how the trainer does it:
phi * min(r A, clip(r) A) = min(r phi A, clip(r) phi A).
"""

import difflib

import torch
from torch import Tensor

FORMS = ("none", "exp", "power", "log", "log_released", "peak", "constant")
RESCALED = ("none", "mad", "drop_silent")
BINS = ("hard", "medium", "easy")
HARD_BELOW = 0.3
EASY_ABOVE = 0.7
STD_FLOOR = 1e-4  # what GRPO adds to a group's standard deviation (PF sec. 4)


def difficulty_weight(
    group_iou: Tensor,
    form: str = "exp",
    power: float = 1.0,
    unit_mean: bool = False,
    constant: float = 1.0,
) -> Tensor:
    """phi for each group.

    group_iou: mean IoU of each group, in 0..1, any shape; the result has that shape.

    forms (m = group_iou; PF sec. 5 has the released values):
      none          1
      exp           e^(1-m), 1 to 2.72; what the released script runs
      power         (1.05-m)^power; power 1 is the linear form
      log           -ln(0.02+m), floored at 0
      log_released  -ln(0.02+m) as released: negative above m = 0.98, where it pushes
                    towards worse answers (PF sec. 9, T3)
      peak          4m(1-m): most for groups that succeed half of the time; not in the
                    paper, for comparison
      constant      `constant` whatever m is: a control. e^(1-m) is above 1 nearly
                    everywhere, so it also raises the step size; this tells the two
                    effects apart
    unit_mean divides by the mean over the groups given, so only the difference between
    groups remains; a control for the same reason. With several processes, give it the
    groups of all of them. If every weight is 0, they stay 0.

    Raises ValueError for an unknown form or a mean IoU outside 0..1.
    """
    m = torch.as_tensor(group_iou)
    if not m.is_floating_point():
        m = m.float()
    # written so that NaN fails too
    if not bool(((m >= 0) & (m <= 1)).all()):
        raise ValueError(
            f"group mean IoU must lie in 0..1, got {m.tolist()}: pass the IoU reward "
            "alone, without the format reward"
        )
    if form == "none":
        weight = torch.ones_like(m)
    elif form == "exp":
        weight = torch.exp(1 - m)
    elif form == "power":
        weight = (1.05 - m) ** power
    elif form == "log":
        weight = (-torch.log(0.02 + m)).clamp(min=0)
    elif form == "log_released":
        weight = -torch.log(0.02 + m)
    elif form == "peak":
        weight = 4 * m * (1 - m)
    elif form == "constant":
        weight = torch.full_like(m, constant)
    else:
        raise _unknown("weight", form, FORMS)
    if unit_mean and weight.numel():
        mean = weight.mean()
        if mean > 0:
            weight = weight / mean
    return weight


def rescaled(rewards: Tensor, how: str = "none") -> Tensor:
    """Factor for each group's advantages from its rewards, (groups, G) -> (groups,).

    Other ways to size a group, for comparison with the weights; none is the paper's.
    (Advantages that are not divided by a spread at all are TRL's scale_rewards: none.)

      none         1: advantages stay divided by the group's standard deviation
      mad          divided by the mean absolute deviation instead: then the sum of |A|
                   is G for every group that is not silent
      drop_silent  groups whose rewards are all equal leave the mean over groups, so
                   the others grow by groups / groups kept

    Raises ValueError for an unknown `how`.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if how == "none":
        return torch.ones_like(rewards[:, 0])
    if how == "mad":
        spread = centred.abs().mean(dim=1) + STD_FLOOR
        return (rewards.std(dim=1) + STD_FLOOR) / spread
    if how == "drop_silent":
        kept = (~silent(rewards)).to(rewards.dtype)
        return kept * len(kept) / kept.sum().clamp(min=1)
    raise _unknown("rescale", how, RESCALED)


def silent(rewards: Tensor) -> Tensor:
    """Which groups teach nothing, all rewards being equal: (groups, G) -> (groups,)."""
    return rewards.amax(dim=1) - rewards.amin(dim=1) < 1e-8


def _unknown(option: str, value: str, known: tuple[str, ...]) -> ValueError:
    close = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {option} {value!r}, one of {', '.join(known)}{hint}")


def group_mean_iou(ious: Tensor, num_generations: int) -> Tensor:
    """Mean IoU of each group: (N,) with a group's replies adjacent -> (N / G,).

    Over the whole group whatever the micro-batch is; the released code averaged over
    the local micro-batch, which is a group only when that equals G (PF sec. 9, T2).
    Raises ValueError unless N is a multiple of `num_generations`.
    """
    if num_generations < 1 or ious.dim() != 1 or len(ious) % num_generations:
        raise ValueError(
            f"IoUs of shape {tuple(ious.shape)} do not split into groups of "
            f"{num_generations}: gather the rewards of all processes first"
        )
    return ious.view(-1, num_generations).mean(dim=1)  # (groups, G) -> (groups,)


def difficulty_bin(mean_iou: float) -> str:
    """ "hard" below 0.3, "easy" above 0.7, else "medium" (PF sec. 6, Figure 3)."""
    if mean_iou < HARD_BELOW:
        return "hard"
    return "easy" if mean_iou > EASY_ABOVE else "medium"

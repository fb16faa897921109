"""Difficulty weights against PF sec. 5, and the released loss they must reproduce."""

import math

import pytest
import torch

from univg_nb.train.difficulty import (
    FORMS,
    difficulty_bin,
    difficulty_weight,
    group_mean_iou,
    rescaled,
)

M = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("power", [1.05, 0.85, 0.55, 0.25, 0.05]),
        ("exp", [2.718, 2.226, 1.649, 1.221, 1.000]),
        ("log_released", [3.912, 1.514, 0.654, 0.198, -0.020]),
        ("log", [3.912, 1.514, 0.654, 0.198, 0.0]),
        ("none", [1.0] * 5),
    ],
)
def test_values_of_the_table(form, values):
    assert difficulty_weight(M, form).tolist() == pytest.approx(values, abs=6e-4)


def test_power_and_constant_take_their_parameter():
    squared = [(1.05 - m) ** 2 for m in M.tolist()]
    assert difficulty_weight(M, "power", power=2.0).tolist() == pytest.approx(
        squared, abs=1e-6
    )
    assert difficulty_weight(M, "constant", constant=1.49).tolist() == pytest.approx(
        [1.49] * 5
    )


@pytest.mark.parametrize("form", [form for form in FORMS if form != "peak"])
def test_weights_never_rise_with_mean_iou(form):
    m = torch.linspace(0, 1, 201)
    assert (difficulty_weight(m, form).diff() <= 1e-7).all()


def test_peak_is_largest_in_the_middle():
    assert difficulty_weight(M, "peak").tolist() == pytest.approx([0, 0.64, 1, 0.64, 0])


def test_rescaled_groups():
    rewards = torch.tensor([[0.0, 0, 0, 2], [1, 1, 1, 1], [0, 2, 0, 2], [2, 2, 2, 2]])
    assert rescaled(rewards).tolist() == [1.0] * 4
    mad = rescaled(rewards, "mad")  # std / mean absolute deviation
    assert mad[[0, 2]].tolist() == pytest.approx([1 / 0.75, 1.1547 / 1], rel=1e-3)
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = centred / (rewards.std(1, keepdim=True) + 1e-4) * mad[:, None]
    assert advantages.abs().sum(1).tolist() == pytest.approx([4, 0, 4, 0], abs=1e-2)
    assert rescaled(rewards, "drop_silent").tolist() == [2.0, 0.0, 2.0, 0.0]
    assert rescaled(rewards[[1, 3]], "drop_silent").tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="did you mean 'mad'"):
        rescaled(rewards, "mat")


@pytest.mark.parametrize("form", [form for form in FORMS if form != "log_released"])
def test_unit_mean_keeps_ratios_only(form):
    weight = difficulty_weight(M, form)
    unit = difficulty_weight(M, form, unit_mean=True)
    assert unit.mean().item() == pytest.approx(1.0)
    assert torch.allclose(unit * weight.mean(), weight)


def test_unit_mean_of_solved_groups_stays_zero():
    solved = difficulty_weight(torch.ones(3), "log", unit_mean=True)
    assert solved.tolist() == [0.0, 0.0, 0.0]


def test_T2_mean_is_over_the_group_whatever_the_micro_batch():
    """The released mean was over the local micro-batch (PF sec. 9, T2)."""
    ious = torch.tensor([0.0] * 4 + [0.8] * 4 + [0.5] * 8)  # two groups of 8
    assert group_mean_iou(ious, 8).tolist() == pytest.approx([0.4, 0.5])
    micro_batches_of_4 = [chunk.mean().item() for chunk in ious.split(4)]
    assert micro_batches_of_4[0] != micro_batches_of_4[1]  # what the defect gave
    with pytest.raises(ValueError, match="groups of 6"):
        group_mean_iou(ious, 6)


def test_T3_log_is_floored_and_the_released_one_is_not():
    """The released log weight is negative above mean IoU 0.98 (PF sec. 9, T3)."""
    m = torch.tensor([0.97, 0.99, 1.0])
    assert (difficulty_weight(m, "log") >= 0).all()
    assert difficulty_weight(m, "log")[1:].tolist() == [0.0, 0.0]
    assert (difficulty_weight(m, "log_released")[1:] < 0).all()


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="did you mean 'power'"):
        difficulty_weight(M, "powr")
    for bad in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="without the format reward"):
            difficulty_weight(torch.tensor([bad]), "exp")


def test_bins_of_figure_3():
    bins = [difficulty_bin(m) for m in (0.0, 0.29, 0.3, 0.5, 0.7, 0.71, 1.0)]
    assert bins == ["hard", "hard", "medium", "medium", "medium", "easy", "easy"]


# The released loss, from the text of PF sec. 4 and 5: per token
# -min(rho A, clip(rho, 1 - eps, 1 + eps) A) phi + beta k3; mean over each sequence,
# then over sequences. One group, as the released layout has it.
EPSILON, BETA, G, T = 0.2, 0.04, 8, 12


def released_loss(logp, old, reference, mask, iou, reward, phi_of_m):
    advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
    m = iou.mean().item()
    rho = torch.exp(logp - old)  # (G, T)
    clipped = rho.clamp(1 - EPSILON, 1 + EPSILON)
    a = advantage[:, None]
    k3 = torch.exp(reference - logp) - (reference - logp) - 1
    token = -torch.minimum(rho * a, clipped * a) * phi_of_m(m) + BETA * k3
    return ((token * mask).sum(1) / mask.sum(1)).mean()


def our_loss(logp, old, reference, mask, iou, reward, form):
    """The trainer's way: the weight is multiplied into the advantages."""
    advantages = (reward - reward.mean()) / (reward.std() + 1e-4)
    weight = difficulty_weight(group_mean_iou(iou, G), form)  # (1,)
    advantages = advantages * weight.repeat_interleave(G)
    ratio = torch.exp(logp - old)
    surrogate = torch.minimum(
        ratio * advantages[:, None],
        ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages[:, None],
    )
    k3 = torch.exp(reference - logp) - (reference - logp) - 1
    token = -surrogate + BETA * k3
    return ((token * mask).sum(1) / mask.sum(1)).mean()


def random_group(seed, on_policy):
    gen = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(G, T, generator=gen, dtype=torch.float64)
    noise = 0.4 * torch.randn(2, G, T, generator=gen, dtype=torch.float64)
    old = logp.clone() if on_policy else logp + noise[0]
    lengths = torch.randint(1, T + 1, (G,), generator=gen)
    mask = (torch.arange(T) < lengths[:, None]).double()
    iou = torch.rand(G, generator=gen, dtype=torch.float64)
    reward = iou + torch.randint(0, 2, (G,), generator=gen)
    return logp.requires_grad_(), old, logp.detach() + noise[1], mask, iou, reward


RELEASED = {
    "exp": lambda m: math.exp(1 - m),
    "power": lambda m: 1.05 - m,
    "log_released": lambda m: -math.log(0.02 + m),
}


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("form", RELEASED)
def test_loss_and_gradient_equal_the_released_ones(form, on_policy):
    for seed in range(20):
        group = random_group(seed, on_policy)
        theirs = released_loss(*group, RELEASED[form])
        ours = our_loss(*group, form)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
        (their_gradient,) = torch.autograd.grad(theirs, group[0])
        (our_gradient,) = torch.autograd.grad(ours, group[0])
        assert torch.allclose(our_gradient, their_gradient, atol=1e-6, rtol=0)


def test_T3_negative_weight_agrees_on_policy_and_flips_the_clip_off_policy():
    """Scaled advantages need phi > 0 once the ratio is clipped: min turns into max."""
    phi = RELEASED["log_released"]
    for on_policy in (True, False):
        logp, old, reference, mask, iou, reward = random_group(1, on_policy)
        solved = 0.99 + 0.01 * iou
        group = (logp, old, reference, mask, solved, reward)
        assert phi(solved.mean().item()) < 0
        gap = our_loss(*group, "log_released") - released_loss(*group, phi)
        assert (abs(gap.item()) < 1e-6) == on_policy

"""Difficulty weights against the released values (docs/paper_facts.md#weight)."""

import math

import pytest
import torch

from univg_nb import config
from univg_nb.train import difficulty
from univg_nb.train.difficulty import (
    FORMS,
    difficulty_bin,
    difficulty_weight,
    group_mean_iou,
    register_weight,
    rescale_factor,
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


def test_softmax_has_the_mean_one_over_the_update():
    m = torch.tensor([[0.0, 0.5], [0.9, 1.0]])
    weight = difficulty_weight(m, "softmax", power=2.0)
    assert weight.mean() == pytest.approx(1)
    ratio = weight[0, 0] / weight[1, 1]
    assert ratio == pytest.approx(math.exp(2), rel=1e-5)


def test_box_size_looks_at_the_true_box_only():
    share = torch.tensor([0.0, 0.25, 1.0])
    for m in (torch.zeros(3), torch.ones(3)):
        weight = difficulty_weight(m, "box_size", box_share=share)
        torch.testing.assert_close(weight, torch.tensor([1.0, 0.5, 0.0]).exp())


def test_peak_is_largest_in_the_middle():
    assert difficulty_weight(M, "peak").tolist() == pytest.approx([0, 0.64, 1, 0.64, 0])


def test_rescaled_groups():
    rewards = torch.tensor([[0.0, 0, 0, 2], [1, 1, 1, 1], [0, 2, 0, 2], [2, 2, 2, 2]])
    assert rescale_factor(rewards).tolist() == [1.0] * 4
    mad = rescale_factor(rewards, "mad")  # std / mean absolute deviation
    assert mad[[0, 2]].tolist() == pytest.approx([1 / 0.75, 1.1547 / 1], rel=1e-3)
    centered = rewards - rewards.mean(1, keepdim=True)
    advantages = centered / (rewards.std(1, keepdim=True) + 1e-4) * mad[:, None]
    assert advantages.abs().sum(1).tolist() == pytest.approx([4, 0, 4, 0], abs=1e-2)
    assert rescale_factor(rewards, "drop_silent").tolist() == [2.0, 0.0, 2.0, 0.0]
    assert rescale_factor(rewards[[1, 3]], "drop_silent").tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="did you mean 'mad'"):
        rescale_factor(rewards, "mat")


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
    """The released mean was over the local micro-batch (docs/paper_facts.md#t2)."""
    ious = torch.tensor([0.0] * 4 + [0.8] * 4 + [0.5] * 8)  # two groups of 8
    assert group_mean_iou(ious, 8).tolist() == pytest.approx([0.4, 0.5])
    micro_batches_of_4 = [chunk.mean().item() for chunk in ious.split(4)]
    assert micro_batches_of_4[0] != micro_batches_of_4[1]  # what the defect gave
    with pytest.raises(ValueError, match="groups of 6"):
        group_mean_iou(ious, 6)


def test_T3_log_is_floored_and_the_released_one_is_not():
    """The released log weight is negative above 0.98 (docs/paper_facts.md#t3)."""
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


@pytest.fixture
def own_weights(monkeypatch):
    """Weights that a test registers are gone after it."""
    monkeypatch.setattr(difficulty, "FORMS", dict(FORMS))
    before = set(config.OWN_WEIGHTS)
    yield
    config.OWN_WEIGHTS.intersection_update(before)


@pytest.mark.usefixtures("own_weights")
def test_a_user_adds_a_form():
    @register_weight("square")
    def square(m):
        return (1 - m) ** 2

    m = torch.tensor([0.0, 0.5])
    assert difficulty_weight(m, "square").tolist() == [1.0, 0.25]
    assert difficulty_weight(m, square).tolist() == [1.0, 0.25]
    config.load_scale("smoke", ["grpo.weight=square"])
    code = difficulty.identify_weight("square")

    @register_weight("square")  # a cell that is run again, edited
    def again(m, power):
        return m * power

    assert difficulty_weight(m, "square", power=3).tolist() == [0.0, 1.5]
    assert difficulty.identify_weight("square") not in ("", code)
    with pytest.raises(ValueError, match="'exp' is taken"):
        register_weight("exp")
    with pytest.raises(ValueError, match=r"made \(\) values of \(2,\) groups"):
        difficulty_weight(m, lambda m: m.mean())


FILE = """
from univg_nb.train.difficulty import register_weight
SCALE = 2
def half(m):
    return m / 2
@register_weight("mine")
def phi(m):
    return SCALE * m
"""


@pytest.mark.usefixtures("own_weights")
def test_a_form_is_named_by_its_file(tmp_path):
    path = tmp_path / "my_weights.py"
    path.write_text(FILE)
    m = torch.tensor([0.5])
    found = [difficulty_weight(m, f"{path}:{name}") for name in ("mine", "phi", "half")]
    assert torch.cat(found).tolist() == [1.0, 1.0, 0.25]
    scale = config.load_scale("smoke", [f"grpo.weight={path}:mine"])
    assert scale["grpo"]["weight"] == f"{path}:mine"
    assert difficulty.get_weight_name(f"{path}:mine") == "mine"
    assert difficulty.find_form("torch:exp") is torch.exp
    code = difficulty.identify_weight(f"{path}:mine")
    path.write_text(FILE.replace("SCALE = 2", "SCALE = 3"))
    assert difficulty.identify_weight(f"{path}:mine") != code
    assert difficulty_weight(m, f"{path}:mine").tolist() == [1.5]
    for wrong, told in {
        f"{path}:mien": "has no function 'mien'",
        "no_such.py:mine": r"No such file.* write FILE\.py:FUNCTION",
        "no_such_module:mine": "No module named",
    }.items():
        with pytest.raises(ValueError, match=told):
            difficulty.find_form(wrong)
    with pytest.raises(ValueError, match=r"'exq'; did you mean 'exp'\? \(one of yours"):
        config.load_scale("smoke", ["grpo.weight=exq"])


def test_bins_of_figure_3():
    bins = [difficulty_bin(m) for m in (0.0, 0.29, 0.3, 0.5, 0.7, 0.71, 1.0)]
    assert bins == ["hard", "hard", "medium", "medium", "medium", "easy", "easy"]


def test_T3_a_negative_weight_flips_the_clip():
    """Scaled advantages need phi > 0 once the ratio is clipped: min turns into max."""
    phi, ratio, advantage = -0.01, torch.tensor(1.5), 1.0
    clipped = ratio.clamp(0.8, 1.2)
    released = phi * torch.minimum(ratio * advantage, clipped * advantage)
    ours = torch.minimum(ratio * phi * advantage, clipped * phi * advantage)
    assert released != ours

"""The design of a study, what is finished of it, and how large it must be."""

import dataclasses

import numpy as np
import pytest

from univg_nb import io
from univg_nb.figures import findings
from univg_nb.figures.findings import compute_effect
from univg_nb.minimig.items import TASKS
from univg_nb.study import power
from univg_nb.study.design import PLAN, RATES, Goal, read_study
from univg_nb.study.power import Spread

# as measured of short trainings: some items change, each seed a little
SPREAD = Spread(items=0.02, seeds=4e-5, rest=0.12)


def test_the_course_s_study_has_the_rows_of_table_4_and_the_weights():
    study = read_study()
    assert study.seeds >= 5 and study.per_task * len(TASKS) >= 2000
    for arm in study.arms.values():
        config = study.make_config(arm, 7)
        assert not arm.train or config[arm.train]["seed"] == 7
    arms = set(study.arms) | set(study.claims)
    assert arms >= {n for c in findings.CLAIMS for n in (c.after, c.before)}
    exp, none = study.arms["grpo_exp_unit"], study.arms["grpo_none"]
    assert study.make_config(exp, 0)["grpo"]["unit_mean"] is True
    # nothing but the weight differs
    section = study.make_config(exp, 0)["grpo"] | {"weight": "none", "unit_mean": False}
    assert section == study.make_config(none, 0)["grpo"]


def test_jobs_are_listed_seed_by_seed():
    study = read_study()
    names = [(a.name, s) for a, s in study.list_jobs(["grpo_exp", "base", "grpo_log"])]
    assert names[:4] == [("base", 0), ("grpo_exp", 0), ("grpo_log", 0), ("grpo_exp", 1)]
    assert len(names) == 1 + 2 * study.seeds
    with pytest.raises(ValueError, match="no arm 'grpo_exq'; did you mean 'grpo_exp'"):
        study.list_jobs(["grpo_exq"])


def test_every_arm_takes_the_rate_of_the_one_trained_its_way(tmp_path):
    chosen = {"sft_21k": 0.5, "sft_more": 0.25, "grpo_none": 0.125}
    io.write_json(tmp_path / RATES, {"chosen": chosen})
    study = read_study(run_dir=tmp_path)
    rates = {
        arm.name: study.make_config(arm, 0)[arm.train]["learning_rate"]
        for arm in study.arms.values()
        if arm.train
    }
    assert {rates.pop(name) for name in ("sft_nocot", "sft_21k", "sft_90k")} == {0.5}
    assert rates.pop("sft_more") == 0.25  # its own option gives way
    assert set(rates.values()) == {0.125} and len(rates) == 11
    assert set(chosen) == set(study.rates.arms)


def test_a_plan_raises_the_numbers_of_the_file(tmp_path):
    io.write_json(tmp_path / PLAN, {"seeds": 7, "items": 100})
    study = read_study(run_dir=tmp_path)
    assert (study.seeds, study.items) == (5, read_study().items)
    seeds = {a.name: s + 1 for a, s in study.list_jobs(["grpo_exp", "grpo_log"])}
    assert seeds == {"grpo_exp": 7, "grpo_log": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: {trian: sft}}", "arm a: unknown key trian; did you mean 'train'"),
        ("{a: {train: rl}}", "arm a: train = 'rl'; expected"),
        ("{a: {from: b}}", "arm a: begins = 'b'; expected"),
        ("{a: {constant_of: b}}", "arm a: constant_of names no arm above it"),
        ("{a: {}}, rates: {arms: [a]}", "rates: no trained arm a"),
    ],
)
def test_a_wrong_design_is_refused(tmp_path, text, message):
    path = tmp_path / "study.yaml"
    path.write_text(
        f"{{scale: smoke, data: {{}}, plan: {{pair: [a, b]}}, arms: {text}}}"
    )
    with pytest.raises(ValueError, match=message):
        read_study(path)


def draw(rng, spread, seeds, items, effect):
    """Differences (seeds, items) with these variances."""
    parts = (1, items), (seeds, 1), (seeds, items)
    drawn = zip(dataclasses.astuple(spread), parts, strict=True)
    return effect + sum(np.sqrt(v) * rng.normal(size=shape) for v, shape in drawn)


def test_variances_are_found_again_in_a_pilot():
    rng, tasks = np.random.default_rng(0), [*TASKS] * 200
    true = Spread(0.02, 1e-3, 0.12)
    made = [draw(rng, true, 8, 2000, 0.01) for _ in range(40)]
    found = [
        power.estimate_spread(compute_effect(one, np.zeros_like(one), tasks))
        for one in made
    ]
    means = np.mean([dataclasses.astuple(one) for one in found], axis=0)
    assert means == pytest.approx(dataclasses.astuple(true), rel=0.15)


@pytest.mark.parametrize("spread", [SPREAD, Spread(0.05, 1e-5, 0.1)])
def test_the_planned_seeds_and_items_have_the_power(spread):
    goal = Goal(("a", "b"), points=1.0, power=0.8)
    plan, table = power.make_plan(spread, goal, 5, 2000, (3600, 0))
    seeds, items = plan["seeds"], plan["items"]
    assert table.loc[seeds, "enough"] and table.loc[seeds, "smallest seen"] <= 1.0
    assert table.loc[seeds, "hours"] == seeds
    rng, seen, covered = np.random.default_rng(0), [], []
    tasks = [*TASKS] * (items // len(TASKS))
    for _ in range(400):
        made = draw(rng, spread, seeds, items, 0.01)
        effect = compute_effect(made, np.zeros_like(made), tasks)
        seen.append(effect.lo > 0)
        covered.append(effect.lo <= 0.01 <= effect.hi)
    assert 0.75 <= np.mean(seen) <= 0.93
    assert 0.93 <= np.mean(covered) <= 0.98  # of 400; see test_findings.py


def test_fewer_seeds_or_items_would_not_do():
    goal = Goal(("a", "b"))
    seeds = power.make_plan(SPREAD, goal, 2, 1000, (0, 0))[0]["seeds"]
    assert seeds > 2 and power.find_items(SPREAD, seeds - 1, goal, 1000) is None
    items = power.find_items(SPREAD, seeds, goal, 1000)
    fewer = power.compute_half_width(SPREAD, seeds, items - 10)
    assert fewer > power.compute_half_width(SPREAD, seeds, items)
    with pytest.raises(ValueError, match=r"0\.1 points are not seen with 30 seeds"):
        power.make_plan(SPREAD, Goal(("a", "b"), points=0.1), 5, 2000, (0, 0))

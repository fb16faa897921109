"""Effects with intervals, and the verdicts of claims, on values worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from univg_nb.evaluate.scoring import ItemScore
from univg_nb.figures import findings
from univg_nb.figures.findings import Effect, compute_effect


@pytest.mark.parametrize(
    ("df", "value"),
    [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (1e5, 1.960)],
)
def test_quantiles_of_students_t_are_those_of_the_tables(df, value):
    assert findings.find_t_quantile(df) == pytest.approx(value, abs=1e-3)


def test_one_seed_is_the_t_interval_of_the_paired_differences():
    before = np.zeros(100)
    after = np.array([1.0] * 30 + [0.0] * 70)
    effect = compute_effect(after, before)
    error = after.std(ddof=1) / 10
    assert effect.mean == pytest.approx(0.3)
    assert effect.hi - effect.mean == pytest.approx(
        findings.find_t_quantile(99) * error
    )
    assert math.isnan(effect.se_seeds) and effect.se_items == pytest.approx(error)


def test_the_effect_is_the_macro_mean_over_tasks():
    tasks = ["a"] * 10 + ["b"] * 90
    after = [1.0] * 5 + [0.0] * 95
    assert compute_effect(after, [0.0] * 100, tasks).mean == pytest.approx(0.25)


def test_differences_that_are_all_zero_have_the_rule_of_three_as_bound():
    same = np.tile([0.0, 1.0], 150)
    effect = compute_effect(same, same)
    assert effect.hi == -effect.lo == pytest.approx(3 / 300, rel=0.01)
    tasks = ["a"] * 100 + ["b"] * 200  # two tasks: half of the smaller one's bound
    assert compute_effect(same, same, tasks).hi == pytest.approx(3 / 200, rel=0.01)
    one = same.copy()
    one[0] = 1.0
    assert compute_effect(one, same).hi - 1 / 300 >= effect.hi  # never more certain


def test_unpaired_values_are_refused():
    with pytest.raises(ValueError, match=r"shapes \(1, 3\) and \(1, 2\) with 3 tasks"):
        compute_effect([1, 0, 1], [1, 0])


def test_a_single_item_says_nothing():
    assert compute_effect([1.0], [0.0]).lo == 0.0
    assert compute_effect([1.0, 0.0], [0.0, 0.0], ["a", "b"]).lo < 0


TASKS = np.repeat(np.arange(10), 20)


@pytest.mark.parametrize(("seeds", "by_seed"), [(1, 0.0), (5, 0.3), (5, 0.0)])
def test_coverage_in_simulation(seeds, by_seed):
    rng, found = np.random.default_rng(0), []
    for _ in range(600):
        level, gain = rng.normal(0, 1, 200), rng.normal(0.4, 0.5, 200)
        noise = rng.normal(0, by_seed, (2, seeds, 1))
        rates = [1 / (1 + np.exp(-(level + k * gain + noise[k]))) for k in (0, 1)]
        before, after = (rng.random((seeds, 200)) < rate for rate in rates)
        found.append(compute_effect(after, before, TASKS))
    true = np.mean([effect.mean for effect in found])
    covered = np.mean([effect.lo <= true <= effect.hi for effect in found])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("seeds", [5, 8])
@pytest.mark.parametrize(
    ("items", "by_seed", "rest"),
    [
        (0.02, 0, 0.12),
        (0.02, 1e-4, 0.12),
        (0.02, 1e-3, 0.12),
        (0, 0, 0.2),  # nothing but single answers
        (0.2, 0, 0.01),  # nearly nothing but items
        (0, 1e-3, 0.1),
    ],
)
def test_coverage_whatever_varies(seeds, items, by_seed, rest):
    """Differences whose items, seeds and rest have these variances."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(700):
        made = rng.normal(0, items**0.5, 200) + rng.normal(0, by_seed**0.5, (seeds, 1))
        made += rng.normal(0, rest**0.5, (seeds, 200))
        effect = compute_effect(made, np.zeros_like(made), TASKS)
        covered += effect.lo <= 0 <= effect.hi
    assert 0.93 <= covered / 700 <= 0.97


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.03, "supported"),
        (-0.03, -0.001, "contradicted"),
        (-0.004, 0.009, "contradicted"),  # a point or more is excluded
        (-0.004, 0.02, "undecided"),
        (0.0, 0.02, "undecided"),
    ],
)
def test_verdicts_follow_the_rule(low, high, verdict):
    effect = Effect((low + high) / 2, low, high, 100)
    assert findings.judge(effect) == verdict
    assert verdict in findings.VERDICTS
    reason = {"supported": "begins", "contradicted": "excluded", "undecided": "seen"}
    assert reason[verdict] in findings.explain(effect)


def test_smallest_detectable_effect_is_that_of_the_usual_formula():
    effect = Effect(0.0, -1.96, 1.96, 100)  # standard error 1
    assert effect.find_smallest_detectable() == pytest.approx(1.96 + 0.8416, abs=1e-3)
    assert effect.find_smallest_detectable(0.5) == pytest.approx(1.96, abs=1e-3)


def test_trend():
    effect = findings.compute_trend([0.1, 0.3, 0.2, 0.4])
    assert effect.mean == pytest.approx(3 * 0.08)  # the slope of a step is 0.08
    assert effect.lo < 0 < effect.hi
    with pytest.raises(ValueError, match="2 updates are too few"):
        findings.compute_trend([0.1, 0.2])


def test_a_trend_of_several_trainings_knows_how_they_differ():
    """Each line is exact, so that all of the interval is the spread of the slopes."""
    rise = np.linspace(0.0, 1.0, 5)
    effect = findings.compute_trend([0.1 * rise, 0.3 * rise, 0.2 * rise])
    assert effect.mean == pytest.approx(0.2) and effect.seeds == 3
    assert effect.hi - effect.mean == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    one = findings.compute_trend(0.1 * rise)
    assert one.hi - one.lo == pytest.approx(0, abs=1e-9)


def test_table_of_claims_says_what_was_not_run():
    def score(hits):
        return [
            ItemScore(k, "", "diff", float(k < hits), "ok", None, False)
            for k in range(200)
        ]

    scored = {"sft_nocot": score(60), "sft_lora": score(120), "grpo_none": score(120)}
    shares = pd.DataFrame({"easy": [0.1, 0.2, 0.3, 0.41], "hard": [0.5, 0.5, 0.5, 0.5]})
    frame = findings.build_findings(scored, shares)
    chains = frame.loc["chains gain over plain SFT"]
    assert chains["verdict"] == "supported" and chains["ours"] == pytest.approx(30)
    assert chains["paper"] == pytest.approx(1.7)
    weight = frame.loc["the weight gains over plain GRPO"]
    assert weight["verdict"] == "not run" and weight["why"] == "no scores of grpo_exp"
    assert math.isnan(weight["ours"]) and weight["paper"] == pytest.approx(1.99)
    assert frame.loc["easy groups become more", "verdict"] == "supported"
    assert set(findings.build_findings({})["verdict"]) == {"not run"}
    shown = findings.format_published(frame)["paper"]
    assert shown["RL gains over the model it starts from"] == "1.65"
    assert shown["easy groups become more"] == "21.5"
    assert shown["the weight is more than a step size"] == "–"


def test_a_finding_is_said_with_its_interval_verdict_and_reason():
    said = findings.state_finding("chains help", Effect(0.07, 0.007, 0.133, 300))
    assert said.startswith("chains help: +7.0 points [+0.7, +13.3], supported; the ")
    assert max(map(len, said.splitlines())) <= 88
    lost = findings.state_finding("chains help", Effect(-0.05, -0.08, -0.02, 300))
    assert "-5.0 points [-8.0, -2.0], contradicted" in lost


def test_gains_of_tasks_are_paired_and_in_the_order_of_the_paper():
    def score(hits):
        tasks = ["reasoning"] * 50 + ["diff"] * 50
        return [
            ItemScore(k, "", task, float(k % 50 < hits[task]), "ok", None, False)
            for k, task in enumerate(tasks)
        ]

    before = score({"reasoning": 10, "diff": 20})
    gains = findings.compute_task_gains(score({"reasoning": 30, "diff": 10}), before)
    assert list(gains.index) == ["Static", "Reason", "AVG"]
    assert gains["ours"].tolist() == pytest.approx([-20, 40, 10])
    assert gains.loc["Static", "hi"] < 0 < gains.loc["Reason", "lo"]
    assert gains["paper"].isna().all()

"""Intervals and paired tests against textbook values and simulation."""

import numpy as np
import pytest

from univg_nb.evaluate.intervals import (
    macro_interval,
    mcnemar_test,
    paired_bootstrap,
    wilson_interval,
)


def test_wilson_known_values():
    # Newcombe 1998, table I: 81 of 263 and 15 of 148, 0 of 20, 1 of 29
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_wilson_ends_and_symmetry():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    low, high = wilson_interval(3, 10)
    assert wilson_interval(7, 10) == pytest.approx((1 - high, 1 - low))
    with pytest.raises(ValueError, match="5 successes of 4"):
        wilson_interval(5, 4)


def test_macro_interval_covers_the_true_mean():
    rng = np.random.default_rng(0)
    n, p = np.array([30, 94, 288, 117]), np.array([0.05, 0.5, 0.9, 0.3])
    inside = 0
    for hits in rng.binomial(n, p, size=(1000, 4)):
        low, high = macro_interval(hits.tolist(), n.tolist())
        inside += low <= p.mean() <= high
    assert 0.93 < inside / 1000 < 0.98
    with pytest.raises(ValueError, match="empty tasks"):
        macro_interval([0], [0])


def test_paired_bootstrap_matches_theory_and_repeats():
    rng = np.random.default_rng(1)
    b = rng.normal(size=400)
    a = b + rng.normal(0.15, 1.0, size=400)
    result = paired_bootstrap(a, b, n_boot=4000)
    error = np.std(a - b) / np.sqrt(400)
    assert result["mean_diff"] == pytest.approx(np.mean(a - b))
    assert result["lo"] == pytest.approx(result["mean_diff"] - 1.96 * error, abs=0.01)
    assert result["hi"] == pytest.approx(result["mean_diff"] + 1.96 * error, abs=0.01)
    # the interval holds 0 exactly when p is above 0.05
    assert (result["lo"] <= 0 <= result["hi"]) == (result["p"] > 0.05)
    assert paired_bootstrap(b + 1, b, n_boot=999)["p"] == pytest.approx(0.002)
    assert paired_bootstrap(a, b, n_boot=4000) == result
    swapped = paired_bootstrap(b, a, n_boot=4000)
    assert swapped["lo"] == pytest.approx(-result["hi"])
    assert swapped["p"] == pytest.approx(result["p"])


def test_paired_bootstrap_of_equal_models_sees_nothing():
    hits = [1, 0, 1, 1, 0] * 60
    result = paired_bootstrap(hits, hits, n_boot=200)
    bound = pytest.approx(3 / 300, rel=0.01)  # the rule of three
    assert result == {"mean_diff": 0.0, "lo": -result["hi"], "hi": bound, "p": 1.0}
    with pytest.raises(ValueError, match="same order"):
        paired_bootstrap([1, 0], [1])


def test_mcnemar_exact():
    a = [1] * 8 + [0] * 2 + [1] * 20
    b = [0] * 8 + [1] * 2 + [1] * 20
    # 2 * (1 + 10 + 45) / 1024
    assert mcnemar_test(a, b) == {"b": 8, "c": 2, "p": pytest.approx(0.109375)}
    assert mcnemar_test(b, a)["p"] == pytest.approx(0.109375)
    assert mcnemar_test([1, 0], [1, 0])["p"] == 1.0
    many = mcnemar_test([1] * 3000 + [0] * 1000, [0] * 3000 + [1] * 1000)
    assert many["b"] == 3000
    assert 0 <= many["p"] < 1e-100

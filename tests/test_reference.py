"""The comparison of several seeds: its control, its intervals."""

import numpy as np
import pytest

from univg_nb import reference


def test_the_constant_makes_the_whole_update_as_large():
    rows = [
        {"weight": 2.0, "advantages": [1.0, -1.0]},
        {"weight": 1.0, "advantages": [0.5, -0.5]},
        {"weight": 2.7, "advantages": [0.0, 0.0]},  # silent: no part in it
    ]
    constant = reference.fair_constant(rows)
    sizes = [np.abs(row["advantages"]).sum() for row in rows]
    weighted = sum(s * row["weight"] for s, row in zip(sizes, rows, strict=True))
    assert constant * sum(sizes) == pytest.approx(weighted)
    with pytest.raises(ValueError, match="silent"):
        reference.fair_constant(rows[2:])


def test_intervals_know_the_luck_of_items_and_of_seeds():
    rng = np.random.default_rng(0)
    items = rng.normal(size=200)
    b = np.tile(items, (3, 1))  # the items' own difficulty cancels in pairs
    a = b + np.array([[0.10], [0.12], [0.14]])
    made = reference.over_seeds_and_items(a, b)
    assert made["mean_diff"] == pytest.approx(0.12)
    assert made["by_seed"] == pytest.approx([0.10, 0.12, 0.14])
    assert made["items_95"] == pytest.approx([0.12, 0.12])
    # Student's t with two degrees of freedom: 4.303 * 0.02 / sqrt(3)
    assert made["seeds_95"] == pytest.approx([0.12 - 0.04969, 0.12 + 0.04969], abs=1e-4)
    assert reference.over_seeds_and_items(a[:1], b[:1])["seeds_95"] is None


def test_every_pair_is_compared():
    values = {m: i for i, m in enumerate([*reference.METHODS, reference.SFT])}
    results = {
        m: {
            seed: {k: [float(i)] * 5 for k in ("expected_iou", "greedy_iou", "hit")}
            for seed in (0, 1)
        }
        for m, i in values.items()
    }
    made = reference.compare(results)
    assert made["exp - none"]["hit"]["mean_diff"] == 1.0
    assert made["exp - constant"]["expected_iou"]["by_seed"] == [-2.0, -2.0]
    assert len(made) == len(reference.PAIRS)
    assert reference.means(results)["exp"]["hit"] == [1.0, 1.0]
    some = {method: results[method] for method in ("exp", reference.SFT)}
    assert list(reference.compare(some)) == ["exp - sft"]


def test_a_constant_without_the_exp_it_copies_is_refused(capsys):
    with pytest.raises(SystemExit):
        reference.main(["--methods", "none", "constant"])
    assert "add exp" in capsys.readouterr().err

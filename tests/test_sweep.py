"""The sweep: its grid, its gains, and that it keeps off the test."""

import pytest

from univg_nb import runs, sweep


def test_a_grid_is_every_combination():
    assert sweep.points([]) == [[]]
    made = sweep.points(["grpo.learning_rate=1e-4,3e-4", "grpo.beta=0,0.04"])
    assert len(made) == 4 and made[1] == ["grpo.learning_rate=1e-4", "grpo.beta=0.04"]
    with pytest.raises(ValueError, match="KEY=VALUE"):
        sweep.points(["grpo.beta"])


def test_gains_are_paired():
    made = sweep.gain([0.5, 0.7, 0.9], [0.4, 0.6, 0.8])
    assert made["mean_diff"] == pytest.approx(0.1)
    assert made["lo"] == pytest.approx(0.1) and made["hi"] == pytest.approx(0.1)


def test_it_is_scored_on_validation_items(tmp_path):
    run = runs.start("smoke", tmp_path / "run")
    bench = sweep.validation(run, 1)
    assert len(bench.items) == 10
    assert all("-val-" in item.id or "val_" in item.images[0] for item in bench.items)
    assert sweep.validation(run, 1).sha256 == bench.sha256

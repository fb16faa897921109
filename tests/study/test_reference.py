"""The comparison of several seeds: its control, its intervals."""

import numpy as np
import pytest

from univg_nb import io
from univg_nb.data.sample import GroundingSample
from univg_nb.study import data, reference, tables


def test_the_constant_makes_the_whole_update_as_large():
    rows = [
        {"weight": 2.0, "advantages": [1.0, -1.0]},
        {"weight": 1.0, "advantages": [0.5, -0.5]},
        {"weight": 2.7, "advantages": [0.0, 0.0]},  # silent: no part in it
    ]
    constant = reference.compute_fair_constant(rows)
    sizes = [np.abs(row["advantages"]).sum() for row in rows]
    weighted = sum(s * row["weight"] for s, row in zip(sizes, rows, strict=True))
    assert constant * sum(sizes) == pytest.approx(weighted)
    with pytest.raises(ValueError, match="silent"):
        reference.compute_fair_constant(rows[2:])


def test_intervals_know_the_luck_of_items_and_of_seeds():
    rng = np.random.default_rng(0)
    items = rng.normal(size=200)
    b = np.tile(items, (3, 1))  # the items' own difficulty cancels in pairs
    a = b + np.array([[0.10], [0.12], [0.14]])
    made = tables.compare_methods(a, b)
    assert made["mean_diff"] == pytest.approx(0.12)
    assert made["by_seed"] == pytest.approx([0.10, 0.12, 0.14])
    assert made["items_95"] == pytest.approx([0.12, 0.12])
    # Student's t with two degrees of freedom: 4.303 * 0.02 / sqrt(3)
    assert made["seeds_95"] == pytest.approx([0.12 - 0.04969, 0.12 + 0.04969], abs=1e-4)
    assert tables.compare_methods(a[:1], b[:1])["seeds_95"] is None


def test_every_pair_is_compared():
    values = {m: i for i, m in enumerate([*reference.METHODS, tables.SFT])}
    results = {
        m: {
            seed: {k: [float(i)] * 5 for k in ("expected_iou", "greedy_iou", "hit")}
            for seed in (0, 1)
        }
        for m, i in values.items()
    }
    made = tables.compare(results)
    assert made["exp - none"]["hit"]["mean_diff"] == 1.0
    assert made["exp - constant"]["expected_iou"]["by_seed"] == [-2.0, -2.0]
    assert len(made) == len(tables.PAIRS)
    assert tables.compute_means(results)["exp"]["hit"] == [1.0, 1.0]


def asked(number: int, task: str = "diff") -> GroundingSample:
    return GroundingSample(
        id=f"row-{number}",
        task=task,
        images=("one.png",),
        question="Where is the cup?",
        answer=(1, 2, 30, 40),
        chain=f"Image 1 shows {number} cups.",
    )


def test_hasty_chains_change_nothing_but_the_chain():
    rows = [asked(i) for i in range(400)]
    mixed = data.replace_chains(rows, 0.25, seed=3)
    quick = [row for row in mixed if row.chain == data.HASTY]
    assert 70 <= len(quick) <= 130
    for before, after in zip(rows, mixed, strict=True):
        assert (after.id, after.answer) == (before.id, before.answer)
        assert after.chain in (before.chain, data.HASTY)
    assert data.replace_chains(rows, 0.25, seed=3) == mixed
    assert data.replace_chains(rows, 0.25, seed=4) != mixed
    assert data.replace_chains(rows, 0, seed=3) == rows
    with pytest.raises(ValueError, match=r"share 1\.5"):
        data.replace_chains(rows, 1.5, seed=3)


def test_what_a_task_learned():
    items = [asked(0, "diff"), asked(1, "region"), asked(2, "diff")]
    seeds = {
        0: {"hit": [1.0, 0.0, 0.0], "thinks": [1.0, 0.0, 1.0]},
        7: {"hit": [1.0, 1.0, 1.0], "thinks": [0.0, 0.0, 1.0]},
    }
    made = tables.compute_task_means(items, {"exp": seeds})
    assert made["exp"]["diff"] == {"hit": [0.5, 1.0], "thinks": [1.0, 0.5]}
    assert made["exp"]["region"] == {"hit": [0.0, 1.0], "thinks": [0.0, 0.0]}


def test_curves_of_a_training(tmp_path):
    quick, slow = f"<think>{data.HASTY}</think>", "<think>Image 1 ...</think>"
    for step, replies in ((1, [quick, quick]), (1, [quick, slow]), (2, [slow, slow])):
        row = {"step": step, "replies": replies}
        io.append_jsonl(tmp_path / "rollouts.jsonl", row)
    for step in (1, 2):
        row = {"groups/mean_iou": 0.1 * step, "completions/mean_length": 20.0 * step}
        io.append_jsonl(tmp_path / "metrics.jsonl", row | {"step": step})
    assert tables.read_curves(tmp_path) == {
        "mean_iou": [0.1, 0.2],
        "length": [20.0, 40.0],
        "thinks": [0.25, 1.0],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--questions", "10"], "give both or neither"),
        (["--chains", "10"], "add --questions"),
        (["--hasty", "0.5"], "add --chains"),
    ],
)
def test_options_that_belong_together(options, message):
    with pytest.raises(ValueError, match=message):
        reference.main(options)

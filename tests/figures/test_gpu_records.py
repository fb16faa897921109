"""Records of GPU measurements: read, compared with the plain way, drawn."""

import math
from pathlib import Path

import pytest

from univg_nb import io
from univg_nb.figures import gpu

RECORDS = Path(__file__).parents[2] / "notebooks" / "reference_runs"


def make_record(**steps):
    return {"device": "1 x CARD", "steps": steps}


def test_a_folder_without_records_says_so(tmp_path):
    records = gpu.load_gpu_records(tmp_path)
    assert records.empty and list(records) == gpu.COLUMNS
    assert gpu.format_gpu_line(records) == gpu.NOTHING
    assert gpu.compare_ways(records).empty
    with pytest.raises(ValueError, match="No measurement on a GPU"):
        gpu.plot_gpu_speedups(records)


def test_ways_are_compared_with_the_plain_one_and_dry_runs_are_left_out(tmp_path):
    passes = [
        {"name": "M G 8: whole rows, sdpa", "policy_s": 3.0, "reference_s": 1.0},
        {"name": "M G 8: packed, flex", "policy_s": 0.5, "reference_s": 0.5},
        {"name": "M G 8: packed, sdpa", "policy_s": 1.5, "reference_s": 1.0},
        {"name": "M G 16: packed, flex", "policy_s": 0.9, "reference_s": 0.9},
        {"name": "M G 16: whole rows, sdpa", "error": "out of memory"},
    ]
    sft = [
        {"name": "SFT M none: ours", "adapter": "none", "step_s": 1.0},
        {"name": "SFT M none: plain", "adapter": "none", "step_s": 4.0},
    ]
    update = {"name": "M G 8: shared", "updates_seconds": [2], "seconds": {"update": 2}}
    record = make_record(
        passes={"dry": False, "entries": passes},
        sft={"dry": False, "entries": sft},
        update={"dry": True, "entries": [update]},
        tests={"status": "not run"},
    )
    io.write_json(tmp_path / "gpu_card.json", record)
    records = gpu.load_gpu_records(tmp_path)
    found = {(r.measured, r.way): r.speedup for r in records.itertuples()}
    assert math.isnan(found.pop(("M G 16: policy pass", "packed, flex")))
    assert math.isnan(found.pop(("M G 16: reference pass", "packed, flex")))
    assert found == {
        ("M G 8: policy pass", "whole rows, sdpa"): 1,
        ("M G 8: reference pass", "whole rows, sdpa"): 1,
        ("M G 8: policy pass", "packed, flex"): 6,
        ("M G 8: reference pass", "packed, flex"): 2,
        ("M G 8: policy pass", "packed, sdpa"): 2,
        ("M G 8: reference pass", "packed, sdpa"): 1,
        ("M all weights: SFT step", "ours"): 4,
        ("M all weights: SFT step", "plain"): 1,
    }
    table = gpu.compare_ways(records)
    assert table["times as fast"].to_dict() == {
        "M G 8: policy pass": 6,
        "M G 8: reference pass": 2,
        "M all weights: SFT step": 4,
    }
    assert table["ours, s"].tolist() == [0.5, 0.5, 1] and table["plain, s"].max() == 4
    figure = gpu.plot_gpu_speedups(records)
    (ax,) = figure.axes
    assert [bar.get_width() for bar in ax.patches] == [6, 2, 2, 1, 4]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["1 x CARD"]


def test_the_committed_records_name_their_devices():
    records = gpu.load_gpu_records(RECORDS)
    line = gpu.format_gpu_line(records)
    assert "NVIDIA H100" in line and "NVIDIA H200" in line
    assert (records["seconds"] > 0).all() and (records["speedup"] > 1).any()

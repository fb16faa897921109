"""A dry run of what tests/bench/gpu measures: every step on a CPU, in tiny shapes."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parent / "bench" / "gpu"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scripts():
    before = sys.path[:]
    sys.path.insert(0, str(GPU))
    yield {name: importlib.import_module(name) for name in ("steps", "table")}
    sys.path[:] = before


def test_all_steps_run_on_a_cpu(scripts, folder, capfd):
    steps, table = scripts["steps"], scripts["table"]
    work, out = folder / "work", folder / "out"
    out.mkdir()
    drawn = [sys.executable, str(GPU / "data.py"), str(work / "minimig"), "--dry"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(drawn, env=environment, check=True)
    (work / "logs").mkdir()
    for name, step in steps.STEPS.items():
        record = steps.Record(name, work, dry=True)
        with record.tried(name):
            step(record)
        record.write()
        errors = [entry for entry in record.entries if "error" in entry]
        assert not errors, errors[0]["error"]
        assert record.entries
        (work / "steps" / f"{name}.status").write_text("0 1 60")
    table.main(work, out)
    made = sorted(path.name for path in out.iterdir())
    assert made == sorted([*table.FILES, "logs.txt.gz", "table.txt"])
    assert len(made) <= 8
    for name in table.FILES:
        found = json.loads((out / name).read_text())
        assert found["device"] and found["versions"]["torch"]
    shown = (out / "table.txt").read_text()
    assert "packed, sdpa" in shown and "not run" not in shown, shown
    updates = json.loads((out / "gpu_grpo.json").read_text())["steps"]["update"]
    assert {entry["way"] for entry in updates["entries"]} == {"stock", "shared"}


def test_the_script_goes_on_after_a_failed_step(tmp_path):
    environment = os.environ | {
        "PYTHON": sys.executable,
        "DRY": "1",
        "STEPS": "nothing:20 environment:60",
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", str(GPU / "run.sh"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "matmul bfloat16" in done.stdout and "environment: ok" in done.stdout

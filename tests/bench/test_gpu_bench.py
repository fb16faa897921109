"""A dry run of what tests/bench/gpu measures: its steps on a CPU, in tiny shapes.

The step `tests` is left out: it is tests/fast/test_gpu.py in a process of its own.
"""

import ast
import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

GPU = Path(__file__).parent / "gpu"
ROOT = Path(__file__).parents[2]
SEARCHED = (ROOT, ROOT / "tests", ROOT / "tests/fast", GPU, GPU.parent)
# What wheels.sh takes for granted, and what these bring; deepspeed is optional.
IMAGE = {"torch", "torchvision", "accelerate", "tokenizers", "pytest", "numpy", "PIL"}
IMAGE |= {"yaml", "tqdm", "packaging", "safetensors", "deepspeed"}


def list_imports(path: Path) -> set[str]:
    """Modules that a file imports, with every name that may be one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def find_file(module: str) -> Path | None:
    """The file of a module of this project; None if it is another's."""
    below = Path(*module.split("."))
    places = [folder / below for folder in SEARCHED]
    files = [
        p for place in places for p in (place.with_suffix(".py"), place / "__init__.py")
    ]
    return next(filter(Path.is_file, files), None)


def test_the_wheels_hold_what_an_image_lacks():
    todo = [
        GPU / "steps.py",
        ROOT / "tests/fast/test_gpu.py",
        ROOT / "tests/conftest.py",
    ]
    seen, foreign = set(), set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in list_imports(path):
            parts = module.split(".")
            owners = [find_file(".".join(parts[: n + 1])) for n in range(len(parts))]
            todo += filter(None, owners)
            if owners[0] is None:
                foreign.add(parts[0])
    script = (GPU / "wheels.sh").read_text(encoding="utf-8")
    wheels = set(script.split('names="')[1].split('"')[0].replace("\\", " ").split())
    assert len(seen) > 50 and {"torch", "trl", "ijson"} <= foreign
    assert foreign - set(sys.stdlib_module_names) - IMAGE <= wheels


@pytest.fixture(scope="module")
def scripts():
    before = sys.path[:]
    sys.path.insert(0, str(GPU))
    names = ("steps", "table", "trim_wheel")
    yield {name: importlib.import_module(name) for name in names}
    sys.path[:] = before


@pytest.mark.slow
def test_all_steps_run_on_a_cpu(scripts, folder, capfd):
    steps, table = scripts["steps"], scripts["table"]
    work, out = folder / "work", folder / "out"
    out.mkdir()
    drawn = [sys.executable, str(GPU / "data.py"), str(work / "minimig"), "--dry"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(drawn, env=environment, check=True)
    (work / "logs").mkdir()
    for name, step in steps.STEPS.items():
        if name == "tests":
            continue
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
    assert "packed, sdpa" in shown, shown
    assert [line for line in shown.splitlines() if "not run" in line] == [
        "tests: not run"
    ]
    updates = json.loads((out / "gpu_grpo.json").read_text())["steps"]["update"]
    assert {entry["way"] for entry in updates["entries"]} == {"stock", "shared"}
    assert "Qwen3-VL-4B-Instruct G 4: shared" in shown


@pytest.mark.slow
def test_the_script_goes_on_after_a_failed_step(tmp_path):
    environment = os.environ | {
        "PYTHON": sys.executable,
        "DRY": "1",
        "STEPS": "update:1 environment:60",
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", str(GPU / "run.sh"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "update: timed out" in done.stdout
    assert "matmul bfloat16" in done.stdout and "environment: ok" in done.stdout


def test_a_trimmed_wheel_keeps_the_named_libraries_only(scripts, tmp_path):
    wheel = tmp_path / "made-1.0-py3-none-any.whl"
    listed = ("made/code.py", "made/lib_cuda130.so", "made/lib_cuda128.so")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in listed:
            archive.writestr(name, name)
        record = "".join(f"{name},sha256=0,1\n" for name in listed)
        archive.writestr("made-1.0.dist-info/RECORD", record)
    trim = scripts["trim_wheel"].trim
    with pytest.raises(ValueError, match="holds no lib_cuda999"):
        trim(wheel, ["lib_cuda999.so"])
    trim(wheel, ["lib_cuda130.so"])
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        rows = archive.read("made-1.0.dist-info/RECORD").decode().splitlines()
        assert archive.read("made/lib_cuda130.so") == b"made/lib_cuda130.so"
    assert names == [*listed[:2], "made-1.0.dist-info/RECORD"]
    assert [row.split(",")[0] for row in rows] == [*listed[:2]]


def test_a_prediction_is_held_against_what_was_measured(scripts, tmp_path):
    """Full weights of the 2B shape: weights, gradients and Adam alone take 12 GB."""
    steps = scripts["steps"]
    entry = {"name": "SFT none: ours", "adapter": "none", "batch": 8, "side": 448}
    entry |= {"longest_row": 1224, "allocated_gb": 15.154, "device_gb": 17.42}
    measured = steps.Record("sft", tmp_path, dry=False)
    measured.add(**entry)
    measured.add("SFT lora: ours", error="out of memory")
    record = steps.Record("memory", tmp_path, dry=False)
    steps.memory(record)
    (found,) = record.entries
    assert found["measured_gb"] == 15.154 and found["predicted_gb"] > 12
    assert found["within_25_percent"] == (
        abs(found["predicted_gb"] / found["measured_gb"] - 1) <= 0.25
    )

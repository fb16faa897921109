"""The strict runner, on throwaway notebooks with real kernels."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from interrupted import held_by_another_process
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill import engines

from univg_nb import io, runs
from univg_nb.__main__ import main
from univg_nb.launch import notebooks, runner
from univg_nb.launch import queue as job_queue

HEAD = 'SCALE = "tiny"\nRUN_DIR = ""\nFRESH = False\nRATE = 0.5\nN = 2\nITEMS = [1]'


def write(folder, name, *sources, parameters=HEAD):
    cells = [new_markdown_cell("# title"), new_code_cell(parameters)]
    cells[1].metadata["tags"] = ["parameters"]
    notebook = new_notebook(cells=cells + [new_code_cell(s) for s in sources])
    path = folder / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def repo(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments):
    return main(["run", "--scale", "smoke", *map(str, arguments)])


# ---------------------------------------------------------------- before a kernel


def test_a_run_folder_that_somebody_works_on_is_refused(repo, capsys):
    write(repo, "00_a", "print(1)")
    folder = repo / "runs" / "smoke"
    with held_by_another_process(folder) as pid:
        assert call("--set", "sft.max_steps=1") == 2
    assert f"smoke: {socket.gethostname()}, process {pid}" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["-p", "RTAE", "1"],
            "-p RTAE: no such parameter in 00_a; did you mean 'RATE'",
        ),
        (["-p", "N", "1.5"], "-p N 1.5: expected int"),
        (["-p", "N", "true"], "-p N true: expected int"),
        (["-p", "FRESH", "maybe"], "expected bool"),
        (["-p", "ITEMS", "3"], "expected list"),
        (["-p", "N", "1,two"], "-p N two: expected int"),
        (["-p", "N", "3:3"], "an empty range"),
        (["-p", "N", "1,,2"], "an empty value"),
        (["-p", "N", "1,1"], "listed twice"),
        (["-p", "N", "1:30.5"], "-p N 1:30.5: expected int"),
        (["-p", "RATE", "1:30"], "-p RATE 1:30: expected float"),
        (["-p", "RATE", "-1e-3", "-p", "RATE", "2"], "RATE is given twice"),
        (["-p", "FRESH", "1"], "expected bool (true or false)"),
        (["07"], "no notebook '07'"),
        (["07"], "notebooks/07*.ipynb; that folder has 00_a"),
        (["/nowhere/07.ipynb"], "looked for /nowhere/07*.ipynb; that folder has none"),
        (["pyproject.toml"], "pyproject.toml is no notebook; name an .ipynb file"),
        (["**"], "no notebook '**'"),
        ([""], "no notebook ''"),
        (["--run-dir", "pyproject.toml/x"], "pyproject.toml is a file; name another"),
        (["--run-dir", "pyproject.toml"], "pyproject.toml is a file; name another"),
        (["--record", "nowhere"], "nowhere/notebooks/00_a.ipynb"),
        (["--scale", "tny"], "unknown scale 'tny'; did you mean 'tiny'"),
    ],
)
def test_wrong_arguments_cost_no_kernel(repo, capsys, arguments, message):
    write(repo, "00_a", "raise RuntimeError('must not run')")
    assert call(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (repo / "runs").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"3", b"\xff", b'{"nbformat": 4, "cells": [3]}'],
)
def test_a_file_that_is_no_notebook_is_named(repo, capsys, content):
    path = write(repo, "00_a")
    path.write_bytes(content)
    assert call() == 2
    err = capsys.readouterr().err
    assert "00_a.ipynb: not a" in err and len(err.splitlines()) == 1


def test_another_folder_is_named(repo, capsys):
    assert call() == 2
    assert f"no notebooks in {repo.resolve()}/notebooks; go" in capsys.readouterr().err
    path = write(repo, "00_a", parameters="N = = 1")
    assert call(path) == 2
    assert "00_a, parameters cell: invalid syntax" in capsys.readouterr().err


def test_texts_become_the_types_of_the_defaults():
    for text, default, value in (
        ("false", True, False),
        ("1", 0.5, 1.0),
        ("1e-3", 0.5, 1e-3),
        ("[1, 2]", [], [1, 2]),
        ("12", "text", "12"),
        ("12", None, 12),
    ):
        parsed = notebooks.parse_parameter("X", text, default, "00")
        assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("line", ["B = A + 1", "print(1)", "import os"])
def test_the_parameters_cell_holds_plain_values_only(repo, line):
    path = write(repo, "00_a", parameters=f"A = 1\n{line}")
    with pytest.raises(ValueError, match=r"00_a, parameters cell: .* next cell"):
        notebooks.read_parameters(notebooks.read_notebook(path), "00_a")


# ---------------------------------------------------------------- with a kernel


def test_parameters_reach_the_cells_and_outputs_are_recorded(repo, capsys):
    path = write(
        repo,
        "00_a",
        "import os, sys\n"
        "print(RATE, N, ITEMS, FRESH, SCALE, RUN_DIR)\n"
        "print(os.environ['HF_HUB_OFFLINE'], sys.prefix, file=sys.stderr)",
        "assert sys.prefix == " + repr(sys.prefix) + "\nN",
    )
    given = ["-p", "RATE", "1e-3", "-p", "ITEMS", "[2, 3]", "--fresh"]
    assert call(*given) == 0
    line = capsys.readouterr().out.splitlines()[0].split()
    assert line[:3] == ["1/1", "00_a", "done"] and line[-1] == "4/4"
    run_dir = repo / "runs" / "smoke"
    executed = nbformat.read(run_dir / "notebooks" / path.name, as_version=4)
    text = executed.cells[3].outputs[0].text
    assert text == f"0.001 2 [2, 3] True smoke {run_dir.resolve()}\n"
    facts = io.read_json(run_dir / "manifest.json")["notebooks"]["00_a"]
    assert facts["status"] == "done" and facts["seconds"] > 0

    assert call("--record", run_dir) == 0
    recorded = nbformat.read(path, as_version=4)
    assert len(recorded.cells) == 4  # the injected cell stays out
    cells = notebooks.code_cells(recorded)
    assert [cell.execution_count for cell in cells] == [1, 2, 3]
    assert cells[1].outputs[0].text == "0.001 2 [2, 3] True smoke runs/smoke\n"
    assert len(cells[1].outputs) == 1  # stderr stays out
    assert recorded.metadata.univg.code_sha256 == notebooks.code_sha256(recorded)

    recorded.cells[2].source += "\n# changed"
    assert recorded.metadata.univg.code_sha256 != notebooks.code_sha256(recorded)
    nbformat.write(recorded, path)
    assert call("--record", run_dir) == 2
    assert "made from other code" in capsys.readouterr().err


def test_a_copy_is_not_written_at_every_cell_and_is_whole_at_the_end(repo, monkeypatch):
    write(repo, "00_a", "from pathlib import Path", *["print('ran')"] * 8)
    written, original = [], engines.write_ipynb

    def count(notebook, path):
        written.append(path)
        original(notebook, path)

    monkeypatch.setattr(engines, "write_ipynb", count)
    monkeypatch.setattr(runner, "SAVE_EVERY", 600)
    assert call() == 0
    few, copy = len(written), repo / "runs" / "smoke" / "notebooks" / "00_a.ipynb"
    assert notebooks.ran_to_end(notebooks.read_notebook(copy))
    monkeypatch.setattr(runner, "SAVE_EVERY", 0)
    assert call() == 0
    assert few < 4 < 16 < len(written) - few  # papermill alone writes twice a cell


def test_a_kernel_is_silent_about_an_optional_package(repo):
    name = "bitsandbytes.backends.cpu.ops"
    write(
        repo,
        "00_a",
        f"import logging; logger = logging.getLogger({name!r})",
        "assert not logger.isEnabledFor(logging.WARNING)",
        "assert logger.isEnabledFor(logging.ERROR)",
    )
    assert call() == 0


def test_a_failure_stops_the_course_and_is_not_done(repo, capsys):
    write(repo, "00_a", "x = 1", "raise KeyError('box 7')", "x")
    write(repo, "01_b", "open('ran', 'w')")
    assert call() == 1
    captured = capsys.readouterr()
    assert "failed" in captured.out
    assert "error: 00_a, cell 4: KeyError: 'box 7'; exec" in captured.err
    assert "raise KeyError('box 7')" in captured.err  # a defect shows where
    manifest = io.read_json(repo / "runs" / "smoke" / "manifest.json")
    assert manifest["notebooks"]["00_a"]["status"] == "failed"
    assert not list(repo.rglob("ran"))


def test_papermill_by_itself_runs_a_notebook_too(repo):
    start = "from univg_nb import runs\nprint(runs.start(SCALE, RUN_DIR).dir, N)"
    path, out = write(repo, "00_a", start), repo / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(path), str(out)]
    command += ["--kernel", "python3", "--language", "python"]  # a course one has them
    command += ["-p", "N", "3", "-p", "RUN_DIR", "runs/mine", "--no-progress-bar"]
    subprocess.run(command, check=True)
    outputs = nbformat.read(out, as_version=4).cells[-1].outputs
    text = "".join(output.text for output in outputs if output.name == "stdout")
    assert text.splitlines()[-1] == f"{repo.resolve() / 'runs' / 'mine'} 3"
    assert (repo / "runs" / "mine" / "manifest.json").is_file()


def test_leaving_early_is_not_done(repo, capsys):
    write(repo, "00_a", "raise SystemExit", "x = 1")
    assert call() == 1
    assert "failed" in capsys.readouterr().out


PATIENT = """
import pathlib, time
pathlib.Path("started").touch()
try:
    time.sleep(300)
except (SystemExit, KeyboardInterrupt):
    time.sleep(1)
    pathlib.Path("checkpoint").write_text("saved")
    raise
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_kernel_which_gets_time_to_end(repo, number):
    note = "import os\nopen('kernel', 'w').write(str(os.getpid()))"
    write(repo, "00_a", note, PATIENT)
    write(repo, "01_b", "open('ran', 'w')")
    process = subprocess.Popen(
        [sys.executable, "-m", "univg_nb", "run", "--scale", "smoke"]
    )
    deadline = time.monotonic() + 180
    while not (repo / "notebooks" / "started").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=180) == 128 + number
    assert (repo / "notebooks" / "checkpoint").read_text() == "saved"
    manifest = io.read_json(repo / "runs" / "smoke" / "manifest.json")
    assert manifest["notebooks"]["00_a"]["status"] == "stopped"
    assert not list(repo.rglob("ran"))
    kernel = int((repo / "notebooks" / "kernel").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


def status(repo):
    manifest = io.read_json(repo / "runs" / "smoke" / "manifest.json")
    return manifest["notebooks"]["00_a"]["status"]


@pytest.mark.parametrize("moment", ["a cell", "the start"])
def test_a_killed_kernel_is_a_failed_notebook(repo, capsys, monkeypatch, moment):
    """As the system does when memory is short, also to one that ran well before."""
    write(repo, "00_a", "N")
    assert call() == 0 and status(repo) == "done"
    kill = "import os; os.kill(os.getpid(), 9)"
    if moment == "a cell":
        write(repo, "00_a", "N", kill, "N")
    else:
        monkeypatch.setattr(runner, "STARTUP", kill)
    capsys.readouterr()
    assert call() == 1
    err = capsys.readouterr().err
    cell = 4 if moment == "a cell" else 0
    assert f"error: 00_a, cell {cell}: the kernel died, likely out of mem" in err
    assert len(err.splitlines()) == 1
    assert status(repo) == "failed"


MISTAKE = """from univg_nb import runs
from univg_nb.data import files
run = runs.start(SCALE, RUN_DIR)
files.read("nowhere.json")
"""


def test_a_mistake_in_a_notebook_is_one_line(repo, capsys):
    path = write(repo, "00_a", MISTAKE)
    assert call() == 1
    err = capsys.readouterr().err
    assert "error: 00_a, cell 3: nowhere.json" in err and "Traceback" not in err
    assert 'line 4: files.read("nowhere.json")' in err
    assert len(err.splitlines()) == 1
    executed = repo / "runs" / "smoke" / "notebooks" / path.name
    shown = nbformat.read(executed, as_version=4).cells[-1].outputs[-1]
    assert shown.ename == "ValueError" and len(shown.traceback) == 1
    # What is no mistake of the user keeps its traceback.
    write(repo, "00_a", MISTAKE.replace('files.read("nowhere.json")', 'int("x")'))
    assert call("--fresh") == 1
    assert "line 4\n      1 from univg_nb" in capsys.readouterr().err


# ---------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    ("text", "default", "values"),
    [
        ("exp,power", "none", ["exp", "power"]),
        ("0:3", 0, ["0", "1", "2"]),
        ("0:3", "", ["0:3"]),
        ("1e-3, 1e-4", 0.1, ["1e-3", "1e-4"]),
        ("[1, 2]", [], ["[1, 2]"]),
        ("12", 0, ["12"]),
        ("[1, 2]", None, ["[1, 2]"]),
    ],
)
def test_what_counts_as_several_values(text, default, values):
    assert job_queue.split_values(text, default) == values


SWEPT = """
import pathlib, signal, sys, time
started = pathlib.Path(RUN_DIR, "starts")
with open(started, "a") as file:
    file.write("x")
flag = pathlib.Path("fail")
if N == 1 and flag.exists():
    raise KeyError("broken job")
while N == 2 and pathlib.Path("wait").exists():
    time.sleep(0.1)
"""


def states(repo):
    jobs = (repo / "runs" / "smoke").glob("*/job.json")
    return {path.parent.name: io.read_json(path)["state"] for path in jobs}


def starts(repo):
    folder = repo / "runs" / "smoke"
    return {path.parent.name: len(path.read_text()) for path in folder.glob("*/starts")}


def test_a_job_never_takes_half_of_a_shared_stage(tmp_path, monkeypatch):
    stage = runs.Run("smoke", tmp_path / "run", 0, {}).stage("data", {})
    io.write_text(stage.dir / "rows.json", "[]")
    stage.finish()
    link = os.link

    def cut_off(source, target, **_):
        if Path(source).name == "rows.json":
            raise KeyboardInterrupt
        link(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "link", cut_off)
        job_queue.share_stages(tmp_path / "run", tmp_path / "job")
    assert not (tmp_path / "job" / "data").exists()
    job_queue.share_stages(tmp_path / "run", tmp_path / "job")
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["data"]
    assert (tmp_path / "job" / "data" / "rows.json").read_text() == "[]"


@pytest.mark.slow
def test_a_sweep_keeps_states_and_runs_only_what_is_not_done(repo, capsys):
    write(repo, "00_a", SWEPT)
    run = runs.Run("smoke", repo / "runs" / "smoke", 0, {})
    shared = run.stage("data", {"n": 1})
    io.write_text(shared.dir / "rows.json", "[]")
    marker = io.read_json(shared.dir / "stage.json")
    io.write_json(shared.dir / "stage.json", marker | {"status": "finished"})
    fail = repo / "notebooks" / "fail"
    fail.touch()
    assert call("-p", "N", "0:2") == 1
    assert "KeyError: 'broken job'" in capsys.readouterr().err
    assert states(repo) == {"N=0": "done", "N=1": "failed"}
    job = repo / "runs" / "smoke" / "N=0"
    assert (job / "data" / "rows.json").samefile(shared.dir / "rows.json")
    fail.unlink()
    assert call("-p", "N", "0:2") == 0
    assert states(repo) == {"N=0": "done", "N=1": "done"}
    assert starts(repo) == {"N=0": 1, "N=1": 2}
    entry = io.read_json(repo / "runs" / "smoke" / "N=1" / "job.json")
    assert entry["command"][-2:] == ["N", "1"]


@pytest.mark.slow
def test_sigterm_ends_a_sweep_and_the_next_call_goes_on(repo, capsys):
    write(repo, "00_a", SWEPT)
    wait = repo / "notebooks" / "wait"
    wait.touch()
    command = [sys.executable, "-m", "univg_nb", "run", "--scale", "smoke"]
    process = subprocess.Popen([*command, "-p", "N", "2,3"])
    deadline = time.monotonic() + 180
    while starts(repo) != {"N=2": 1}:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    assert call("-p", "N", "2,3") == 2
    assert f"process {process.pid}, since" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=180) == 128 + signal.SIGTERM
    assert states(repo) == {"N=2": "interrupted"}
    wait.unlink()
    assert call("-p", "N", "2,3") == 0
    assert states(repo) == {"N=2": "done", "N=3": "done"}
    assert starts(repo) == {"N=2": 2, "N=3": 1}


def test_a_full_disk_is_named_and_leaves_nothing_that_looks_whole(repo, capsys):
    disk = repo / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        write(repo, "00_a", "print('x' * 200_000)")
        assert call("--run-dir", disk) == 1
        assert "no space left on the disk of" in capsys.readouterr().err
        assert not list(disk.rglob("*.ipynb"))
        assert not (disk / "manifest.json").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)

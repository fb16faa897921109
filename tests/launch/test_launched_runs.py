"""Launched trainings that end before their time: signals, killed processes, a full
disk. What is left goes on, or says what happened."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import nbformat
import psutil
import pytest
from launched import (
    GRPO,
    ROOT,
    adapter,
    caller,
    cut_off,
    losses,
    make_rows,
    scale,
    updates,
    wait_for,
    write_job,
)
from nbformat.v4 import new_code_cell, new_notebook

from univg_nb import io
from univg_nb.launch import launcher
from univg_nb.train import grpo, sft

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(folder):
    return make_rows(folder)


def state(out, rank):
    return io.read_json(out / "launch" / f"rank-{rank}.json")


def gone(out, *ranks):
    """Whether the processes of these ranks have ended."""
    found = [launcher.states_in(out / "launch")[rank] for rank in ranks]
    return not any(map(psutil.pid_exists, [one["pid"] for one in found]))


def whole_checkpoints(out):
    return list((out / "checkpoints").glob("checkpoint-*/complete.json"))


NOTEBOOK = """
import json
from univg_nb import runs
from univg_nb.launch import launcher, worker
job = json.load(open("job.json"))
stage = runs.start(SCALE, RUN_DIR).stage("sft_lora", 1)
if not stage.done:
    rows = worker.rows_of(job["rows"])
    stage.finish(**launcher.train("sft", job["config"], stage.dir, rows))
"""


def test_sigterm_to_the_runner_then_the_same_command_resumes_exactly(
    model_cfg, rows, tmp_path, monkeypatch
):
    """The signal goes runner, kernel, launcher, two processes; each waits for the
    checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    whole, config = tmp_path / "whole", scale(model_cfg, 2)
    (tmp_path / "notebooks").mkdir()
    write_job(tmp_path / "notebooks", "sft", config, whole, rows)
    launcher.train("sft", config, whole, rows)
    cells = [new_code_cell('SCALE = "smoke"\nRUN_DIR = ""'), new_code_cell(NOTEBOOK)]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = new_notebook(cells=cells)
    nbformat.write(notebook, tmp_path / "notebooks" / "00_a.ipynb")
    command = [sys.executable, "-m", "univg_nb", "run", "--scale", "smoke"]
    cut = tmp_path / "runs" / "smoke" / "sft_lora"

    process = subprocess.Popen(command)
    wait_for(lambda: updates(cut) >= 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 128 + signal.SIGTERM
    assert gone(cut, 0, 1)
    assert whole_checkpoints(cut) and not (cut / "summary.json").exists()
    assert io.read_json(cut / "stage.json")["status"] == "started"
    done = updates(cut)
    assert 2 <= done < 16
    subprocess.run(command, check=True)
    assert state(cut, 0)["first_step"] == done
    assert io.read_json(cut / "stage.json")["status"] == "finished"
    assert losses(cut) == losses(whole)
    assert adapter(cut) == adapter(whole)


def replies(out):
    groups = io.read_jsonl(out / "rollouts.jsonl")
    return [(group["sample_id"], group["replies"]) for group in groups]


def test_grpo_on_two_processes_equals_one_and_resumes_exactly_after_sigterm(
    model_cfg, rows, tmp_path
):
    """Sampled replies too: their random numbers do not depend on who draws them."""
    start, whole, cut = (tmp_path / name for name in ("start", "whole", "cut"))
    sft.train(scale(model_cfg, 0, max_steps=1), start, rows)
    config = {**scale(model_cfg, 2), "grpo": GRPO}
    options = {"sft_adapter": start / "adapter", "weight": "exp"}
    assert launcher.train("grpo", config, whole, rows, **options)["steps"] == 8
    assert state(whole, 1)["distributed_type"] == "MULTI_CPU"
    one = tmp_path / "one"
    grpo.train({**scale(model_cfg, 0), "grpo": GRPO}, one, rows, **options)
    keys = ("reward", "loss", "kl", "grad_norm", "groups/mean_iou")
    logged = [io.read_jsonl(out / "metrics.jsonl") for out in (whole, one)]
    assert logged[0][-1]["kl"] > 1e-6 and logged[0][-1]["grad_norm"] > 1e-6
    values = [[row[key] for row in log for key in keys] for log in logged]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert replies(whole) == replies(one)
    assert any(len(set(texts)) == 2 for _, texts in replies(one))  # not greedy

    assert 2 <= cut_off(tmp_path, "grpo", config, cut, rows, **options) < 8
    launcher.train("grpo", config, cut, rows, **options)
    assert replies(cut) == replies(whole)
    assert losses(cut) == losses(whole)
    assert adapter(cut) == adapter(whole)


def once(condition, action):
    """Does `action` in a thread when `condition` is true; and when it was done."""
    done = []

    def wait():
        wait_for(condition)
        action()
        done.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, done


@pytest.mark.parametrize("whose", ["a process", "the launcher"])
def test_a_killed_process_ends_the_run_and_is_named(whose, model_cfg, rows, tmp_path):
    config = scale(model_cfg, 2, num_train_epochs=400)

    def kill():
        victim = state(tmp_path, 1)["pid"]
        if whose == "the launcher":
            victim = psutil.Process(victim).ppid()
        os.kill(victim, signal.SIGKILL)

    thread, killed = once(lambda: updates(tmp_path), kill)
    said = {
        "a process": r"(?s)rank +: 1 .*Signal 9 .*out of memory\?",
        "the launcher": "the process ended with -9",
    }
    with pytest.raises(RuntimeError, match=said[whose]):
        launcher.train("sft", config, tmp_path, rows)
    assert time.monotonic() - killed[0] < 30
    thread.join()
    wait_for(lambda: gone(tmp_path, 0, 1), 60)
    assert not (tmp_path / "summary.json").exists()


def test_nobody_trains_on_when_the_notebook_was_killed(model_cfg, rows, tmp_path):
    config = scale(model_cfg, 2, num_train_epochs=400)
    out = tmp_path / "out"
    process = caller(tmp_path, "sft", config, out, rows)
    wait_for(lambda: updates(out))
    with pytest.raises(ValueError, match=f"out: .*, process {process.pid}, since"):
        launcher.train("sft", config, out, rows)
    process.kill()
    process.wait()
    wait_for(lambda: gone(out, 0, 1), 60)
    assert state(out, 0)["state"] == "interrupted" and whole_checkpoints(out)


def test_a_full_disk_is_named_and_the_same_call_goes_on(model_cfg, rows, tmp_path):
    """The disk fills up while checkpoints are written: none is half and counts."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    out, filler, failed = disk / "out", disk / "filler", threading.Event()

    def fill():
        with filler.open("ab", buffering=0) as file:
            while not failed.is_set():  # what a removed checkpoint frees, too
                with contextlib.suppress(OSError):
                    file.write(bytes(2**12))

    try:
        config = scale(model_cfg, 2, save_strategy="steps", save_steps=1)
        thread, _ = once(lambda: whole_checkpoints(out), fill)
        with pytest.raises(RuntimeError, match=r"[Nn]o space left"):
            try:
                launcher.train("sft", config, out, rows)
            finally:
                failed.set()
        thread.join()
        assert not (out / "summary.json").exists()
        assert gone(out, 0, 1)
        filler.unlink()
        assert launcher.train("sft", config, out, rows)["steps"] == 16
        assert state(out, 0)["first_step"] >= 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---------------------------------------------------------------- Slurm

SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node-1; else echo "$@" >> requeued; fi
"""
PATIENT = """
import pathlib, time
pathlib.Path("started").touch()
try:
    time.sleep(300)
except SystemExit:
    pathlib.Path("checkpoint").touch()
    raise
"""


SRUN = """#!/bin/bash
trap 'kill -KILL 0' TERM
while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & done
wait -n && wait -n
"""


def test_two_nodes_meet_stop_go_on_and_learn_what_one_process_does(
    model_cfg, rows, tmp_path, monkeypatch
):
    """torchrun's own rendezvous of two agents; a program in the place of srun starts
    both here. Like srun it kills them when it gets SIGTERM: the launcher must not send
    it, or there is no checkpoint (seen with Slurm 22.05)."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{srun.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    config = scale(model_cfg, 2)
    config["launch"] |= {"nodes": 2, "port": port}
    two, one = tmp_path / "two", tmp_path / "one"
    done = cut_off(tmp_path, "sft", config, two, rows, after=1)
    assert [state(two, rank)["state"] for rank in (0, 1)] == ["interrupted"] * 2
    assert 1 <= done < 16 and whole_checkpoints(two)
    assert launcher.train("sft", config, two, rows)["steps"] == 16
    found = state(two, 1)
    assert (found["world_size"], found["distributed_type"]) == (2, "MULTI_CPU")
    assert found["first_step"] == done
    sft.train(scale(model_cfg, 0), one, rows)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_slurm_job_saves_and_is_queued_again_unless_cancelled(tmp_path, sent):
    """SIGUSR1 is the time limit drawing near. scancel sends SIGTERM: a script that
    queued the job again then could not be cancelled. (Pre-emption sends SIGTERM too;
    Slurm itself queues such a job again.) The real script and runner; a program in
    Slurm's place notes the requeue."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv").symlink_to(sys.prefix)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(new_notebook(cells=[new_code_cell(PATIENT)]), folder / "00_a.ipynb")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(SCONTROL)
    scontrol.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-1",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    script = shutil.copy(ROOT / "univg_nb" / "scales" / "slurm.sh", tmp_path)
    process = subprocess.Popen(["bash", script, "smoke"], env=environment)
    wait_for((folder / "started").exists)
    process.send_signal(sent)
    assert process.wait(timeout=180) == 128 + signal.SIGTERM
    assert (folder / "checkpoint").exists()
    requeued = tmp_path / "requeued"
    if sent == signal.SIGUSR1:
        assert requeued.read_text() == "requeue 7\n"
    else:
        assert not requeued.exists()

"""Sweeps: which jobs a command line means, and a queue that runs them over GPUs.

A job is a child process `python -m univg_nb run` with one value for each parameter, its
own run folder, a log, and job.json: its command and its state (done, failed or
interrupted). The next call of the same command runs what is not done.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from univg_nb.io import read_json, write_json

RANGE = re.compile(r"(-?[0-9]+):(-?[0-9]+)")


def split_values(text: str, default: Any) -> list[str]:
    """Return the values that `-p NAME TEXT` lists.

    They are separated by commas, but for a [list] or a default that is one. START:STOP
    counts (STOP left out) where the default is an integer. Raises ValueError for an
    empty one.
    """
    counted = RANGE.fullmatch(text)
    if counted and type(default) is int:
        start, stop = map(int, counted.groups())
        if stop <= start:
            raise ValueError(f"{text}: an empty range; write START:STOP, as 0:3")
        return [str(value) for value in range(start, stop)]
    one = isinstance(default, (list, tuple)) or text.lstrip().startswith(("[", "{"))
    if "," not in text or one:
        return [text]
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise ValueError(f"{text!r}: an empty value between commas")
    return parts


def list_jobs(
    given: Mapping[str, str], defaults: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """Return a job for every combination of the listed values.

    A job is parameter -> text; its name tells what differs, as WEIGHT=exp_SEED=0. The
    notebooks' own values, `defaults`, decide what a text as typed can mean. Raises
    ValueError for an empty value, or one that is listed twice.
    """
    lists = {n: split_values(text, defaults.get(n)) for n, text in given.items()}
    if any(len(set(values)) < len(values) for values in lists.values()):
        raise ValueError("-p: a value is listed twice")
    jobs = {}
    for picked in itertools.product(*lists.values()):
        job = dict(zip(lists, picked, strict=True))
        name = "_".join(f"{n}={v}" for n, v in job.items() if len(lists[n]) > 1)
        jobs[re.sub(r"[^\w.=+-]", "-", name)] = job
    return jobs


def run_jobs(
    run_dir: Path,
    jobs: Mapping[str, Mapping[str, str]],
    command: list[str],
    slots: Sequence[str | None],
    fresh: bool,
) -> bool:
    """Run the jobs that are not done; return whether all are done then.

    `run_dir` holds their folders; a job starts with the stages that are finished in it,
    and runs `command` with its parameters. `slots` has the CUDA_VISIBLE_DEVICES (or
    None) of each job that may run at once; `fresh` runs the done ones again.
    """
    commands = {}
    for name, job in jobs.items():
        options = [part for pair in job.items() for part in ("-p", *pair)]
        commands[name] = [*command, "--run-dir", str(run_dir / name), *options]
    given = [{"CUDA_VISIBLE_DEVICES": gpus} if gpus else {} for gpus in slots]
    share = partial(share_stages, run_dir)
    return run_processes(run_dir, commands, given, fresh, prepare=share)


def run_processes(
    folder: Path,
    commands: Mapping[str, list[str]],
    slots: Sequence[Mapping[str, str]],
    fresh: bool = False,
    prepare: Callable[[Path], None] | None = None,
) -> bool:
    """Run the commands that are not done; return whether all are done then.

    An exception, as after Ctrl-C or SIGTERM, ends the processes as SIGTERM does.

    Args:
        folder: holds a folder for each name, with run.log and job.json.
        commands: what to run, by name.
        slots: for each process that may run at once, what its environment has more.
        fresh: run the done ones again.
        prepare: is called with the folder of a name before its process starts.
    """
    free, stopping = list(slots), threading.Event()
    running: list[subprocess.Popen] = []

    def work(name: str) -> bool:
        place, note = folder / name, folder / name / "job.json"
        done = {"command": commands[name], "state": "done"}
        if note.is_file() and read_json(note) == done and not fresh:
            return True
        if stopping.is_set():
            return False
        place.mkdir(parents=True, exist_ok=True)
        if prepare:
            prepare(place)
        slot, log, began = free.pop(), place / "run.log", time.monotonic()
        with log.open("ab") as output:
            process = subprocess.Popen(
                commands[name],
                env={**os.environ, **slot},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it through us, once
            )
        running.append(process)
        if stopping.is_set():  # since the job was started
            process.terminate()
        failed = process.wait() != 0
        free.append(slot)
        ended = "interrupted" if stopping.is_set() else "failed"
        state = ended if failed else "done"
        write_json(note, done | {"state": state})
        print(f"{name:<32} {state:<11} {time.monotonic() - began:8.1f} s", flush=True)
        if state == "failed":
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-15:]), f"\nlog: {log}", file=sys.stderr)
        return not failed

    with ThreadPoolExecutor(len(free)) as pool:
        try:
            return all(list(pool.map(work, commands)))
        finally:
            stopping.set()
            for process in running:
                process.terminate()


def share_stages(source: Path, target: Path) -> None:
    """Give a job the stages finished in `source`, as hard links.

    So weights are not copied. A stage of another configuration runs again in the job.
    """
    target.mkdir(parents=True, exist_ok=True)
    for marker in sorted(source.glob("*/stage.json")):
        copy = target / marker.parent.name
        if read_json(marker)["status"] == "finished" and not copy.exists():
            part = copy.with_name(f".{copy.name}.part")  # of a copy that was cut off
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(marker.parent, part, copy_function=os.link)
            part.replace(copy)

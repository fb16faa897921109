"""Sweeps: which jobs a command line means, and a queue that runs them over GPUs.

A job is a child process `python -m univg_nb run` with one value for each parameter, its
own run folder and log. RUN_DIR/queue.json holds their states: waiting, running, done,
failed, interrupted. The next call of the same command runs what is not done.
"""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from univg_nb.io import locked, read_json, write_json

RANGE = re.compile(r"(-?\d+):(-?\d+)")


def split_values(text: str, default: Any) -> list[str]:
    """Return the values that `-p NAME TEXT` lists.

    They are separated by commas, but for a default that is a list. START:STOP counts
    (STOP left out) where the default is an integer. Raises ValueError for an empty one.
    """
    counted = RANGE.fullmatch(text)
    if counted and type(default) is int:
        start, stop = map(int, counted.groups())
        if stop <= start:
            raise ValueError(f"{text}: an empty range; write START:STOP, as 0:3")
        return [str(value) for value in range(start, stop)]
    if "," not in text or isinstance(default, (list, tuple)):
        return [text]
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise ValueError(f"{text!r}: an empty value between commas")
    return parts


def combinations(
    given: Mapping[str, str], defaults: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Return one name -> text for every combination of the listed values.

    Args:
        given: parameter -> text as typed.
        defaults: the notebooks' own values, which decide what a text can mean.
    """
    lists = {n: split_values(text, defaults.get(n)) for n, text in given.items()}
    picked = itertools.product(*lists.values())
    return [dict(zip(lists, values, strict=True)) for values in picked]


def name_jobs(wanted: Sequence[dict[str, str]]) -> dict[str, dict[str, str]]:
    """Return the jobs by folder name: the values that differ, as WEIGHT=exp_SEED=0.

    Raises ValueError if a value is listed twice.
    """
    swept = [name for name in wanted[0] if len({one[name] for one in wanted}) > 1]
    jobs = {}
    for one in wanted:
        text = "_".join(f"{name}={one[name]}" for name in swept)
        jobs[re.sub(r"[^\w.=+-]", "-", text)] = one
    if len(jobs) < len(wanted):
        raise ValueError("-p: a value is listed twice")
    return jobs


class Queue:
    """The jobs of one run folder.

    Args:
        run_dir: the run folder; each job gets a folder in it.
        jobs: name -> parameters.
        command: what all jobs run.
        slots: for each job that may run at once, its CUDA_VISIBLE_DEVICES or None.
    """

    def __init__(
        self,
        run_dir: Path,
        jobs: Mapping[str, dict[str, str]],
        command: list[str],
        slots: Sequence[str | None],
    ) -> None:
        self.run_dir = run_dir
        self.file = run_dir / "queue.json"
        self.command = command
        self.slots = list(slots)
        self.jobs: dict[str, dict[str, Any]]
        self.jobs = {name: {"parameters": given} for name, given in jobs.items()}
        self.running: list[subprocess.Popen] = []
        self.stopped = 0  # the signal that ended the queue
        self.lock = threading.Lock()

    def run(self, fresh: bool = False) -> int:
        """Run what is not done; 0 all done, 1 one failed, 128 + n ended by signal n."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        handlers = {number: signal.signal(number, self._stop) for number in numbers}
        busy = f"{self.run_dir}: another call works on this queue; wait for it to end"
        with locked(self.run_dir / ".queue.lock", busy):
            old = read_json(self.file) if self.file.is_file() and not fresh else {}
            known = old.get("jobs", {}) if old.get("command") == self.command else {}
            for name, job in self.jobs.items():
                done = known.get(name, {}).get("state") == "done"
                job |= known[name] if done else {"state": "waiting"}
            todo = [name for name, job in self.jobs.items() if job["state"] != "done"]
            with ThreadPoolExecutor(len(self.slots)) as pool:
                list(pool.map(self._work, todo))
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if self.stopped:
            return 128 + self.stopped
        return int(any(job["state"] != "done" for job in self.jobs.values()))

    def _set(self, name: str, state: str, **facts: Any) -> None:
        """Change a job's state, on disk and on the screen."""
        with self.lock:
            self.jobs[name] |= {"state": state, **facts}
            write_json(self.file, {"command": self.command, "jobs": self.jobs})
            done = sum(job["state"] == "done" for job in self.jobs.values())
            print(f"{done}/{len(self.jobs)} {name:<32} {state}", flush=True)

    def _work(self, name: str) -> None:
        """Run one job to its end, on what is finished in the run folder itself."""
        if self.stopped:
            return
        folder, gpus, began = self.run_dir / name, self.slots.pop(), time.monotonic()
        share_stages(self.run_dir, folder)
        given = self.jobs[name]["parameters"].items()
        options = [part for key, value in given for part in ("-p", key, value)]
        visible = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
        log = folder / "run.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self.command, "--run-dir", str(folder), *options],
                env={**os.environ, **visible},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it through us, once
            )
        self.running.append(process)
        self._set(name, "running", gpus=gpus, log=str(log))
        if self.stopped:  # the signal came while the job was started
            process.terminate()
        code = process.wait()
        self.slots.append(gpus)
        state = "done" if code == 0 else "interrupted" if self.stopped else "failed"
        seconds = round(time.monotonic() - began, 1)
        self._set(name, state, exit_code=code, seconds=seconds)
        if state == "failed":
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-15:]), f"\nlog: {log}", file=sys.stderr)

    def _stop(self, number: int, _: Any = None) -> None:
        """Signal handler: start no more jobs, and tell the running ones to end."""
        self.stopped = number
        for process in self.running:
            process.terminate()


def share_stages(source: Path, target: Path) -> None:
    """Give a job the stages finished in `source`, as hard links.

    A stage whose configuration differs in the job runs again there.
    """
    target.mkdir(parents=True, exist_ok=True)
    for marker in sorted(source.glob("*/stage.json")):
        copy = target / marker.parent.name
        if read_json(marker)["status"] == "finished" and not copy.exists():
            shutil.copytree(marker.parent, copy, copy_function=os.link)

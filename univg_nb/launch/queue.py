"""Sweeps: which jobs a command line means, and a queue that runs them over GPUs.

A job is a child `run_notebooks` with one value for each parameter, its own run folder
and log. RUN_DIR/queue.json holds all states (waiting, running, done, failed) and how
far each job is; a call that was killed leaves `running` there, which the next one takes
for interrupted. What is done is not run again. RUN_DIR/manifest.json lists what ended.
"""

import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from univg_nb.io import read_json, write_json
from univg_nb.runs import record_stage

RANGE = re.compile(r"(-?\d+):(-?\d+)$")
LOOK = 5.0  # seconds between two looks at how far the jobs are
OPENING, CLOSING, QUOTES = "([{", ")]}", "'\""


def values_of(text: str, default: Any) -> list[str]:
    """The values that `-p NAME TEXT` lists: split at commas outside brackets and
    quotes; START:STOP counts (STOP left out) where the default is an integer."""
    counted = RANGE.match(text)
    if counted and type(default) is int:
        start, stop = map(int, counted.groups())
        if stop <= start:
            raise ValueError(f"{text}: an empty range; write START:STOP, as 0:3")
        return [str(value) for value in range(start, stop)]
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in QUOTES:
            quote = letter
        depth += (letter in OPENING) - (letter in CLOSING) if not quote else 0
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    if len(parts) == 1:
        return [text]
    parts = [part.strip() for part in parts]
    if "" in parts:
        raise ValueError(f"{text!r}: an empty value between commas")
    return [part.strip(QUOTES) for part in parts]


def combinations(
    given: dict[str, str], defaults: dict[str, Any]
) -> list[dict[str, str]]:
    """One name -> text for every combination of the listed values.

    defaults: the notebooks' own values, which say what a text can mean.
    """
    lists = {name: values_of(text, defaults.get(name)) for name, text in given.items()}
    return [
        dict(zip(lists, picked, strict=True))
        for picked in itertools.product(*lists.values())
    ]


def job_name(parameters: dict[str, str], swept: Sequence[str]) -> str:
    """Folder name of a job: the values that differ, as WEIGHT=exp_SEED=0."""
    text = "_".join(f"{name}={parameters[name]}" for name in swept)
    return re.sub(r"[^\w.=+-]", "-", text)


@dataclass
class Job:
    """One job at work: its child process, its GPUs, when it began."""

    name: str
    process: subprocess.Popen
    gpus: str | None
    began: float


class Queue:
    """Jobs of one run folder. jobs: name -> parameters; command: what they all run.

    slots: for each job that may run at once, its CUDA_VISIBLE_DEVICES (None: as is).
    """

    def __init__(
        self,
        run_dir: Path,
        jobs: dict[str, dict[str, str]],
        command: list[str],
        slots: Sequence[str | None],
    ) -> None:
        self.run_dir = run_dir
        self.file = run_dir / "queue.json"
        self.command = command
        self.free = list(slots)
        self.at_work: list[Job] = []
        self.stopped = 0
        self.looked = 0.0
        self.given = jobs

    def load(self, fresh: bool) -> None:
        """States of an earlier call of the same command; the rest waits."""
        old = read_json(self.file) if self.file.is_file() else {}
        known = old.get("jobs", {}) if old.get("command") == self.command else {}
        self.jobs = {}
        for name, parameters in self.given.items():
            found = known.get(name, {})
            if fresh or found.get("state") != "done":
                found = {"state": "waiting"}
            log = str(self.run_dir / name / "run.log")
            self.jobs[name] = {**found, "parameters": parameters, "log": log}
        self.save()

    def save(self) -> None:
        """Write all states; the old or the new file is whole at any time."""
        write_json(self.file, {"command": self.command, "jobs": self.jobs})

    def set(self, name: str, state: str, **facts: Any) -> None:
        """Change a job's state, on disk and on the screen."""
        self.jobs[name] |= {"state": state, **facts}
        self.save()
        done = sum(job["state"] == "done" for job in self.jobs.values())
        took = f"{facts['seconds']:8.1f} s" if "seconds" in facts else ""
        print(f"{done}/{len(self.jobs)} {name:<32} {state:<11}{took}", flush=True)

    def start(self, name: str) -> None:
        """Start a job, on what is finished in the run folder itself."""
        folder, gpus = self.run_dir / name, self.free.pop(0)
        share_stages(self.run_dir, folder)
        given = self.jobs[name]["parameters"].items()
        options = [part for key, value in given for part in ("-p", key, value)]
        environment = dict(os.environ)
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        with open(self.jobs[name]["log"], "ab") as log:
            process = subprocess.Popen(
                [*self.command, "--run-dir", str(folder), *options],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it through us, once
            )
        self.at_work.append(Job(name, process, gpus, time.monotonic()))
        self.set(name, "running", gpus=gpus, pid=process.pid)

    def collect(self) -> None:
        """Take note of jobs that have ended."""
        for job in list(self.at_work):
            code = job.process.poll()
            if code is None:
                continue
            self.at_work.remove(job)
            self.free.append(job.gpus)
            state = "done" if code == 0 else "failed"
            if self.stopped and code:
                state = "interrupted"
            seconds = round(time.monotonic() - job.began, 1)
            manifest = self.run_dir / job.name / "manifest.json"
            ran = read_json(manifest).get("notebooks", {}) if manifest.is_file() else {}
            facts = {"exit_code": code, "seconds": seconds, "notebooks": ran}
            self.set(job.name, state, **facts)
            known = {"state": state, "exit_code": code, "gpus": job.gpus}
            known["parameters"] = self.jobs[job.name]["parameters"]
            record_stage(self.run_dir, job.name, seconds, group="jobs", **known)
            if state == "failed":
                log = Path(self.jobs[job.name]["log"])
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                print("\n".join(lines[-15:]), f"\nlog: {log}", file=sys.stderr)

    def look(self) -> None:
        """How far the jobs at work are: on disk, and on a terminal in its last line."""
        self.looked, line = time.monotonic(), []
        for job in self.at_work:
            made = progress(self.run_dir / job.name)
            if made and made != self.jobs[job.name].get("progress"):
                self.jobs[job.name]["progress"] = made
                self.save()
            line.append(f"{job.name}: {self.jobs[job.name].get('progress', '')}")
        if line and sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"{'; '.join(line)[:width]:<{width}}", end="\r", flush=True)

    def stop(self, number: int, _: Any = None) -> None:
        """Signal handler: no job starts any more, those at work are told to end."""
        self.stopped = number
        for job in self.at_work:
            if job.process.poll() is None:
                job.process.terminate()

    def run(self, fresh: bool = False) -> int:
        """Run what is not done; 0 all done, 1 one failed, 128 + n ended by signal n."""
        before = [
            (number, signal.signal(number, self.stop))
            for number in (signal.SIGTERM, signal.SIGINT)
        ]
        with locked(self.run_dir):
            self.load(fresh)
            todo = [n for n, job in self.jobs.items() if job["state"] != "done"]
            while self.at_work or (todo and not self.stopped):
                while todo and self.free and not self.stopped:
                    self.start(todo.pop(0))
                time.sleep(0.1)
                self.collect()
                if time.monotonic() - self.looked > LOOK:
                    self.look()
        for number, handler in before:
            signal.signal(number, handler)
        if self.stopped:
            return 128 + self.stopped
        return int(any(job["state"] != "done" for job in self.jobs.values()))


def progress(folder: Path) -> str:
    """How far a job is, as "03_cot_sft_lora, cell 5/20", from the executed copy that
    papermill writes after each cell; "" before the first, or while it is written."""
    copies = sorted((folder / "notebooks").glob("*.ipynb"), key=os.path.getmtime)
    try:
        cells = json.loads(copies[-1].read_text(encoding="utf-8"))["cells"]
    except (IndexError, json.JSONDecodeError):
        return ""
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    ran = sum(cell["execution_count"] is not None for cell in cells)
    return f"{copies[-1].stem}, cell {ran}/{len(cells)}"


def share_stages(source: Path, target: Path) -> None:
    """Give a job the stages finished in `source`, as hard links: no second copy of
    weights. A stage whose configuration differs there is made anew, as ever."""
    target.mkdir(parents=True, exist_ok=True)
    for marker in sorted(source.glob("*/stage.json")):
        aim = target / marker.parent.name
        if read_json(marker)["status"] == "finished" and not aim.exists():
            shutil.copytree(marker.parent, aim, copy_function=os.link)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder; ValueError if another call of the queue does."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".queue.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{run_dir}: another call works on this queue; wait for it to end"
            ) from error
        yield

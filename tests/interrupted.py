"""A training in its own process that a signal ends at a chosen place.

    python interrupted.py JOB.json

The process sends itself the signal when the trainer calls `method` for the `at`-th
time, before the method does anything, so the test knows what was interrupted.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from univg_nb.data.sample import GroundingSample
from univg_nb.train import grpo, sft
from univg_nb.train.grpo_trainer import DifficultyGRPOTrainer
from univg_nb.train.sft import GroundingSFTTrainer

STAGES = {
    "sft": (sft.train, GroundingSFTTrainer),
    "grpo": (grpo.train, DifficultyGRPOTrainer),
}


def killed(folder: Path, stage: str, config: dict, rows, out: Path, **job) -> int:
    """Run the training in a child until its signal; return the child's exit code."""
    rows = [dataclasses.asdict(row) for row in rows]
    path = folder / "job.json"
    text = json.dumps(
        {"stage": stage, "config": config, "rows": rows, "out": str(out), **job}
    )
    path.write_text(text)
    root = str(Path(sft.__file__).parents[2])
    return subprocess.run(
        [sys.executable, __file__, str(path)], env={**os.environ, "PYTHONPATH": root}
    ).returncode


HOLDER = """
import sys, time
from univg_nb import io
with io.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(300)
"""


@contextmanager
def held_by_another_process(path):
    """Yield the id of a process that works on `path` until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process.pid
    process.kill()
    process.wait()


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    train, trainer = STAGES[job["stage"]]
    original, calls = getattr(trainer, job["method"]), []

    def cut(*args, **kwargs):
        calls.append(1)
        if len(calls) == job["at"]:
            os.kill(os.getpid(), getattr(signal, job["signal"]))
        return original(*args, **kwargs)

    setattr(trainer, job["method"], cut)
    for row in job["rows"]:
        row |= {key: tuple(row[key]) for key in ("images", "answer", "boxes")}
    rows = [GroundingSample(**row) for row in job["rows"]]
    train(job["config"], job["out"], rows, **job["options"])


if __name__ == "__main__":
    main(sys.argv[1])

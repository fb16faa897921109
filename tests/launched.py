"""What the tests of launched trainings share: a small one, and a process that starts it
as a notebook does."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from univg_nb import io
from univg_nb.data.sample import GroundingSample
from univg_nb.launch import launcher

ROOT = Path(launcher.__file__).parents[2]

CALL = """
import json, signal, sys
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
from univg_nb.launch import launcher, worker
job = json.load(open(sys.argv[1]))
rows = worker.rows_of(job["rows"])
launcher.train(job["stage"], job["config"], job["out"], rows, **job["options"])
"""


def make_rows(folder):
    """Sixteen samples with a picture each."""
    made = []
    for i in range(16):
        path = folder / f"{i}.png"
        Image.new("RGB", (64, 64), (15 * i, 200, 90)).save(path)
        box = (10 * i, 100, 10 * i + 400, 700)
        made.append(
            GroundingSample(f"s{i}", "toy", (str(path),), "Find it.", box, chain="It.")
        )
    return made


def scale(model_cfg, processes, strategy="ddp", **options):
    """Four samples an update, however many processes; 16 updates. 0 processes: no
    launch section."""
    section = {
        "adapter": "lora",
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    made = {"model": model_cfg, "data": {}, "sft": {**section, **options}}
    if processes:
        made["launch"] = {
            "strategy": strategy if processes > 1 else "single",
            "processes": processes,
            "written_for": 1,
        }
    return made


def losses(out):
    return [row["loss"] for row in io.read_jsonl(out / "metrics.jsonl")]


def adapter(out):
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def updates(out):
    """How many updates are on record."""
    path = out / "metrics.jsonl"
    return len(io.read_jsonl(path)) if path.is_file() else 0


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def write_job(folder, stage, config, out, rows, **options):
    """The call of launcher.train as a file, job.json."""
    job = folder / "job.json"
    rows = [asdict(row) for row in rows]
    text = {"stage": stage, "config": config, "out": str(out), "rows": rows}
    job.write_text(json.dumps({**text, "options": options}, default=str))
    return job


# No reply of these models has a box: the weight decay is what parts the policy from the
# reference, so that there is a KL to learn from.
GRPO = {
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 6,
    "max_steps": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "weight_decay": 100.0,
    "adam_epsilon": 1e-4,  # else Adam steps by the rounding of a gradient of 0
    "save_strategy": "no",
    "seed": 3,
}


def caller(folder, *arguments, **options):
    """A process of its own that calls launcher.train, as a kernel does."""
    job = write_job(folder, *arguments, **options)
    return subprocess.Popen(
        [sys.executable, "-c", CALL, str(job)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def cut_off(folder, stage, config, out, rows, after=2, **options):
    """A training ended by SIGTERM to its caller when `after` updates are on record;
    how many it had made."""
    process = caller(folder, stage, config, out, rows, **options)
    wait_for(lambda: updates(out) >= after)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 128 + signal.SIGTERM
    assert not (out / "summary.json").exists()
    return updates(out)

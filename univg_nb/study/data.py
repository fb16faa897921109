"""What the reference trainings learn from: questions, a test, two kinds of chains."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import benchmarks
from univg_nb.evaluate.benchmarks import Benchmark
from univg_nb.minimig import export
from univg_nb.runs import Run
from univg_nb.train import sft

HASTY = "I see it."  # a chain that says nothing

Data = tuple[list[GroundingSample], Benchmark]  # questions of stage 2, and the test


def read_run_data(run: Run) -> Data:
    """Read the run's questions of stage 2 and its benchmark."""
    file, root = benchmarks.find_files(run)["stage2"], benchmarks.get_image_root(run)
    rows = files.read(file, image_root=root)[: run.config["data"].get("stage2")]
    return rows, benchmarks.load_benchmark(run, "mig")


def draw_data(run: Run, name: str, questions: int, per_task: int, chains: int) -> Data:
    """Draw data of MiniMIG in the stage `name`; those of the run are among them.

    No scene is in two of the three parts: `questions` for stage 2, `per_task` test
    items of each task, and as many `chains` for a stage 1.
    """
    sizes = dict.fromkeys(export.SIZES, 0)
    sizes |= {"stage1": chains, "stage2": questions, "test_per_task": per_task}
    stage = run.stage(name, {"sizes": sizes, "seed": run.seed})
    if not stage.done:
        export.build(stage.dir, sizes, run.seed)
        stage.finish()
    rows = files.read(stage.dir / "stage2_rl.json", image_root=stage.dir)
    return rows, Benchmark.read(stage.dir / "mig_bench.json", stage.dir, "mig")


def replace_chains(
    rows: Sequence[GroundingSample], share: float, seed: int
) -> list[GroundingSample]:
    """Return the rows, of which a share has the chain "I see it.".

    As of two people, one of whom reasons: rewards tell which is better. That is one
    coarse thing to learn, where details drown in the noise of sampled replies.

    Raises:
        ValueError: for a share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share} of hasty chains: give a number from 0 to 1")
    drawn = np.random.default_rng(seed).random(len(rows)) < share  # (rows,)
    pairs = zip(rows, drawn, strict=True)
    return [replace(row, chain=HASTY) if chosen else row for row, chosen in pairs]


def has_reasoning(reply: str) -> bool:
    """Return whether a reply does more than say that it sees the thing."""
    return HASTY not in reply


def train_start(run: Run, folder: str, data: str, share: float) -> str:
    """Train stage 1 on the chains of the stage `data`; return the name of its stage.

    A `share` of the chains says nothing.
    """
    name = f"{folder}/start"
    settings = {"model": run.config["model"], "sft": run.config["sft"], "hasty": share}
    stage = run.stage(name, settings, needs=[data])
    if not stage.done:
        drawn = run.dir / data
        rows = files.read(drawn / "stage1_cotsft.json", image_root=drawn)
        chosen = replace_chains(rows, share, run.seed)
        stage.finish(**sft.train(run.config, stage.dir, chosen))
    return name

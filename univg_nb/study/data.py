"""What the reference trainings learn from: the data of a run, or more of MiniMIG, and a
stage 1 whose chains can go either way."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from univg_nb import runs
from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import benchmarks
from univg_nb.evaluate.benchmarks import Benchmark
from univg_nb.io import sha256_of
from univg_nb.minimig import export
from univg_nb.train import sft

HASTY = "I see it."  # a chain that says nothing


def own(run: runs.Run) -> tuple[list[GroundingSample], Benchmark]:
    """The run's questions of stage 2 and its benchmark."""
    file, root = benchmarks.find_files(run)["stage2"], benchmarks.get_image_root(run)
    rows = files.read(file, image_root=root)[: run.config["data"].get("stage2")]
    return rows, benchmarks.load_benchmark(run, "mig")


def more_of_minimig(
    run: runs.Run, name: str, questions: int, per_task: int, chains: int = 0
) -> tuple[list[GroundingSample], Benchmark]:
    """`questions` of the ten tasks for stage 2 and `per_task` test items of each, drawn
    in the stage `name`, with as many `chains` for a stage 1; those of a MiniMIG run are
    among them. No scene is in two of the three."""
    sizes = dict.fromkeys(export.SIZES, 0)
    sizes |= {"stage1": chains, "stage2": questions, "test_per_task": per_task}
    stage = run.stage(name, {"sizes": sizes, "seed": run.seed})
    if not stage.done:
        export.build(stage.dir, sizes, run.seed)
        stage.finish()
    test = stage.dir / "mig_bench.json"
    items = files.read(test, image_root=stage.dir)
    rows = files.read(stage.dir / "stage2_rl.json", image_root=stage.dir)
    return rows, Benchmark(test, items, sha256_of(test), "mig")


def hasty(
    rows: Sequence[GroundingSample], share: float, seed: int
) -> list[GroundingSample]:
    """The rows, of which a `share` drawn by `seed` has the chain "I see it.".

    As if two people had written the chains, one who thinks and one who does not; the
    boxes of both are right. A model of both does either, and rewards tell which is
    better: one coarse thing to learn, where the many details of what to look at drown
    in the noise of sampled replies. Raises ValueError for a share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share} of hasty chains: give a number from 0 to 1")
    drawn = np.random.default_rng(seed).random(len(rows)) < share  # (rows,)
    return [
        replace(row, chain=HASTY) if chosen else row
        for row, chosen in zip(rows, drawn, strict=True)
    ]


def thinks(reply: str) -> bool:
    """Whether a reply does more than say that it sees the thing."""
    return HASTY not in reply


def hasty_start(run: runs.Run, folder: str, data: str, share: float) -> str:
    """Trains stage 1 on the chains of the stage `data`, a `share` of them hasty;
    returns the name of its stage."""
    name = f"{folder}/start"
    settings = {"model": run.config["model"], "sft": run.config["sft"], "hasty": share}
    stage = run.stage(name, settings, needs=[data])
    if not stage.done:
        drawn = run.dir / data
        rows = files.read(drawn / "stage1_cotsft.json", image_root=drawn)
        summary = sft.train(run.config, stage.dir, hasty(rows, share, run.seed))
        stage.finish(**summary)
    return name

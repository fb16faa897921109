"""Settings of a stage tried on validation items: how large a step, how many.

    python -m univg_nb.sweep sft --grid sft.learning_rate=2e-3,4e-3
    python -m univg_nb.sweep grpo --grid grpo.learning_rate=1e-4,3e-4 --per-task 10

Every point of the grid is trained from the data (grpo: from the SFT stage) of a run and
answers validation items greedily and with sampled replies; the test is never looked at.
Written, and added to by later calls: notebooks/reference_runs/sweep_STAGE_SCALE.json.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from univg_nb import benchmarks, grpo, reference, runs, samples, sft, statistics
from univg_nb.benchmarks import Benchmark
from univg_nb.minimig import export
from univg_nb.predictions import sha256_of
from univg_nb.reference_tables import MEASURES


def points(grids: Sequence[str]) -> list[list[str]]:
    """["a.b=1,2", "c.d=3"] -> [["a.b=1", "c.d=3"], ["a.b=2", "c.d=3"]].

    Raises ValueError for a grid without a value.
    """
    axes = []
    for grid in grids:
        key, _, values = grid.partition("=")
        if not values:
            raise ValueError(f"--grid {grid!r}: write SECTION.KEY=VALUE,VALUE,...")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [list(point) for point in product(*axes)]


def validation(run: runs.Run, per_task: int) -> Benchmark:
    """Validation items of MiniMIG, drawn below the run's folder."""
    folder = run.dir / "validation" / str(per_task)
    file = folder / "validation.json"
    if not file.is_file():
        export.validation(folder, per_task, run.seed)
    items = samples.read(file, image_root=folder)
    return Benchmark("validation", file, items, sha256_of(file))


def train_point(
    run: runs.Run, stage: str, start: str, changes: list[str]
) -> runs.Stage:
    """The stage sweep/STAGE/NAME of the run, trained now if it is not there."""
    config = run.config
    for change in changes:
        config = runs.override(config, change)
    name = "_".join(changes).replace("/", "-") or "as_the_scale"
    settings = {key: config[key] for key in ("model", "data", stage)}
    needs = ["data", start] if stage == "grpo" else ["data"]
    trained = run.stage(f"sweep/{stage}/{name}", settings, needs=needs)
    if trained.done:
        return trained
    key = "stage1" if stage == "sft" else "stage2"
    file, root = benchmarks.files(run)[key], benchmarks.image_root(run)
    rows = samples.read(file, image_root=root)[: config["data"].get(key)]
    if stage == "sft":
        trained.finish(**sft.train(config, trained.dir, rows))
        return trained
    before = runs.load_scale(run.dir / start / "config.yaml")["sft"]
    whole = config | {"sft": before}
    adapter = run.dir / start / "adapter"
    trained.finish(**grpo.train(whole, trained.dir, rows, sft_adapter=adapter))
    return trained


def answers(
    run: runs.Run, bench: Benchmark, trained: Path, folder: Path
) -> dict[str, list[float]]:
    """Measures per item of the adapter in the stage folder `trained`, on weights as
    rounded as those it was trained on; the replies are kept in `folder`."""
    four_bit = runs.load_scale(trained / "config.yaml")["sft"]["adapter"] == "qlora"
    found = reference.evaluate_one(run, bench, trained / "adapter", folder, four_bit)
    return {measure: found[measure] for measure in MEASURES}


def gain(after: Sequence[float], before: Sequence[float]) -> dict[str, float]:
    """after - before, paired by item: mean difference and 95 % interval."""
    made = statistics.paired_bootstrap(np.array(after), np.array(before))
    return {key: round(made[key], 4) for key in ("mean_diff", "lo", "hi")}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m univg_nb.sweep")
    parser.add_argument("stage", choices=("sft", "grpo"))
    parser.add_argument("--scale", default="tiny")
    parser.add_argument("--run-dir", default="", help="default runs/SCALE")
    parser.add_argument(
        "--start", default="sft_lora", help="stage that GRPO starts from"
    )
    parser.add_argument("--per-task", type=int, default=20, help="validation items")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=V,V,...")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    typed = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(typed)
    run = runs.start(options.scale, options.run_dir)
    bench = validation(run, options.per_task)
    out = runs.repo_root() / "notebooks" / "reference_runs"
    out = out / f"sweep_{options.stage}_{Path(options.scale).stem}.json"
    rows = runs.read_json(out)["rows"] if out.is_file() else []
    before = None
    if options.stage == "grpo":
        folder = run.dir / "sweep" / options.start
        before = answers(run, bench, run.dir / options.start, folder)
    for point in points(options.grid):
        trained = train_point(run, options.stage, options.start, options.set + point)
        found = answers(run, bench, trained.dir, trained.dir)
        row = {"options": options.set + point, "stage": trained.hash}
        row |= {key: round(float(np.mean(v)), 4) for key, v in found.items()}
        if before is not None:
            row |= {f"{k}_gain": gain(found[k], before[k]) for k in found}
        row |= {"seconds": trained.results.get("seconds"), "items": len(bench.items)}
        row |= {"device": runs.device(), "command": " ".join(typed)}
        rows = [old for old in rows if old["stage"] != trained.hash] + [row]
        runs.write_json(out, {"validation_sha256": bench.sha256, "rows": rows})
        print(row, flush=True)


if __name__ == "__main__":
    main()

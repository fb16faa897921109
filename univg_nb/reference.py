"""Is it the difficulty, or only the size of the step? Several seeds of GRPO, compared.

    python -m univg_nb.reference --scale tiny --seeds 0 1 2
    python -m univg_nb.reference --name long_tiny --methods exp --seeds 0 \\
        --questions 6400 --per-task 200 --replies 2 --set grpo.max_steps=250 \\
        --set grpo.learning_rate=1e-4 --set grpo.norm_learning_rate=null \\
        --set grpo.temperature=0.5 --set grpo.scale_rewards=none

From the SFT stage of a run, for every seed: GRPO without a weight, with e^(1-m), with
e^(1-m) divided by its mean, and with a constant that makes the whole update as large as
e^(1-m) does. Long: as many trainings as seeds times four. Finished trainings and
replies are loaded, so the command can be repeated after an interruption.

--questions and --per-task draw more of MiniMIG than the run has: a long training would
see few questions too often, and few items would not show a small gain.

Every model answers the benchmark greedily and with sampled replies. Written:
notebooks/reference_runs/NAME.json; notebook 06 draws weights_SCALE.json.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from univg_nb import benchmarks, grpo, models, runs, samples, scoring, statistics
from univg_nb.benchmarks import Benchmark
from univg_nb.generation import generate
from univg_nb.minimig import export
from univg_nb.predictions import sha256_of
from univg_nb.rows import GroundingSample

METHODS: dict[str, dict[str, Any]] = {
    "none": {"weight": "none"},
    "exp": {"weight": "exp"},
    "exp_unit_mean": {"weight": "exp", "unit_mean": True},
    "constant": {"weight": "constant"},  # its value comes from the exp run
}
SFT = "sft"  # where every training starts
PAIRS = (
    ("none", SFT),
    ("exp", SFT),
    ("exp", "none"),
    ("exp", "constant"),
    ("exp", "exp_unit_mean"),
    ("exp_unit_mean", "none"),
    ("constant", "none"),
)
# Student's t, 97.5 %, for 1 to 9 degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def fair_constant(rows: Sequence[Mapping[str, Any]]) -> float:
    """The constant weight whose update is as large as that of these weighted groups.

    rows: of rollouts.jsonl. Silent groups have a weight but no part in the update, so
    each group counts by its mean |A|: c = sum(phi |A|) / sum(|A|).
    """
    sizes = [float(np.abs(row["advantages"]).mean()) for row in rows]
    if not sum(sizes):
        raise ValueError("every group is silent: no constant does what the weights do")
    weights = [row["weight"] for row in rows]
    return float(np.dot(sizes, weights) / sum(sizes))


def over_seeds_and_items(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """a - b of two methods, (seeds, items) each, with two paired 95 % intervals.

    items: chance of the items drawn, for the mean of these very trainings (bootstrap).
    seeds: chance of the training, from the differences of the seeds (Student's t);
    None for one seed.
    """
    difference = a - b
    by_seed = difference.mean(axis=1)  # (seeds,)
    over_items = statistics.paired_bootstrap(a.mean(axis=0), b.mean(axis=0))
    over_seeds = None
    count = len(by_seed)
    if count > 1:
        half = T_975[count - 2] * by_seed.std(ddof=1) / math.sqrt(count)
        over_seeds = [float(by_seed.mean() - half), float(by_seed.mean() + half)]
    return {
        "mean_diff": float(difference.mean()),
        "by_seed": by_seed.tolist(),
        "items_95": [over_items["lo"], over_items["hi"]],
        "seeds_95": over_seeds,
    }


def own_data(run: runs.Run) -> tuple[list[GroundingSample], Benchmark]:
    """The run's questions of stage 2 and its benchmark."""
    file, root = benchmarks.files(run)["stage2"], benchmarks.image_root(run)
    rows = samples.read(file, image_root=root)[: run.config["data"].get("stage2")]
    return rows, benchmarks.load(run, "mig")


def more_of_minimig(
    run: runs.Run, name: str, questions: int, per_task: int
) -> tuple[list[GroundingSample], Benchmark]:
    """`questions` of the ten tasks for stage 2 and `per_task` test items of each, drawn
    in the stage `name`; those of a MiniMIG run are among them. No scene is in both."""
    sizes = dict.fromkeys(export.SIZES, 0)
    sizes |= {"stage2": questions, "test_per_task": per_task}
    stage = run.stage(name, {"sizes": sizes, "seed": run.seed})
    if not stage.done:
        export.build(stage.dir, sizes, run.seed)
        stage.finish()
    test = stage.dir / "mig_bench.json"
    items = samples.read(test, image_root=stage.dir)
    rows = samples.read(stage.dir / "stage2_rl.json", image_root=stage.dir)
    return rows, Benchmark("mig", test, items, sha256_of(test))


def train_one(
    run: runs.Run,
    method: str,
    seed: int,
    rows: Sequence[GroundingSample],
    needs: Sequence[str],
    folder: str,
) -> runs.Stage:
    """The stage FOLDER/METHOD_SEED, trained on `rows` now if it is not there.

    needs: the stages that made the rows and the model it starts from.
    """
    section = {**run.config["grpo"], **METHODS[method], "seed": seed}
    if method == "constant":
        exp = run.dir / folder / f"exp_{seed}" / "rollouts.jsonl"
        section["constant"] = fair_constant(runs.read_jsonl(exp))
    settings = {"model": run.config["model"], "grpo": section}
    stage = run.stage(f"{folder}/{method}_{seed}", settings, needs=needs)
    if not stage.done:
        sft = run.dir / needs[-1]
        before = runs.load_scale(sft / "config.yaml")["sft"]
        summary = grpo.train(
            run.config | {"grpo": section, "sft": before},
            stage.dir,
            rows,
            sft_adapter=sft / "adapter",
        )
        stage.finish(**summary)
    return stage


def evaluate_one(
    run: runs.Run,
    bench: Benchmark,
    adapter: Path,
    folder: Path,
    four_bit: bool,
    replies: int = 8,
) -> dict[str, list[float]]:
    """Per item: greedy IoU and hit, mean IoU of as many sampled `replies`; all are kept
    in `folder`. four_bit: the adapter was trained on NF4 weights."""
    model, processor = models.load(
        run.config["model"],
        adapter,
        quantize="nf4" if four_bit else None,
        merge=not four_bit,
    )
    section = run.config["evaluate"]
    ways = {
        "greedy": {},
        "sampled": {"temperature": 1.0, "num_return_sequences": replies},
    }
    for name, way in ways.items():
        path = folder / f"{name}.jsonl"
        generate(model.eval(), processor, bench.items, path, **section, **way)
    greedy = scoring.score_items(
        bench.items, scoring.read_predictions(folder / "greedy.jsonl")
    )
    sampled = scoring.read_predictions(folder / "sampled.jsonl")
    ious = [
        [
            one.iou
            for one in scoring.score_items(
                bench.items, {i: [made[k]] for i, made in sampled.items()}
            )
        ]
        for k in range(replies)
    ]  # (replies, items)
    return {
        "greedy_iou": [round(one.iou, 4) for one in greedy],
        "hit": [float(one.iou >= 0.5) for one in greedy],
        "expected_iou": np.mean(ious, axis=0).round(4).tolist(),
    }


def compare(results: Mapping[str, Mapping[int, Mapping[str, list[float]]]]) -> dict:
    """{"exp - none": {measure: over_seeds_and_items()}, ...} from
    results[method][seed][measure], one value per item; pairs of methods at hand."""
    made = {}
    for first, second in PAIRS:
        if not {first, second} <= results.keys():
            continue
        pair = [list(results[method].values()) for method in (first, second)]
        made[f"{first} - {second}"] = {
            measure: over_seeds_and_items(
                *(np.array([seed[measure] for seed in seeds]) for seeds in pair)
            )
            for measure in ("expected_iou", "greedy_iou", "hit")
        }
    return made


def means(
    results: Mapping[str, Mapping[int, Mapping[str, list[float]]]],
) -> dict[str, dict[str, list[float]]]:
    """{method: {measure: mean over the items, one a seed}}."""
    return {
        method: {
            measure: [float(np.mean(one[measure])) for one in seeds.values()]
            for measure in ("expected_iou", "greedy_iou", "hit")
        }
        for method, seeds in results.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m univg_nb.reference")
    parser.add_argument("--scale", default="tiny")
    parser.add_argument("--run-dir", default="", help="default runs/SCALE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--name", help="of the file and of the run's folder; default weights_SCALE"
    )
    parser.add_argument("--questions", type=int, default=0, help="drawn for stage 2")
    parser.add_argument("--per-task", type=int, default=0, help="test items drawn")
    parser.add_argument("--replies", type=int, default=8, help="sampled to each item")
    parser.add_argument("--sft", default="sft_lora", help="stage that GRPO starts from")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE"
    )
    parser.add_argument("--out", type=Path, help="default notebooks/reference_runs/")
    typed = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(typed)
    if not 1 <= len(options.seeds) <= len(T_975) + 1:
        parser.error(f"--seeds: 1 to {len(T_975) + 1} seeds, got {len(options.seeds)}")
    if "constant" in options.methods and "exp" not in options.methods:
        parser.error("--methods: constant takes its size from exp; add exp")
    if bool(options.questions) != bool(options.per_task):
        parser.error("--questions and --per-task draw new data: give both or neither")
    folder = f"reference_{options.name}" if options.name else "reference"
    run = runs.start(options.scale, options.run_dir, overrides=options.set)
    if options.questions:
        data = f"{folder}/data"
        rows, bench = more_of_minimig(run, data, options.questions, options.per_task)
    else:
        data, (rows, bench) = "data", own_data(run)
    needs = [data, options.sft]
    sft = runs.load_scale(run.dir / options.sft / "config.yaml")["sft"]
    four_bit = sft["adapter"] == "qlora"
    # exp comes before the constant that copies its size
    methods = [method for method in METHODS if method in options.methods]
    results: dict[str, dict[int, Any]] = {method: {} for method in methods}
    trainings = []
    before = run.dir / options.sft / "adapter"
    how = (four_bit, options.replies)
    begun = evaluate_one(run, bench, before, run.dir / folder / SFT, *how)
    results[SFT] = {seed: begun for seed in options.seeds}
    for seed in options.seeds:
        for method in methods:
            stage = train_one(run, method, seed, rows, needs, folder)
            results[method][seed] = evaluate_one(
                run, bench, stage.dir / "adapter", stage.dir, *how
            )
            left_out = ("parameters", "sft_adapter")  # the latter is a path of this run
            facts = {k: v for k, v in stage.results.items() if k not in left_out}
            log = runs.read_jsonl(stage.dir / "metrics.jsonl")
            facts["mean_iou"] = [round(row["groups/mean_iou"], 4) for row in log]
            trainings.append({"method": method, "seed": seed, **facts})
    name = options.name or f"weights_{Path(options.scale).stem}"
    out = options.out or runs.repo_root() / "notebooks" / "reference_runs"
    used = {key: run.config[key] for key in ("model", "grpo", "evaluate")}
    runs.write_json(
        out / f"{name}.json",
        {
            "command": " ".join(["python -m univg_nb.reference", *typed]),
            "config": used,
            "versions": runs.versions(),
            "device": runs.device(),
            "git": runs.git_hash(),
            "threads": torch.get_num_threads(),
            "items": len(bench.items),
            "records_sha256": bench.sha256,
            "seeds": options.seeds,
            "trainings": trainings,
            "means": means(results),
            "comparisons": compare(results),
        },
    )


if __name__ == "__main__":
    main()

"""Is it the difficulty, or only the size of the step? Several seeds of GRPO, compared.

    python -m univg_nb study --scale tiny --seeds 0 1 2
    python -m univg_nb study --name long_tiny --questions 3200 --per-task 100 \\
        --chains 12000 --hasty 0.5 --replies 2 --set grpo.max_steps=100 \\
        --set grpo.learning_rate=2e-4 --set grpo.norm_learning_rate=null \\
        --set grpo.temperature=0.6

From the SFT stage of a run, for every seed: GRPO without a weight, with e^(1-m), with
e^(1-m) divided by its mean, and with a constant that makes the whole update as large as
e^(1-m) does. Long: as many trainings as seeds times four. Finished trainings and
replies are loaded, so the command can be repeated after an interruption.

--questions and --per-task draw more of MiniMIG than the run has: a long training would
see few questions too often, and few items would not show a small gain. --chains and
--hasty train a stage 1 to start from whose chains can go either way
(`reference_data.hasty`): then there is something that rewards can teach in minutes.

Every model answers the benchmark greedily and with sampled replies. Written:
notebooks/reference_runs/NAME.json; notebooks 05 and 06 draw long_SCALE.json, 06
weights_SCALE.json.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from univg_nb import io, models, runs
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import predictions, scoring
from univg_nb.evaluate.benchmarks import Benchmark
from univg_nb.evaluate.generate import GenerationOptions, generate
from univg_nb.study import data as reference_data
from univg_nb.study import tables
from univg_nb.study.tables import SFT, T_975
from univg_nb.train import grpo

METHODS: dict[str, dict[str, Any]] = {
    "none": {"weight": "none"},
    "exp": {"weight": "exp"},
    "exp_unit_mean": {"weight": "exp", "unit_mean": True},
    "constant": {"weight": "constant"},  # its value comes from the exp run
}


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
        section["constant"] = fair_constant(io.read_jsonl(exp))
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
    """Per item: greedy IoU and hit, whether the greedy reply thinks (see
    `reference_data.thinks`), mean IoU of as many sampled `replies`; all are kept in
    `folder`. four_bit: the adapter was trained on NF4 weights."""
    quantize = "nf4" if four_bit else None
    loaded = models.load_for_inference(run.config["model"], adapter, quantize)
    section = run.config["evaluate"]
    ways = {
        "greedy": {},
        "sampled": {"temperature": 1.0, "num_return_sequences": replies},
    }
    for name, way in ways.items():
        path = folder / f"{name}.jsonl"
        options = GenerationOptions(**section, **way)
        generate(*loaded, bench.items, path, options)
    answers = predictions.read_predictions(folder / "greedy.jsonl")
    greedy = scoring.score_items(bench.items, answers)
    sampled = predictions.read_predictions(folder / "sampled.jsonl")
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
        "thinks": [float(reference_data.thinks(r.text)) for (r,) in answers.values()],
        "expected_iou": np.mean(ious, axis=0).round(4).tolist(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m univg_nb study")
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
    parser.add_argument("--chains", type=int, default=0, help="drawn for a stage 1")
    parser.add_argument("--hasty", type=float, default=0.0, help="share of --chains")
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
    if options.chains and not options.questions:
        parser.error("--chains are drawn with new questions: add --questions")
    if options.hasty and not options.chains:
        parser.error("--hasty is a share of --chains: add --chains")
    folder = f"reference_{options.name}" if options.name else "reference"
    run = runs.start(options.scale, options.run_dir, overrides=options.set)
    if options.questions:
        data = f"{folder}/data"
        rows, bench = reference_data.more_of_minimig(
            run, data, options.questions, options.per_task, options.chains
        )
    else:
        data, (rows, bench) = "data", reference_data.own(run)
    start = options.sft
    if options.chains:
        start = reference_data.hasty_start(run, folder, data, options.hasty)
    needs = [data, start]
    sft = runs.load_scale(run.dir / start / "config.yaml")["sft"]
    four_bit = sft["adapter"] == "qlora"
    # exp comes before the constant that copies its size
    methods = [method for method in METHODS if method in options.methods]
    results: dict[str, dict[int, Any]] = {method: {} for method in methods}
    trainings = []
    before = run.dir / start / "adapter"
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
            facts |= tables.curves(stage.dir)
            trainings.append({"method": method, "seed": seed, **facts})
    name = options.name or f"weights_{Path(options.scale).stem}"
    out = options.out or runs.repo_root() / "notebooks" / "reference_runs"
    used = {key: run.config[key] for key in ("model", "grpo", "evaluate")}
    io.write_json(
        out / f"{name}.json",
        {
            "command": " ".join(["python -m univg_nb study", *typed]),
            "config": used,
            "versions": runs.versions(),
            "device": runs.device(),
            "git": runs.git_hash(),
            "threads": torch.get_num_threads(),
            "items": len(bench.items),
            "records_sha256": bench.sha256,
            "seeds": options.seeds,
            "trainings": trainings,
            "means": tables.means(results),
            "by_task": tables.by_task(bench.items, results),
            "comparisons": tables.compare(results),
        },
    )


if __name__ == "__main__":
    main()

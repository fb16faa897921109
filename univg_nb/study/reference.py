r"""Is it the difficulty, or only the size of the step? Several seeds of GRPO, compared.

    python -m univg_nb study --scale tiny --seeds 0 1 2
    python -m univg_nb study --name long_tiny --questions 3200 --per-task 100 \
        --chains 12000 --hasty 0.5 --replies 2 --set grpo.max_steps=100 \
        --set grpo.learning_rate=2e-4 --set grpo.norm_learning_rate=null \
        --set grpo.temperature=0.6

From the SFT stage of a run, for every seed: GRPO without a weight, with e^(1-m), with
e^(1-m) divided by its mean, and with a constant that makes the whole update as large as
e^(1-m) does. Finished trainings and replies are loaded, so the command can be repeated
after an interruption.

--questions and --per-task draw more of MiniMIG than the run has: a long training would
see few questions too often, and few items would not show a small gain. --chains and
--hasty train a stage 1 to start from, some of whose chains say nothing (see
`data.replace_chains`): then there is something that rewards can teach in minutes.

Every model answers the benchmark greedily and with sampled replies. The result is
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

from univg_nb import models, runs
from univg_nb.config import add_scale_arguments
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import predictions, scoring
from univg_nb.evaluate.benchmarks import Benchmark
from univg_nb.evaluate.generate import GenerationOptions, generate
from univg_nb.io import read_jsonl, write_json
from univg_nb.study import data, tables
from univg_nb.study.tables import SFT, T_975
from univg_nb.train import grpo

METHODS: dict[str, dict[str, Any]] = {
    "none": {"weight": "none"},
    "exp": {"weight": "exp"},
    "exp_unit_mean": {"weight": "exp", "unit_mean": True},
    "constant": {"weight": "constant"},  # its value comes from the exp run
}


def compute_fair_constant(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the constant weight whose update is as large as that of weighted groups.

    Silent groups have a weight but no part in the update, so each group counts by its
    mean |A|: c = sum(phi |A|) / sum(|A|).

    Args:
        rows: of rollouts.jsonl.

    Raises:
        ValueError: if every group is silent.
    """
    sizes = [float(np.abs(row["advantages"]).mean()) for row in rows]
    if not sum(sizes):
        raise ValueError("every group is silent: no constant does what the weights do")
    return float(np.dot(sizes, [row["weight"] for row in rows]) / sum(sizes))


def train_one(
    run: runs.Run,
    method: str,
    seed: int,
    rows: Sequence[GroundingSample],
    needs: Sequence[str],
    folder: str,
) -> runs.Stage:
    """Return the stage FOLDER/METHOD_SEED, trained on `rows` now if it is not there.

    needs: the stages that made the rows and the model it starts from.
    """
    section = {**run.config["grpo"], **METHODS[method], "seed": seed}
    if method == "constant":
        exp = run.dir / folder / f"exp_{seed}" / "rollouts.jsonl"
        section["constant"] = compute_fair_constant(read_jsonl(exp))
    settings = {"model": run.config["model"], "grpo": section}
    stage = run.stage(f"{folder}/{method}_{seed}", settings, needs=needs)
    if not stage.done:
        sft = run.dir / needs[-1]
        before = runs.load_scale(sft / "config.yaml")["sft"]
        config = run.config | {"grpo": section, "sft": before}
        summary = grpo.train(config, stage.dir, rows, sft_adapter=sft / "adapter")
        stage.finish(**summary)
    return stage


def evaluate_one(
    run: runs.Run,
    bench: Benchmark,
    adapter: Path,
    folder: Path,
    quantize: Any,
    replies: int,
) -> dict[str, list[float]]:
    """Let a model answer the benchmark; its replies are kept in `folder`.

    quantize: "nf4" for an adapter that was trained on NF4 weights. Returned for each
    item: greedy_iou, hit, thinks (whether the greedy reply reasons), and expected_iou,
    the mean over as many sampled `replies`.
    """
    loaded = models.load_for_inference(run.config["model"], adapter, quantize)
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "sampled": {"temperature": 1.0, "num_return_sequences": replies},
    }
    found = {}
    for name, way in ways.items():
        path = folder / f"{name}.jsonl"
        options = GenerationOptions(**run.config["evaluate"], **way)
        generate(*loaded, bench.items, path, options)
        found[name] = predictions.read_predictions(path)

    def score(number: int, way: str) -> list[float]:
        chosen = {index: [made[number]] for index, made in found[way].items()}
        return [one.iou for one in scoring.score_items(bench.items, chosen)]

    greedy = score(0, "greedy")
    sampled = [
        score(number, "sampled") for number in range(replies)
    ]  # (replies, items)
    texts = [reply.text for (reply,) in found["greedy"].values()]
    return {
        "greedy_iou": [round(iou, 4) for iou in greedy],
        "hit": [float(iou >= 0.5) for iou in greedy],
        "thinks": [float(data.has_reasoning(text)) for text in texts],
        "expected_iou": np.mean(sampled, axis=0).round(4).tolist(),
    }


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of `study`; options that belong together are checked."""
    parser = argparse.ArgumentParser(
        prog="python -m univg_nb study",
        description="Train GRPO over several seeds and weights, and compare them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m univg_nb study --scale tiny --seeds 0 1 2",
    )
    add_scale_arguments(parser, default="tiny")
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
    parser.add_argument("--out", type=Path, help="default notebooks/reference_runs/")
    options = parser.parse_args(arguments)
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
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `study`."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_options(typed)
    folder = f"reference_{options.name}" if options.name else "reference"
    run = runs.start(options.scale, options.run_dir, overrides=options.set)
    if options.questions:
        drawn, sizes = f"{folder}/data", (options.questions, options.per_task)
        rows, bench = data.draw_data(run, drawn, *sizes, options.chains)
    else:
        drawn, (rows, bench) = "data", data.read_run_data(run)
    start = options.sft
    if options.chains:
        start = data.train_start(run, folder, drawn, options.hasty)
    sft = runs.load_scale(run.dir / start / "config.yaml")["sft"]
    how = ("nf4" if sft["adapter"] == "qlora" else None, options.replies)
    # exp comes before the constant that copies its size
    methods = [method for method in METHODS if method in options.methods]
    results: dict[str, dict[int, Any]] = {method: {} for method in methods}
    before = run.dir / start / "adapter"
    begun = evaluate_one(run, bench, before, run.dir / folder / SFT, *how)
    results[SFT] = dict.fromkeys(options.seeds, begun)
    trainings = []
    for seed in options.seeds:
        for method in methods:
            stage = train_one(run, method, seed, rows, [drawn, start], folder)
            adapter = stage.dir / "adapter"
            results[method][seed] = evaluate_one(run, bench, adapter, stage.dir, *how)
            left_out = ("parameters", "sft_adapter")  # the latter is a path of this run
            facts = {k: v for k, v in stage.results.items() if k not in left_out}
            facts |= tables.read_curves(stage.dir)
            trainings.append({"method": method, "seed": seed, **facts})
    name = options.name or f"weights_{Path(options.scale).stem}"
    out = options.out or runs.repo_root() / "notebooks" / "reference_runs"
    used = {key: run.config[key] for key in ("model", "grpo", "evaluate")}
    write_json(
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
            "means": tables.compute_means(results),
            "by_task": tables.compute_task_means(bench.items, results),
            "comparisons": tables.compare(results),
        },
    )

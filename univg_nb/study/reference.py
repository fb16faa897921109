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
from univg_nb.config import (
    add_scale_arguments,
    make_parser,
    output_folder,
    within,
)
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
    "constant": {"weight": "constant"},  # its value comes from the exp run before it
}


def compute_fair_constant(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the constant weight whose update is as large as that of weighted groups.

    Silent groups have a weight but no part in the update, so each group (a row of
    rollouts.jsonl) counts by its mean |A|: c = sum(phi |A|) / sum(|A|). Raises
    ValueError if every group is silent.
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

    It needs the stages that made the rows and the model it starts from, in this order.
    """
    section = {**run.config["grpo"], **METHODS[method], "seed": seed}
    if method == "constant":
        exp = run.dir / folder / f"exp_{seed}" / "rollouts.jsonl"
        section["constant"] = compute_fair_constant(read_jsonl(exp))
    settings = {"model": run.config["model"], "grpo": section}
    stage = run.stage(f"{folder}/{method}_{seed}", settings, needs=needs)
    if not stage.done:
        config = run.config | {"grpo": section}
        adapter = run.dir / needs[-1] / "adapter"
        stage.finish(**grpo.train(config, stage.dir, rows, sft_adapter=adapter))
    return stage


def evaluate_one(
    run: runs.Run, bench: Benchmark, adapter: Path, folder: Path, replies: int
) -> dict[str, list[float]]:
    """Let a model answer the benchmark; its replies are kept in `folder`.

    Returned for each item: greedy_iou, hit, thinks (whether the greedy reply reasons),
    and expected_iou, the mean over as many sampled `replies`.
    """
    loaded = models.load_for_inference(
        run.config["model"],
        adapter,
        "nf4" if run.config["sft"]["adapter"] == "qlora" else None,
    )

    def answer(name: str, **way: Any) -> tuple[list[str], list[float]]:
        """Return a reply to each item, and its IoU."""
        path = folder / f"{name}.jsonl"
        options = GenerationOptions(**run.config["evaluate"], **way)
        generate(*loaded, bench.items, path, options)
        made = predictions.read_predictions(path)
        scored = scoring.score_items(bench.items, made)
        return [reply.text for reply in made.values()], [one.iou for one in scored]

    texts, greedy = answer("greedy")
    sampled = [
        answer(f"sampled_{seed}", temperature=1.0, seed=seed)[1]
        for seed in range(replies)
    ]  # (replies, items)
    return {
        "greedy_iou": [round(iou, 4) for iou in greedy],
        "hit": [float(iou >= 0.5) for iou in greedy],
        "thinks": [float(data.has_reasoning(text)) for text in texts],
        "expected_iou": np.mean(sampled, axis=0).round(4).tolist(),
    }


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of `study`; options that belong together are checked."""
    parser = make_parser(
        "study",
        "Train GRPO over several seeds and weights, and compare them.",
        "--scale tiny --seeds 0 1 2",
    )
    add_scale_arguments(parser, default="tiny")
    count, share = within(int, 0), within(float, 0, 1)
    parser.add_argument("--run-dir", default="", help="default runs/SCALE")
    parser.add_argument("--seeds", type=count, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", help="of file and folder; default weights_SCALE")
    parser.add_argument("--questions", type=count, default=0, help="drawn for stage 2")
    parser.add_argument("--per-task", type=count, default=0, help="test items drawn")
    parser.add_argument("--replies", type=count, default=8, help="sampled to each item")
    parser.add_argument("--chains", type=count, default=0, help="drawn for a stage 1")
    parser.add_argument("--hasty", type=share, default=0.0, help="share of --chains")
    parser.add_argument("--out", type=output_folder, help="default: reference_runs")
    options = parser.parse_args(arguments)
    if not 1 <= len(options.seeds) <= len(T_975) + 1:
        parser.error(f"--seeds: 1 to {len(T_975) + 1} seeds, got {len(options.seeds)}")
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
    drawn, start = "data", "sft_lora"
    if options.questions:
        drawn, sizes = f"{folder}/data", (options.questions, options.per_task)
        rows, bench = data.draw_data(run, drawn, *sizes, options.chains)
    else:
        rows, bench = data.read_run_data(run)
    if options.chains:
        start = data.train_start(run, folder, drawn, options.hasty)
    # its adapter goes on training, on the weights it was begun on
    run.config["sft"] = runs.load_scale(run.dir / start / "config.yaml")["sft"]
    results: dict[str, dict[int, Any]] = {method: {} for method in METHODS}
    adapter, replies = run.dir / start / "adapter", options.replies
    begun = evaluate_one(run, bench, adapter, run.dir / folder / SFT, replies)
    results[SFT] = dict.fromkeys(options.seeds, begun)
    trainings = []
    for seed in options.seeds:
        for method in METHODS:
            stage = train_one(run, method, seed, rows, [drawn, start], folder)
            adapter = stage.dir / "adapter"
            found = evaluate_one(run, bench, adapter, stage.dir, replies)
            results[method][seed] = found
            facts = {"method": method, "seed": seed, **stage.results}
            facts |= tables.read_curves(stage.dir)
            left_out = ("parameters", "sft_adapter")  # the latter is a path of this run
            trainings.append({k: v for k, v in facts.items() if k not in left_out})
    name = options.name or f"weights_{Path(options.scale).stem}"
    out = options.out or runs.repo_root() / "notebooks" / "reference_runs"
    write_json(
        out / f"{name}.json",
        {
            "command": " ".join(["python -m univg_nb study", *typed]),
            "config": {key: run.config[key] for key in ("model", "grpo", "evaluate")},
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

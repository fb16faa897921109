"""The command `study`: how many seeds it takes, the trainings, how far they are.

    python -m univg_nb study rates     # learning rates, on the validation split
    python -m univg_nb study run --seeds 0 1 --only grpo_none grpo_exp     # a pilot
    python -m univg_nb study plan
    python -m univg_nb study run
    python -m univg_nb study status

Everything finished is kept: `run` after an interruption goes on, and an empty run
folder from what is recorded. Its result is notebooks/reference_runs/study_SCALE.json. A
study is a YAML file (see `design`).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from univg_nb import config, io, runs
from univg_nb.launch.queue import run_processes
from univg_nb.study import arms, outcomes, power
from univg_nb.study.design import DEFAULT, PLAN, RATES, Study, read_study


def choose_rates(run_dir: Path, file: str, jobs: int) -> None:
    """Choose the learning rates by the rule of the study; `run` takes them.

    Each arm of `rates` is trained with seed 0 and each factor times its own rate, and
    answers the validation split. The best is taken, of equals the smallest.
    """
    study, content = read_study(file), config.load_yaml(io.read_text(file), file)
    if not study.rates.arms:
        raise ValueError(f"{file}: rates.arms names no arm to choose a rate for")
    tried: dict[str, tuple[str, float]] = {}
    arms: dict[str, Any] = {}
    for name in study.rates.arms:
        train, given = str(study.arms[name].train), content["arms"][name]
        own = study.make_config(study.arms[name], 0)[train]["learning_rate"]
        for factor in sorted(study.rates.factors):
            key, rate = f"{name}_x{factor:g}", factor * own
            option = f"{train}.learning_rate={rate!r}"
            arms[key] = given | {"set": [*given.get("set", []), option]}
            tried[key] = name, rate
    content |= {"arms": arms, "seeds": 1, "claims": {}, "rates": {}}
    content["data"] = content["data"] | {"test_split": "val"}
    folder = run_dir / "rates"
    io.write_text(folder / "study.yaml", config.dump(content))
    words = [str(folder / "study.yaml"), "--run-dir", str(folder), "--out", str(folder)]
    if main(["run", *words, "--jobs", str(jobs)]):
        raise RuntimeError(f"{folder}: not every training finished; run it again")
    record = io.read_json(folder / f"study_{Path(study.scale).stem}.json")["arms"]
    accuracy = {key: record[key]["0"]["macro_acc_05"] for key in tried}
    chosen: dict[str, float] = {}
    for name in study.rates.arms:
        keys = [key for key, (arm, _) in tried.items() if arm == name]
        chosen[name] = tried[max(keys, key=accuracy.__getitem__)][1]
        for key in keys:
            print(f"{key}: rate {tried[key][1]:g}, {accuracy[key]:.1%} on validation")
        print(f"{name} takes {chosen[name]:g}")
    io.write_json(run_dir / RATES, {"chosen": chosen, "validation": accuracy})


def plan(run_dir: Path, study: Study, variance: Sequence[float] | None) -> None:
    """Compute and print how many seeds and items the study takes; `run` uses them."""
    found = outcomes.collect(run_dir, study, seeds=range(power.MOST_SEEDS))
    if variance:
        spread, source = power.Spread(*variance), "given"
    else:
        several = [name for name, ones in found.items() if len(ones) > 1]
        wanted = [name for name in study.plan.pair if name in several]
        pair = wanted if len(wanted) == 2 else several[:2]
        tasks = outcomes.read_tasks(run_dir) if len(pair) == 2 else []
        effect = outcomes.compute_effect(found, study, pair, tasks) if tasks else None
        if not effect or effect.seeds < 2:
            raise ValueError(
                f"{run_dir}: no pilot: run two seeds or more of two arms (study run "
                f"--seeds 0 1 --only {' '.join(study.plan.pair)}), or give --variance"
            )
        spread, source = power.estimate_spread(effect), " - ".join(pair)
        source += f", {effect.seeds} seeds, {effect.items} items"
    goal, took = study.plan, outcomes.measure_seconds(found, study)
    pair_took = [took[name] for name in goal.pair]
    train, answer = (sum(column) for column in zip(*pair_took, strict=True))
    made, table = power.make_plan(
        spread, goal, study.seeds, study.items, (train, answer)
    )
    print(f"Variances ({source}): {spread}\n{table.round(2).to_string()}")
    print(
        f"{made['seeds']} seeds and {made['items']} items: a difference of "
        f"{goal.points:g} points is seen with a probability of {goal.power:.0%}"
    )
    io.write_json(run_dir / PLAN, made | {"pilot": source})


def run_jobs(run_dir: Path, study: Study, options: argparse.Namespace) -> bool:
    """Run what is not done, each in a process of one thread; return whether all is."""
    command = [sys.executable, "-m", "univg_nb", "study", "run"]
    command += [str(Path(options.study).resolve()), "--run-dir", str(run_dir), "--job"]
    jobs = [
        (arm, seed)
        for arm, seed in study.list_jobs(options.only, options.seeds)
        if not outcomes.read_outcome(run_dir, study, arm, seed)
    ]
    one = {"OMP_NUM_THREADS": "1"}
    slots = [one | {"CUDA_VISIBLE_DEVICES": ""}] * (options.jobs - options.gpu_jobs)
    slots += [one] * min(options.jobs, options.gpu_jobs)
    whole = True
    for late in (False, True):  # those that need another arm come last
        commands = {
            f"{arm.name}_{seed}": [*command, "--only", arm.name, "--seeds", str(seed)]
            for arm, seed in jobs
            if bool(arm.constant_of) is late
        }
        whole &= run_processes(run_dir / "jobs", commands, slots, fresh=True)
    return whole


def parse_options(typed: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of `study`."""
    parser = config.make_parser(
        "study", "Trainings over seeds, behind the claims.", "run --seeds 0 1"
    )
    add, count = parser.add_argument, config.within(int, 0)
    add("what", choices=("rates", "plan", "run", "status"))
    add("study", nargs="?", default=str(DEFAULT), help="default: the course's")
    add("--run-dir", default="", help="default: runs/study_SCALE")
    add("--only", nargs="+", default=[], metavar="ARM", help="run only these arms")
    add("--seeds", type=count, nargs="+", default=[], help="run only these seeds")
    add("--jobs", type=config.within(int, 1), default=2, help="at a time (default: 2)")
    add(
        "--gpu-jobs",
        type=config.within(int, 0),
        default=10_000,
        help="so many of them see the GPU, the others only a core (default: all)",
    )
    add("--out", type=config.output_folder, help="of the result")
    add("--job", action="store_true", help=argparse.SUPPRESS)  # a process of run_jobs
    names = ("ITEMS", "SEEDS", "REST")
    add(
        "--variance",
        type=config.within(float, 0),
        nargs=3,
        metavar=names,
        help="plan with these variances of a difference in hits, not with a pilot",
    )
    return parser.parse_args(typed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `study`."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_options(typed)
    study = read_study(options.study)
    scale = Path(study.scale).stem
    run_dir = runs.resolve_run_dir(options.run_dir or f"runs/study_{scale}")
    if options.what == "rates":
        choose_rates(run_dir, options.study, options.jobs)
        return 0
    if options.what == "plan":
        plan(run_dir, study, options.variance)
        return 0
    folder = options.out or runs.repo_root() / "notebooks" / "reference_runs"
    path = Path(folder) / f"study_{scale}.json"
    record = io.read_json(path) if path.is_file() else {}
    if not options.job:
        outcomes.restore_choices(run_dir, study, record)
    study = read_study(options.study, run_dir)
    if options.what == "status":
        print(outcomes.report_status(run_dir, study, options.jobs))
        return 0
    chosen = study.list_jobs(options.only, options.seeds)
    with io.locked(run_dir / "study"):
        run = runs.start(study.scale, run_dir, overrides=study.set)
        if options.job:
            for arm, seed in chosen:
                arms.run_arm(run, study, arm, seed)
            return 0
        arms.build_data(run, study)
        count = outcomes.restore(run_dir, study, record)
        print(f"{count} outcomes are taken from {path}")
        whole = run_jobs(run_dir, study, options)
    found = outcomes.collect(run_dir, study)
    command = " ".join(["python -m univg_nb study", *typed])
    verdicts = outcomes.write_results(path, run, study, found, command)
    print(verdicts.round(2).to_string())
    print(outcomes.report_status(run_dir, study, options.jobs))
    return int(not whole)

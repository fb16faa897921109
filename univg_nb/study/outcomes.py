"""What has come of a study: its progress, its outcomes, the verdicts on the claims."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from univg_nb import io, runs
from univg_nb.data import files
from univg_nb.figures import findings
from univg_nb.study.arms import Stages, list_stages
from univg_nb.study.design import PLAN, RATES, Arm, Study

Outcomes = dict[str, dict[int, dict[str, Any]]]  # arm, seed, what `read_outcome` gives
PAGE = "status.md"


def _read_marker(run_dir: Path, stage: str) -> dict[str, Any]:
    path = run_dir / stage / "stage.json"
    return io.read_json(path) if path.is_file() else {"status": "missing"}


def _make_marker(
    run_dir: Path, name: str, settings: Any, needs: list[str]
) -> dict[str, Any]:
    """Return what `runs.Run.stage` writes when this stage of an arm begins."""
    upstream = {other: _read_marker(run_dir, other).get("hash") for other in needs}
    found = json.loads(json.dumps({"config": settings, "needs": upstream}, default=str))
    return {"name": name, "hash": io.config_hash(found), **found}


def read_outcome(
    run_dir: Path, study: Study, arm: Arm, seed: int
) -> dict[str, Any] | None:
    """Read what came of an arm with a seed; None if that is not finished.

    Returns what `arms.evaluate` does, with training (its summary); and of both the
    seconds and the hashes of what decides them.
    """
    found: dict[str, Any] = {"training": {}, "seconds": [], "hashes": []}
    for name, (settings, needs) in list_stages(study, arm, seed).items():
        marker = _read_marker(run_dir, name)
        same = _make_marker(run_dir, name, settings, needs)["hash"]
        if marker["status"] != "finished" or marker["hash"] != same:
            return None
        found["seconds"].append(marker["seconds"])
        found["hashes"].append(same)
        hidden = ("parameters", "sft_adapter", "fingerprint")
        results = {k: v for k, v in marker["results"].items() if k not in hidden}
        found |= results if needs[0] == "test" else {"training": results}
    return found


def restore_choices(run_dir: Path, study: Study, record: Mapping[str, Any]) -> None:
    """Give a run folder the rates and the plan of a record, if it has none.

    Only those of the same arms, chosen the same way; other arms may be new.
    """
    now, then = json.loads(json.dumps(asdict(study))), record.get("study", {})
    for name, arms in ((RATES, study.rates.arms), (PLAN, study.plan.pair)):
        key = Path(name).stem
        same = [then.get(k) == now[k] for k in ("scale", "set", "start", "data", key)]
        same += [then["arms"].get(arm) == now["arms"].get(arm) for arm in arms if then]
        if all(same) and record.get(key) and not (run_dir / name).exists():
            io.write_json(run_dir / name, record[key])


def restore(run_dir: Path, study: Study, record: Mapping[str, Any]) -> int:
    """Give a run folder the recorded outcomes that it has not, as finished stages.

    So a study goes on from its record. An outcome counts if all that decides it is the
    same; weights do not come back. Returns their number.
    """
    count = 0
    for name, ones in record.get("arms", {}).items():
        for seed in map(int, ones if name in study.arms else ()):
            if not read_outcome(run_dir, study, study.arms[name], seed):
                stages = list_stages(study, study.arms[name], seed)
                count += _restore_one(run_dir, stages, ones[str(seed)])
    return count


def _restore_one(run_dir: Path, stages: Stages, outcome: Mapping[str, Any]) -> bool:
    about = ("training", "seconds", "hashes", "macro_acc_05")
    answers = {key: value for key, value in outcome.items() if key not in about}
    for index, (name, (settings, needs)) in enumerate(stages.items()):
        marker = _make_marker(run_dir, name, settings, needs)
        if marker["hash"] != outcome["hashes"][index]:
            return False
        results = answers if needs[0] == "test" else outcome["training"]
        done = {"status": "finished", "seconds": outcome["seconds"][index]}
        io.write_json(
            run_dir / name / "stage.json", marker | done | {"results": results}
        )
    return True


def collect(run_dir: Path, study: Study, seeds: Collection[int] = ()) -> Outcomes:
    """Collect the finished outcomes; arms without any are left out."""
    found: Outcomes = {}
    for arm, seed in study.list_jobs(seeds=seeds):
        if outcome := read_outcome(run_dir, study, arm, seed):
            found.setdefault(arm.name, {})[seed] = outcome
    return {name: found[name] for name in study.arms if name in found}


def stack_hits(found: Outcomes, study: Study, pair: Collection[str]) -> np.ndarray:
    """Return hits (arms, seeds, items) of two arms on the seeds that both have.

    One that is not trained is the same with every seed.
    """
    trained = [name for name in pair if study.arms[name].train]
    seeds = sorted(set.intersection(*(set(found[name]) for name in trained or pair)))
    rows = [[found[n][s if n in trained else 0]["hits"] for s in seeds] for n in pair]
    return np.array([[list(map(float, text)) for text in row] for row in rows])


def read_tasks(run_dir: Path) -> list[str]:
    """Return the task of each test item."""
    return [row.task for row in files.read(run_dir / "test" / "mig_bench.json")]


def compute_effect(
    found: Outcomes, study: Study, pair: Collection[str], tasks: list[str]
) -> findings.Effect | None:
    """Compute first - second arm, crossed over items and seeds; None without seeds."""
    first, second = stack_hits(found, study, pair)
    return findings.compute_effect(first, second, tasks) if first.size else None


def judge(found: Outcomes, study: Study, tasks: list[str]) -> pd.DataFrame:
    """Judge the claims of claims.yaml over items and seeds (`figures.findings`)."""
    names = {name: name for name in found}
    names |= {claim: own for claim, own in study.claims.items() if own in found}
    effects = {}
    for claim in findings.CLAIMS:
        if claim.after in names and claim.before in names:
            pair = names[claim.after], names[claim.before]
            if effect := compute_effect(found, study, pair, tasks):
                effects[claim.text] = effect
    curves = [
        o["training"]["curves"] for o in found.get(findings.TREND_ARM, {}).values()
    ]
    shares = None
    if curves:
        shares = {k: [c[k] for c in curves] for k in ("easy", "hard")}
    judged = findings.judge_claims(effects, names, shares)
    for name, own in study.claims.items():
        judged["arms"] = judged["arms"].str.replace(rf"\b{name}\b", own, regex=True)
    return judged


def judge_weights(
    found: Outcomes, study: Study, tasks: list[str]
) -> list[dict[str, Any]]:
    """Judge that each other GRPO from the same start gains over `plan.pair`'s second.

    Rows have columns of `judge`; intervals are not widened for the number of arms.
    """
    plain = study.plan.pair[1]
    kinds = {name: (arm.train, arm.begins) for name, arm in study.arms.items()}
    rows = []
    for name in found if plain in found else ():
        if name in study.plan.pair or kinds[name] != kinds[plain]:
            continue
        if effect := compute_effect(found, study, (name, plain), tasks):
            row = {"arms": f"{name} over {plain}", "seeds": effect.seeds}
            rows.append(row | findings.describe(effect))
    return rows


def write_results(
    path: Path, run: runs.Run, study: Study, found: Outcomes, command: str
) -> pd.DataFrame:
    """Write the outcomes of all items and the verdicts as JSON; return the verdicts."""
    tasks = read_tasks(run.dir)
    verdicts = judge(found, study, tasks)
    for outcome in (one for ones in found.values() for one in ones.values()):
        hits = pd.Series(list(map(float, outcome["hits"])))
        outcome["macro_acc_05"] = round(float(hits.groupby(tasks).mean().mean()), 6)
    choices = {Path(n).stem: run.dir / n for n in (RATES, PLAN)}
    facts = {
        "command": command,
        "config": run.config,
        "study": asdict(study),
        **{k: io.read_json(p) if p.is_file() else None for k, p in choices.items()},
        "versions": runs.versions(),
        "device": runs.device(),
        "speed": runs.measure_speed(0.2),
        "git": runs.git_hash(),
        "records_sha256": io.sha256_of(run.dir / "test" / "mig_bench.json"),
        "tasks": pd.Series(tasks).value_counts(sort=False).to_dict(),  # in their order
        "findings": json.loads(verdicts.reset_index().to_json(orient="records")),
        "weights": judge_weights(found, study, tasks),
        "arms": found,
    }
    io.write_json(path, facts)
    return verdicts


# ---------------------------------------------------------------- progress


def measure_seconds(found: Outcomes, study: Study) -> dict[str, tuple[float, float]]:
    """Return for each arm the seconds of a training and of the answer to one item.

    They are means of its own seeds, else of arms of its kind, else NaN.
    """
    own: dict[str, np.ndarray] = {}
    kinds: dict[str | None, list[np.ndarray]] = {}
    for name, ones in found.items():
        rows = [
            (sum(o["seconds"][:-1]), o["seconds"][-1] / len(o["hits"]))
            for o in ones.values()
        ]
        own[name] = np.mean(rows, axis=0)
        kinds.setdefault(study.arms[name].train, []).append(own[name])
    means = {kind: np.mean(rows, axis=0) for kind, rows in kinds.items()}
    nothing = np.array([np.nan, np.nan])
    return {
        name: tuple(own.get(name, means.get(arm.train, nothing)).tolist())
        for name, arm in study.arms.items()
    }


def is_running(run_dir: Path, name: str) -> bool:
    """Return whether a process of this machine works on an arm with a seed.

    Its lock is read and not tried: for that moment the arm could not take it.
    """
    path = run_dir / f".{name}.lock"
    text = io.read_text(path) if path.is_file() else ""
    return any(Path("/proc", n).exists() for n in re.findall(r"process (\d+)", text))


def report_status(run_dir: Path, study: Study, at_once: int) -> str:
    """Write the page of the progress, `PAGE`; return its text, in Markdown."""
    found, jobs = collect(run_dir, study), study.list_jobs()
    took = {
        name: train + answer * study.items
        for name, (train, answer) in measure_seconds(found, study).items()
    }
    places: dict[str, dict[str, str]] = {name: {} for name in study.arms}
    left = 0.0
    for arm, seed in jobs:
        done = seed in found.get(arm.name, {})
        running = not done and is_running(run_dir, f"{arm.name}_{seed}")
        place = "done" if done else "running" if running else "left"
        places[arm.name][place] = f"{places[arm.name].get(place, '')} {seed}".strip()
        left += 0 if done else took[arm.name] / 3600 / at_once
    count = sum(map(len, found.values()))
    lines = [
        f"# Study: {count} of {len(jobs)} done, {left:.1f} hours left",
        f"\n{study.seeds} seeds, {max(study.seeds, study.pair_seeds)} of "
        f"{' and '.join(study.plan.pair)}, {study.items} items; {at_once} at a time.\n",
        "| arm | done | running | left | minutes a seed |\n|---|---|---|---|---|",
    ]
    for name, cells in places.items():
        seeds = [cells.get(place, "–") for place in ("done", "running", "left")]
        lines.append(f"| {name} | {' | '.join(seeds)} | {took[name] / 60:.1f} |")
    text = "\n".join(lines).replace("nan", "?") + "\n"
    io.write_text(run_dir / PAGE, text)
    return text

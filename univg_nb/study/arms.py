"""One arm with one seed: its data, its training, its answers to the test.

Each step is a stage of the run folder, so that what is finished is loaded: data, test,
what stage 2 begins from, ARM_SEED (the training) and eval/ARM_SEED.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from univg_nb import io, models, runs
from univg_nb.cot.checks import extract_thinking
from univg_nb.cot.stand_in import HABITS, StandInTeacher, name_style
from univg_nb.cot.teacher import Teacher, write_chain
from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import predictions, scoring
from univg_nb.evaluate.benchmarks import Benchmark
from univg_nb.evaluate.generate import GenerationOptions, generate
from univg_nb.minimig import export, items
from univg_nb.study.design import BASE, START, Arm, Study
from univg_nb.train import checkpoints, grpo, sft

HIT = 0.5  # the least IoU of a right answer
CHAINS = {"stage1": "chains_stage1.json", "stage2": "chains_stage2.json"}


def build_data(run: runs.Run, study: Study) -> None:
    """Draw what the arms learn from and the test, and find what stage 2 begins from.

    No scene is in two parts. The stand-in teacher has the habits of the course's, and
    writes chains for the questions of both stages.
    """
    drawn = {k: v for k, v in study.data.items() if k != "test_split"}
    seed, none = drawn.pop("seed", 0), dict.fromkeys(export.SIZES, 0)
    made_of = {"sizes": drawn, "seed": seed, "habits": HABITS}
    stage = run.stage("data", made_of)
    if not stage.done:
        paths = export.build(stage.dir, none | drawn, seed)
        habits: dict[str, Any] = HABITS
        teacher = StandInTeacher(seed, error_rate=0.1, **habits, selector="form")
        for name, file in CHAINS.items():
            rows = files.read(paths[name], image_root=stage.dir)
            chains = write_chains(rows, teacher)
            files.write(chains, stage.dir / file, "stage1_cotsft", stage.dir)
        stage.finish(files={name: path.name for name, path in paths.items()})
    split = study.data.get("test_split", "test")
    sizes = none | {"test_per_task": study.per_task}
    stage = run.stage("test", {"sizes": sizes, "seed": seed, "split": split})
    if not stage.done:
        export.build(stage.dir, sizes, seed, split)
        stage.finish()
    checkpoints.find_start(run, study.start)


def write_chains(
    rows: Iterable[GroundingSample], teacher: StandInTeacher
) -> list[GroundingSample]:
    """Return the rows with the teacher's chains, less those that the checks refuse."""
    written, record = [], Teacher(base_url="", model="stand-in")
    for sample in rows:
        if sample.cot:
            _, task, split, _, index = sample.id.split("-")
            drawn = items.make(task, teacher.seed, split, int(index)).sample
            sample = replace(sample, chain=drawn.chain)
            row = write_chain(teacher.reply, sample, record)
            if row["chosen"] is None:
                continue
            text = row["candidates"][row["chosen"]]["text"]
            sample = replace(sample, chain=extract_thinking(text))
        written.append(sample)
    return written


Stages = dict[str, tuple[Any, list[str]]]  # name: what decides it, what it is made from


def list_stages(study: Study, arm: Arm, seed: int) -> Stages:
    """Return the stages of an arm with a seed: the training if there is one, the test.

    The last one that the test is made from has the weights.
    """
    config, name = study.make_config(arm, seed), f"{arm.name}_{seed}"
    start = [study.start] if arm.begins == START else []
    asked = {key: config[key] for key in ("model", "evaluate")} | {"style": arm.style}
    if not arm.train:
        return {f"eval/{name}": (asked, ["test", *start])}
    other = [f"{arm.constant_of}_{seed}"] if arm.constant_of else []
    settings = {k: v for k, v in asdict(arm).items() if k not in ("name", "style")}
    settings |= {key: config[key] for key in ("model", "evaluate", arm.train)}
    training = {name: (settings, ["data", *start, *other])}
    return training | {f"eval/{name}": (asked, ["test", name])}


def run_arm(run: runs.Run, study: Study, arm: Arm, seed: int) -> None:
    """Train an arm and let it answer the test, as far as that is not done."""
    config = study.make_config(arm, seed)
    with io.locked(run.dir / f"{arm.name}_{seed}"):
        for name, (settings, needs) in list_stages(study, arm, seed).items():
            stage = run.stage(name, settings, needs=needs)
            if stage.done:
                continue
            if needs[0] == "data":
                made = train_arm(run, study, arm, config, stage.dir, needs)
            else:
                adapter = [run.dir / other / "adapter" for other in needs[1:]]
                if lost := [path.parent for path in adapter if not path.exists()]:
                    cause = "its outcome came from a record, of another test"
                    cure = "delete the folder, and it is trained again"
                    raise ValueError(f"{lost[0]} has no weights: {cause}; {cure}")
                made = evaluate(run, config, arm.style, adapter, stage.dir)
            stage.finish(**made, device=runs.device())  # arms may run on several


def train_arm(
    run: runs.Run,
    study: Study,
    arm: Arm,
    config: dict[str, Any],
    out: Path,
    needs: Sequence[str],
) -> dict[str, Any]:
    """Train an arm in the folder `out`; return its summary."""
    begin = Path(models.resolve_model_path(config["model"]["name_or_path"]))
    if arm.begins == START:
        begin = run.dir / study.start / "adapter"
    folder, name = run.dir / "data", "stage2_rl.json"
    if arm.train == "sft":
        name = CHAINS["stage1" if arm.begins == BASE else "stage2"]
    rows = files.read(folder / name, image_root=folder)[: arm.questions]
    if arm.train == "sft":
        if models.is_adapter(begin):
            raise ValueError(
                f"arm {arm.name}: {begin} is an adapter, which SFT cannot go on with; "
                "merge it (python -m univg_nb merge) into a model"
            )
        model = config["model"] | {"name_or_path": str(begin)}
        return sft.train(config | {"model": model}, out, rows, chains=arm.chains)
    facts: dict[str, Any] = {}
    if arm.constant_of:
        other = io.read_json(run.dir / needs[-1] / "stage.json")["results"]
        constant = {"constant": other["fair_constant"]}
        config = config | {"grpo": config["grpo"] | constant}
    if arm.rejection:
        rows, facts = reject(config, begin, rows, arm.rejection, out)
    summary = grpo.train(config, out, rows, sft_adapter=begin)
    if any(one.constant_of == arm.name for one in study.arms.values()):
        groups = io.read_jsonl(out / "rollouts.jsonl")
        facts["fair_constant"] = compute_fair_constant(groups)
    return summary | facts | {"curves": read_curves(out)}


def reject(
    config: Mapping[str, Any],
    begin: Path,
    rows: Sequence[GroundingSample],
    count: int,
    out: Path,
) -> tuple[list[GroundingSample], dict[str, Any]]:
    """Drop the questions that a model answers always right, or always wrong.

    `count` replies to each are sampled into the folder `out`, as in GRPO; those there
    are kept. Returns the other questions; and what it cost and left.
    """
    section = config["grpo"]
    options = GenerationOptions(
        batch_size=config["evaluate"]["batch_size"],
        max_new_tokens=section["max_completion_length"],
        temperature=section.get("temperature", 1.0),
        seed=section["seed"],
    )
    asked = [row for row in rows for _ in range(count)]  # each reply has its own noise
    path, loaded = out / "rejection.jsonl", load_model(config, [begin])
    cost = generate(*loaded, asked, path, options)
    scored = scoring.score_items(asked, predictions.read_predictions(path))
    hits = np.array([one.iou >= HIT for one in scored]).reshape(-1, count).sum(axis=1)
    kept = [row for row, n in zip(rows, hits, strict=True) if 0 < n < count]
    # seconds: of this call, if an earlier one was interrupted
    facts = {key: cost[key] for key in ("replies", "seconds")} | {"kept": len(kept)}
    facts |= {"right": int((hits == count).sum()), "wrong": int((hits == 0).sum())}
    return kept, {"rejection": facts}


def load_model(
    config: Mapping[str, Any], adapters: Sequence[Path]
) -> tuple[models.PreTrainedModel, models.ProcessorMixin]:
    """Load a model and its processor to generate with."""
    four_bit = config["sft"].get("adapter") == "qlora"
    quantized = four_bit and any(map(models.is_adapter, adapters))
    return models.load_for_inference(
        config["model"], adapters, "nf4" if quantized else None
    )


def evaluate(
    run: runs.Run,
    config: Mapping[str, Any],
    style: str,
    adapters: Sequence[Path],
    out: Path,
) -> dict[str, Any]:
    """Let a model answer the test greedily; replies go to the folder `out`.

    Returns for each item, as a text of 0 and 1: hits, and thinks (whether the reply
    does more than say that it sees the target).
    """
    bench = Benchmark.read(run.dir / "test" / "mig_bench.json", run.dir / "test")
    path, keep = out / "predictions.jsonl", run.dir / "vision_features"
    options = GenerationOptions(style, **config["evaluate"], keep=keep)
    cost = generate(*load_model(config, adapters), bench.items, path, options)
    replies = predictions.read_predictions(path, bench.items)
    scored = scoring.score_items(bench.items, replies)
    thinks = [is_reasoned(reply.text) for reply in replies.values()]
    found = {"hits": join_bits(one.iou >= HIT for one in scored)}
    found |= {"thinks": join_bits(thinks), "records_sha256": bench.sha256}
    return found | {"truncated": cost["truncated"]}


def is_reasoned(reply: str) -> bool:
    """Return whether a reply thinks and does more than say that it sees the target."""
    thinking = extract_thinking(reply).strip()
    return "<think>" in reply and thinking != "" and name_style(thinking) != "glance"


def join_bits(values: Iterable[bool]) -> str:
    """Return truth values as a text of 0 and 1."""
    return "".join("01"[bool(value)] for value in values)


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


def read_curves(folder: Path) -> dict[str, list[float]]:
    """Read for each update of GRPO the replies' mean IoU, length and share of thinking.

    easy and hard are shares of groups.
    """
    log = io.read_jsonl(folder / "metrics.jsonl")
    thinking: dict[int, list[bool]] = {row["step"]: [] for row in log}
    for group in io.read_jsonl(folder / "rollouts.jsonl"):
        thinking[group["step"]] += map(is_reasoned, group["replies"])
    names = ("groups/mean_iou", "completions/mean_length", "groups/easy", "groups/hard")
    curves = {key.split("/")[1]: [round(row[key], 4) for row in log] for key in names}
    means = [round(float(np.mean(some)), 4) for some in thinking.values()]
    return curves | {"thinks": means}

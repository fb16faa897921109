"""The plan of a training, its checks and what it turned out to need, as text."""

import argparse
import dataclasses
import importlib.util
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from univg_nb import runs
from univg_nb.config import spread
from univg_nb.data.audit import audit
from univg_nb.fast import vllm
from univg_nb.io import read_json
from univg_nb.launch import cost as cost_model
from univg_nb.launch.cost import Plan
from univg_nb.launch.memory import STRATEGIES, Layout, Stage

# DOC of preflight:
# """Before a long run: does it fit, how long will it take, is everything there?

#     python -m univg_nb plan full --gpu H100-80G --gpus 8

# Prints the account of both stages and the checks of this machine. Exit code 0: fits
# and all checks pass; 1: something does not; 2: a wrong call.
# """


@dataclass(frozen=True)
class Check:
    """One thing looked at: its name, whether it is all right, and what was seen."""

    name: str
    ok: bool
    detail: str


def plan_text(plan: Plan, gpu: str, price: float | None = None) -> str:
    """The account of a stage for a person."""
    where, total = plan.layout, plan.parameters["total"]
    lines = [
        f"{plan.stage}: {where.processes} x {gpu}, {where.strategy}; "
        f"{total['parameters'] / 1e9:.3g} B parameters, "
        f"{total['trainable'] / 1e9:.3g} B trained",
    ]
    for name, size in plan.memory.items():
        lines.append(f"  {name:<12}{size / 1e9:10.3f} GB")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines += [
        f"  {'peak':<12}{plan.peak / 1e9:10.3f} GB of {plan.gpu.memory_gb:g} GB: "
        f"{verdict}",
        f"  longest row {where.tokens} tokens, usual {where.typical}; an update: "
        f"{plan.batch['rows']} rows, {plan.batch['prompts']} prompts, "
        f"{plan.batch['tokens']} tokens, {sum(plan.flops.values()):.3g} FLOPs",
    ]
    parts = ", ".join(f"{k} {v:.2g}" for k, v in plan.seconds.items())
    lines.append(f"  seconds an update: {parts}")
    cost = plan.hours * where.processes * (price or 0)
    money = f", {cost:,.0f} at {price:g} a GPU hour" if price else ""
    lines.append(f"  {plan.updates} updates, {plan.hours:.3g} hours{money}")
    return "\n".join(lines)


def knobs_text(plan: Plan, better: Sequence[tuple[str, Plan]]) -> str:
    """What would help most, with its predicted effect."""
    lines = ["  what lowers the peak most:"]
    for name, other in better:
        fits = "fits" if other.fits else "does not fit"
        less, slower = plan.peak - other.peak, other.hours / plan.hours
        lines.append(
            f"    {name:<48} -{less / 1e9:.3g} GB ({fits}), hours x {slower:.2f}"
        )
    return "\n".join(lines)


def checks_text(checks: Sequence[Check]) -> str:
    """A line per check."""
    return "\n".join(
        f"  {'ok' if check.ok else 'NO':<3} {check.name:<24} {check.detail}"
        for check in checks
    )


def compare(plan: Plan, measured: Mapping[str, Any]) -> str:
    """Predicted against measured, after a run. measured: peak_bytes (the largest of
    all processes), seconds_per_update."""
    lines = [f"{'':<20}{'predicted':>12}{'measured':>12}"]
    bytes_ = measured["peak_bytes"]
    lines.append(f"{'peak, GB':<20}{plan.peak / 1e9:>12.3f}{bytes_ / 1e9:>12.3f}")
    seconds = sum(plan.seconds.values())
    taken = measured["seconds_per_update"]
    lines.append(f"{'seconds an update':<20}{seconds:>12.3g}{taken:>12.3g}")
    return "\n".join(lines)


def measured(stage: str | Path) -> dict[str, float]:
    """What a finished, launched training of that stage folder took: peak_bytes of the
    process that needed most, seconds_per_update of the last call, and, of stage 1,
    longest_row in tokens. ValueError if there is none."""
    folder = Path(stage)
    paths = list((folder / "launch").glob("rank-*.json"))
    states = [read_json(path) for path in paths]
    if not states or not (folder / "summary.json").is_file():
        raise ValueError(
            f"{stage}: no launched training was finished there (no launch/rank-0.json "
            "and summary.json); give a stage folder, as runs/full/sft_lora"
        )
    summary = read_json(folder / "summary.json")
    updates = summary["steps"] - states[0].get("first_step", 0)
    took = {
        "peak_bytes": max(state["peak_bytes"] for state in states),
        "seconds_per_update": summary["seconds"] / max(1, updates),
    }
    rows = [state["longest_row"] for state in states if "longest_row" in state]
    return took | ({"longest_row": max(rows)} if rows else {})


IMAGES = 4  # images of a prompt, where the data are not at hand: an assumption
TEXT = 150  # tokens of a prompt besides its images: an assumption
CHECKPOINTS = 3  # on disk at once: save_total_limit 2 and the one being written


# ---------------------------------------------------------------- what a row holds


def data_files(config: Mapping[str, Any], stage: Stage) -> tuple[str, str | None]:
    """(file, image root) of a stage's released data; ("", None) for MiniMIG."""
    data = config["data"]
    key = "stage1_file" if stage == "sft" else "stage2_file"
    return data.get(key) or "", data.get("image_root")


def layout_of(
    config: Mapping[str, Any],
    stage: Stage,
    strategy: str | None = None,
    processes: int | None = None,
    report: Mapping[str, Any] | None = None,
) -> Layout:
    """Where and on what a stage trains. report: the audit of its data, which knows
    the prompts' lengths. Without it a prompt is IMAGES of full size and TEXT, a usual
    row half of that, and the longest the cut-off where the scale has one."""
    launch = config.get("launch", {})
    processes = processes or launch.get("processes", 1)
    strategy = strategy or launch.get("strategy", "ddp" if processes > 1 else "single")
    if processes == 1:
        strategy = "single"
    elif strategy == "single":
        strategy = "zero3" if config["sft"].get("adapter") == "none" else "ddp"
    model, section = config["model"], config[stage]
    vision = cost_model.vision_config(model["name_or_path"])
    side = vision.patch_size * vision.spatial_merge_size
    images = IMAGES * (model.get("max_pixels", 12_845_056) // side**2)
    reply = section.get("max_completion_length", 256)
    limit = section.get("max_length") or 0
    if report and report["samples"]:
        longest = report["prompt_tokens"]["max"] + reply
        typical = int(report["prompt_tokens"]["median"]) + reply
        images = min(images, longest - reply)
    else:
        guess = images + TEXT + reply
        longest, typical = limit or guess, guess // 2
    longest = min(longest, limit or longest)
    return Layout(strategy, processes, longest, reply, images, typical)


def with_rows_of(layout: Layout, longest: int) -> Layout:
    """The layout with the longest row that a training had, in tokens."""
    return dataclasses.replace(
        layout,
        tokens=longest,
        reply=min(layout.reply, longest),
        images=min(layout.images, longest),
        typical=min(layout.typical, longest),
    )


def rows_of(config: Mapping[str, Any], stage: Stage) -> int:
    """Training samples: the scale's number, or the paper's where it takes all."""
    name, released = ("stage1", 90_000) if stage == "sft" else ("stage2", 10_000)
    return config["data"].get(name) or released


# ---------------------------------------------------------------- checks


def check_packages(config: Mapping[str, Any], strategy: str) -> list[Check]:
    """The GPU packages that these settings need, really imported."""
    needed = {}
    if config["model"].get("attn_implementation") == "flash_attention_2":
        needed["flash_attn"] = "model.attn_implementation=sdpa"
    if config.get("grpo", {}).get("use_vllm"):
        needed["vllm"] = "grpo.use_vllm=false"
    if strategy in ("zero2", "zero3"):
        needed["deepspeed"] = "launch.strategy=fsdp2"
    if config["sft"].get("adapter") == "qlora":
        needed["bitsandbytes"] = "sft.adapter=lora"
    made = []
    for name, instead in needed.items():
        problem = "" if importlib.util.find_spec(name) else "not installed"
        if not problem:
            try:
                importlib.import_module(name)
            except (ImportError, OSError) as error:  # built for another torch or CUDA
                problem = f"does not import: {error}"
        remedy = f"{problem}; pip install '.[gpu]', or set {instead}"
        detail = remedy if problem else "ok"
        if name == "vllm" and not problem:
            installed = importlib.import_module(name).__version__
            detail = vllm.version_note(installed)
        made.append(Check(f"package {name}", not problem, detail))
    if "vllm" in needed:
        problem = vllm.conflict(config)
        made.append(Check("settings for vLLM", not problem, problem or "ok"))
    return made


def disk_needed(plan: Plan) -> int:
    """Bytes that a stage writes: checkpoints with their optimiser, and the result."""
    total, trained = plan.parameters["total"], plan.parameters["total"]["trainable"]
    adapter = plan.parameters["adapter"]["parameters"]
    weights = 2 * total["parameters"] if not adapter else 4 * adapter
    return int(CHECKPOINTS * (weights + 12 * trained) + weights)


def check_disk(folder: str | Path, needed: int) -> Check:
    """Room for `needed` bytes where `folder` is or will be."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    detail = f"{needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free at {place}"
    if free < needed:
        detail += "; free some, or set RUN_DIR to another disk"
    return Check("disk", free >= needed, detail)


def check_port(port: int, what: str, taken: bool = False) -> Check:
    """A port of this machine that is free, or (a server's) that answers."""
    with socket.socket() as probe:
        probe.settimeout(1)
        answers = probe.connect_ex(("127.0.0.1", port)) == 0
    state = "answers" if answers else "is free"
    remedy = "set launch.port to another"
    if taken:
        remedy = "start the server first: trl vllm-serve --model NAME"
    detail = f"{port} {state}" + ("" if answers == taken else f"; {remedy}")
    return Check(what, answers == taken, detail)


def check_data(
    config: Mapping[str, Any], stage: Stage, images: bool
) -> tuple[Check, dict | None]:
    """The audit of the stage's file, every image opened if `images`; its report."""
    file, root = data_files(config, stage)
    name = f"data {stage}"
    if not file:
        return Check(name, True, "MiniMIG, made by notebook 01"), None
    if not Path(file).is_file():
        return Check(name, False, f"{file} is missing; make data"), None
    if root and not Path(root).is_dir():
        return Check(name, False, f"image root {root} is missing; make data"), None
    pixels = config["model"].get("max_pixels", 401_408)
    report = audit(file, image_root=root if images else None, max_pixels=pixels)
    found = ", ".join(f"{kind} {n}" for kind, n in report["counts"].items())
    detail = f"{report['samples']} samples; {found or 'no problem'}"
    if report["breaks_training"]:
        detail += f"; see python -m univg_nb audit {file}"
    return Check(name, not report["breaks_training"], detail), report


def check_gpus(processes: int, nodes: int) -> Check:
    """As many GPUs on this machine as it is to run processes."""
    import torch

    here, found = processes // nodes, torch.cuda.device_count()
    detail = f"{found} found, {here} asked for on this machine"
    remedy = "; set launch.processes (make: GPUS=..)" if found < here else ""
    return Check("GPUs", found >= here, detail + remedy)


def check_machine(
    config: Mapping[str, Any], strategy: str, processes: int
) -> list[Check]:
    """Packages, GPUs and ports of this machine."""
    launch, grpo = config.get("launch", {}), config["grpo"]
    made = check_packages(config, strategy)
    made.append(check_gpus(processes, launch.get("nodes", 1)))
    if launch.get("port"):
        made.append(check_port(launch["port"], "port of the rendezvous"))
    if grpo.get("use_vllm") and grpo.get("vllm_mode") == "server":
        server = urlsplit(vllm.server_address(grpo))
        if server.hostname in ("0.0.0.0", "127.0.0.1", "localhost"):
            made.append(check_port(server.port or 80, "vLLM server", taken=True))
        problem = vllm.server_problem(grpo)
        made.append(Check("version of the vLLM server", not problem, problem or "ok"))
    return made


# ---------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `plan`."""
    parser.add_argument("config", help="a shipped scale's name or a .yaml file")
    parser.add_argument("--gpu", default="H100-80G", help=", ".join(cost_model.GPUS))
    parser.add_argument("--gpus", type=int, help="default: the scale's")
    parser.add_argument("--strategy", choices=STRATEGIES)
    parser.add_argument("--stage", choices=("sft", "grpo"), help="default: both")
    parser.add_argument("--mfu", type=float, default=0.35, help="assumed, 0..1")
    parser.add_argument("--price", type=float, help="of one GPU hour, any currency")
    parser.add_argument("--out", default="runs", help="where the run will be written")
    parser.add_argument(
        "--measured",
        metavar="STAGE_FOLDER",
        help="set what that training took beside the plan (with --stage, and as "
        "config the scale.yaml of that run)",
    )
    parser.add_argument("--images", action="store_true", help="open every image too")
    parser.add_argument(
        "--account-only", action="store_true", help="do not check this machine"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE"
    )


def main(options: argparse.Namespace) -> int:
    """Print the plan; the exit code of the module's first lines."""
    if options.measured and not options.stage:
        raise ValueError("--measured is of one stage: add --stage sft or --stage grpo")
    config = runs.load_scale(options.config)
    for assignment in options.set:
        config = runs.override(config, assignment)
    gpu, good, needed = cost_model.find_gpu(options.gpu), True, 0
    checks: list[Check] = []
    for stage in [options.stage] if options.stage else ["sft", "grpo"]:
        report = None
        if not options.account_only:
            check, report = check_data(config, stage, options.images)
            checks.append(check)
        where = layout_of(config, stage, options.strategy, options.gpus, report)
        took = measured(options.measured) if options.measured else {}
        if "longest_row" in took:
            where = with_rows_of(where, took["longest_row"])
        rows = rows_of(config, stage)
        whole = spread(config, stage, where.processes)
        made = cost_model.plan(whole, stage, where, gpu, rows, options.mfu)
        print(plan_text(made, options.gpu, options.price))
        if not made.fits:
            better = cost_model.knobs(whole, made, rows, options.mfu)
            print(knobs_text(made, better))
        if took:
            print(compare(made, took))
        print()
        good, needed = good and made.fits, needed + disk_needed(made)
    print(f"assumed: MFU {options.mfu:g}; hours are a model, not a measurement")
    if not options.account_only:
        checks += check_machine(config, where.strategy, where.processes)
        checks.append(check_disk(options.out, needed))
        print(checks_text(checks))
    return int(not good or not all(check.ok for check in checks))

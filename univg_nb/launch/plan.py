"""Before a long run: does it fit, how long will it take, is everything there?

    python -m univg_nb plan full --gpu H100-80G --gpus 8

Prints the account of both stages and the checks of this machine. Exit code 0: it fits
and all checks pass; 1: something does not.
"""

import importlib
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from univg_nb.config import add_scale_arguments, load_scale, make_parser, spread, within
from univg_nb.data.audit import audit
from univg_nb.families import scale_limit
from univg_nb.fast import vllm
from univg_nb.io import read_json
from univg_nb.launch import cost
from univg_nb.launch.cost import Layout, Plan, Stage

IMAGES = 4  # images of a prompt, where the data are not at hand: an assumption
TEXT = 150  # tokens of a prompt besides its images: an assumption
CHECKPOINTS = 3  # on disk at once: save_total_limit 2 and the one being written
# stage -> keys of its file and of its number of rows, and the rows of the paper
DATA: dict[Stage, tuple[str, str, int]] = {
    "sft": ("stage1_file", "stage1", 90_000),
    "grpo": ("stage2_file", "stage2", 10_000),
}


@dataclass(frozen=True)
class Check:
    """One thing looked at: its name, whether it is all right, and what was seen."""

    name: str
    ok: bool
    detail: str


# ---------------------------------------------------------------- what a row holds


def choose_layout(
    config: Mapping[str, Any],
    stage: Stage,
    strategy: str | None = None,
    processes: int | None = None,
    report: Mapping[str, Any] | None = None,
    longest: int | None = None,
) -> Layout:
    """Return where and on what a stage trains; by default as its scale says.

    `report`, the audit of its data, knows the prompts' lengths. Without it a prompt is
    IMAGES of full size and TEXT, a usual row half of that, and the longest row the
    cut-off where the scale has one. `longest` is the tokens of the longest row, if a
    training has shown it.
    """
    launch, model, section = config.get("launch", {}), config["model"], config[stage]
    processes = processes or launch.get("processes", 1)
    strategy = cost.choose_strategy(processes, strategy or launch.get("strategy"))
    vision = cost.load_architecture(model["name_or_path"]).vision_config
    side = vision.patch_size * vision.spatial_merge_size
    pixels = scale_limit(model.get("max_pixels", 12_845_056), side)
    images = IMAGES * (pixels // side**2)
    reply = section.get("max_completion_length", 256)
    limit = section.get("max_length") or 0
    if report and report["samples"]:
        tokens = report["prompt_tokens"]["max"] + reply
        typical = int(report["prompt_tokens"]["median"]) + reply
        images = min(images, tokens - reply)
    else:
        guess = images + TEXT + reply
        tokens, typical = limit or guess, guess // 2
    tokens = longest or min(tokens, limit or tokens)
    if longest:
        reply, images, typical = (min(n, longest) for n in (reply, images, typical))
    return Layout(strategy, processes, tokens, reply, images, typical)


def account_by_precision(
    config: Mapping[str, Any], gpu: cost.Gpu, count: int = 8
) -> dict[str, dict[str, float]]:
    """Return what stage 1 of all language weights takes on one of its GPUs, in GB.

    In pure bf16 a trained parameter costs 8 bytes: weight, gradient and two moments of
    2 each. In mixed precision it costs 16: the moments have 4 bytes each, and there is
    an fp32 copy of the weight. One process and DDP train in pure bf16, ZeRO and FSDP in
    mixed precision.

    Args:
        config: a whole scale without an adapter, its weights in bf16.
        gpu: the card.
        count: GPUs of DDP, ZeRO-2 and ZeRO-3.

    Returns:
        {way: {"weights", "gradients", "optimizer", "buffers", "rest", "peak"}}; rest is
        activations, logits and runtime (the tower works before them).
    """
    ways = {
        "pure bf16, 1 GPU": ("single", 1),
        f"pure bf16, DDP on {count}": ("ddp", count),
        "mixed, 1 GPU": ("zero3", 1),  # nothing to cut
        f"mixed, ZeRO-2 on {count}": ("zero2", count),
        f"mixed, ZeRO-3 on {count}": ("zero3", count),
    }
    rows, table = choose_layout(config, "sft"), {}
    for way, (strategy, processes) in ways.items():
        where = replace(rows, strategy=strategy, processes=processes)
        plan = Plan(config, "sft", where, gpu, 1)
        row = {k: plan.memory[k] for k in ("weights", "gradients", "optimizer")}
        row["buffers"] = plan.memory["buffers"]
        row["rest"] = plan.peak - sum(row.values())
        table[way] = {k: v / 1e9 for k, v in {**row, "peak": plan.peak}.items()}
    return table


# ---------------------------------------------------------------- as text


def format_plan(plan: Plan, gpu: str, price: float | None = None) -> str:
    """Return the account of a stage as text; `price` is that of a GPU hour."""
    where, total = plan.layout, plan.parameters["total"]
    verdict = plan.gpu.judge(plan.peak).replace("does not fit", "DOES NOT FIT")
    parts = ", ".join(f"{k} {v:.2g}" for k, v in plan.seconds.items())
    total_price = plan.hours * where.processes * (price or 0)
    money = f", {total_price:,.0f} at {price:g} a GPU hour" if price else ""
    return "\n".join(
        [
            f"{plan.stage}: {where.processes} x {gpu}, {where.strategy}; "
            f"{total['parameters'] / 1e9:.3g} B parameters, "
            f"{total['trainable'] / 1e9:.3g} B trained",
            *(f"  {k:<12}{size / 1e9:10.3f} GB" for k, size in plan.memory.items()),
            f"  {'peak':<12}{plan.peak / 1e9:10.3f} GB of {plan.gpu.memory_gb:g} GB: "
            f"{verdict}",
            f"  longest row {where.tokens} tokens, usual {where.typical}; an update: "
            f"{plan.batch['rows']} rows, {plan.batch['prompts']} prompts, "
            f"{plan.batch['tokens']} tokens, {sum(plan.flops.values()):.3g} FLOPs",
            f"  seconds an update: {parts}",
            f"  {plan.updates} updates, {plan.hours:.3g} hours{money}",
        ]
    )


def format_variants(plan: Plan, better: Sequence[tuple[str, Plan]]) -> str:
    """Return what would help most, with its predicted effect, as text."""
    lines = ["  what lowers the peak, changes of the recipe last:"]
    width = max((len(name) for name, _ in better), default=0)
    for name, other in better:
        kind = "another recipe" if name.startswith(cost.OTHER_RECIPE) else "same recipe"
        needed = f"needs {other.peak / 1e9:.3g} GB ({plan.gpu.judge(other.peak)})"
        slower = f"hours x {other.hours / plan.hours:.2f}"
        lines.append(f"    {name:<{width}}  {needed}, {slower}, {kind}")
    return "\n".join(lines)


def read_measured(stage: str | Path) -> dict[str, Any]:
    """Read what the finished, launched training in a stage folder took.

    Returns peak_bytes of the process that needed most, seconds_per_update of the last
    call, and longest_row in tokens (of stage 2 None). Raises ValueError if there is no
    such training.
    """
    folder = Path(stage)
    states = [read_json(path) for path in folder.glob("launch/rank-*.json")]
    if not states or not (folder / "summary.json").is_file():
        raise ValueError(
            f"{stage}: no launched training was finished there (no launch/rank-0.json "
            "and summary.json); give a stage folder, as runs/full/sft_lora"
        )
    summary = read_json(folder / "summary.json")
    updates = summary["steps"] - states[0].get("first_step", 0)
    rows = [state["longest_row"] for state in states if "longest_row" in state]
    return {
        "peak_bytes": max(state["peak_bytes"] for state in states),
        "seconds_per_update": summary["seconds"] / max(1, updates),
        "longest_row": max(rows, default=None),
    }


def compare(plan: Plan, measured: Mapping[str, Any]) -> str:
    """Return predicted against measured (from `read_measured`) as text."""
    seconds = sum(plan.seconds.values()), measured["seconds_per_update"]
    peaks = plan.peak / 1e9, measured["peak_bytes"] / 1e9
    return "\n".join(
        [
            f"{'':<20}{'predicted':>12}{'measured':>12}",
            f"{'peak, GB':<20}{peaks[0]:>12.3f}{peaks[1]:>12.3f}",
            f"{'seconds an update':<20}{seconds[0]:>12.3g}{seconds[1]:>12.3g}",
        ]
    )


# ---------------------------------------------------------------- checks


def check_packages(config: Mapping[str, Any], strategy: str) -> list[Check]:
    """Check the GPU packages that these settings need by importing them."""
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
        detail, ok = "ok", True
        try:
            module = importlib.import_module(name)
            if name == "vllm":
                detail = vllm.describe_version(module.__version__)
        except (ImportError, OSError) as error:  # also: built for another torch or CUDA
            absent = isinstance(error, ModuleNotFoundError) and error.name == name
            problem = "not installed" if absent else f"does not import: {error}"
            detail = f"{problem}; pip install '.[gpu]', or set {instead}"
            ok = False
        made.append(Check(f"package {name}", ok, detail))
    if "vllm" in needed:
        conflict = vllm.find_conflict(config)
        made.append(Check("settings for vLLM", not conflict, conflict or "ok"))
    return made


def check_disk(folder: str | Path, needed: float) -> Check:
    """Check for room for `needed` bytes where `folder` is or will be."""
    place = Path(folder).absolute()
    place = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(place).free
    detail = f"{needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free at {place}"
    if free < needed:
        detail += "; free some, or set RUN_DIR to another disk"
    return Check("disk", free >= needed, detail)


def check_port(port: int, what: str, taken: bool = False) -> Check:
    """Check a port of this machine: that it is free or, `taken`, that it answers."""
    with socket.socket() as probe:
        probe.settimeout(1)
        answers = probe.connect_ex(("127.0.0.1", port)) == 0
    detail = f"{port} answers" if answers else f"{port} is free"
    if answers and not taken:
        detail += "; set launch.port to another"
    if taken and not answers:
        detail += "; start the server first: trl vllm-serve --model NAME"
    return Check(what, answers == taken, detail)


def check_data(
    config: Mapping[str, Any], stage: Stage
) -> tuple[Check, dict[str, Any] | None]:
    """Audit the stage's file without opening images; return the report too."""
    name, data = f"data {stage}", config["data"]
    file, root = data.get(DATA[stage][0]), data.get("image_root")
    if not file:
        return Check(name, True, "MiniMIG, made by notebook 01"), None
    for path, what in ((file, ""), (root, "image root ")):
        if path and not Path(path).exists():
            return Check(name, False, f"{what}{path} is missing; make data"), None
    report = audit(file, max_pixels=config["model"].get("max_pixels", 401_408))
    found = ", ".join(f"{kind} {n}" for kind, n in report["counts"].items())
    detail = f"{report['samples']} samples; {found or 'no problem'}"
    if report["breaks_training"]:
        detail += f"; see python -m univg_nb audit {file}"
    return Check(name, not report["breaks_training"], detail), report


def check_machine(config: Mapping[str, Any], layout: Layout) -> list[Check]:
    """Check packages, GPUs and ports of this machine."""
    launch, grpo = config.get("launch", {}), config["grpo"]
    made = check_packages(config, layout.strategy)
    here, found = layout.processes // launch.get("nodes", 1), torch.cuda.device_count()
    remedy = "; set launch.processes (make: GPUS=..)" if found < here else ""
    detail = f"{found} found, {here} asked for on this machine{remedy}"
    made.append(Check("GPUs", found >= here, detail))
    if launch.get("port"):
        made.append(check_port(launch["port"], "port of the rendezvous"))
    if grpo.get("use_vllm") and grpo.get("vllm_mode") == "server":
        server = urlsplit(vllm.get_server_url(grpo))
        if server.hostname in ("0.0.0.0", "127.0.0.1", "localhost"):
            made.append(check_port(server.port or 80, "vLLM server", taken=True))
    return made


def count_disk_bytes(plan: Plan) -> int:
    """Return the bytes that a stage writes: checkpoints with optimizer, and result."""
    total, adapter = (plan.parameters[part] for part in ("total", "adapter"))
    weights = 4 * adapter["parameters"] or 2 * total["parameters"]
    return CHECKPOINTS * (weights + 12 * total["trainable"]) + weights


# ---------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `plan`; return 0, or 1 if something does not fit."""
    parser = make_parser(
        "plan",
        "Memory, time and price of a training, and what is missing here.",
        "full --gpu H100-80G --gpus 8",
    )
    add_scale_arguments(parser)
    parser.add_argument("--gpu", default="H100-80G", help=", ".join(cost.GPUS))
    parser.add_argument("--gpus", type=within(int, 1), help="default: the scale's")
    parser.add_argument("--stage", choices=tuple(DATA), help="default: both")
    parser.add_argument(
        "--mfu", type=within(float, 0.01, 1), default=0.35, help="assumed"
    )
    parser.add_argument(
        "--price", type=within(float, 0), help="of one GPU hour, any currency"
    )
    parser.add_argument("--out", default="runs", help="where the run will be written")
    parser.add_argument(
        "--measured",
        metavar="STAGE_FOLDER",
        help="set what that training took beside the plan (with --stage, and as "
        "scale the scale.yaml of that run)",
    )
    parser.add_argument(
        "--account-only", action="store_true", help="do not check this machine"
    )
    options = parser.parse_args(arguments)
    if options.measured and not options.stage:
        raise ValueError("--measured is of one stage: add --stage sft or --stage grpo")
    config = load_scale(options.scale, options.set)
    gpu = cost.find_gpu(options.gpu)
    took = read_measured(options.measured) if options.measured else {}
    longest = took.get("longest_row")
    checks, plans = [], []
    for stage in [options.stage] if options.stage else DATA:
        report = None
        if not options.account_only:
            check, report = check_data(config, stage)
            checks.append(check)
        layout = choose_layout(config, stage, None, options.gpus, report, longest)
        _, key, released = DATA[stage]
        samples = config["data"].get(key) or released
        whole = spread(config, stage, layout.processes)
        plan = Plan(whole, stage, layout, gpu, samples, options.mfu)
        plans.append(plan)
        print(format_plan(plan, options.gpu, options.price))
        if not plan.fits:
            print(format_variants(plan, cost.rank_variants(plan)))
        if took:
            print(compare(plan, took))
        print()
    print(f"assumed: MFU {options.mfu:g}, {cost.READING:.0%} of the bandwidth read")
    print(f"tight: under {cost.SPARE:.0%} free; hours are a model, not a measurement")
    if not options.account_only:
        needed = sum(map(count_disk_bytes, plans))
        checks += [*check_machine(config, layout), check_disk(options.out, needed)]
    for check in checks:
        print(f"  {'ok' if check.ok else 'NO':<3} {check.name:<24} {check.detail}")
    good = all(plan.fits for plan in plans) and all(check.ok for check in checks)
    return int(not good)

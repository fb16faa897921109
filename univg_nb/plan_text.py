"""The plan of a training, its checks and what it turned out to need, as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from univg_nb.cost_model import Plan
from univg_nb.runs import read_json


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
    folder = Path(stage) / "launch"
    if not (folder / "summary.json").is_file():
        raise ValueError(
            f"{stage}: no launched training was finished there (no {folder.name}/"
            "summary.json); give a stage folder, as runs/full/sft_lora"
        )
    summary = read_json(folder / "summary.json")
    states = [read_json(path) for path in folder.glob("rank-*.json")]
    updates = summary["steps"] - states[0].get("first_step", 0)
    took = {
        "peak_bytes": max(state["peak_bytes"] for state in states),
        "seconds_per_update": summary["seconds"] / max(1, updates),
    }
    rows = [state["longest_row"] for state in states if "longest_row" in state]
    return took | ({"longest_row": max(rows)} if rows else {})

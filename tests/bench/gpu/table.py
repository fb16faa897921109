"""Collects what the steps of run.sh have written so far into few files, and a table.

    python tests/bench/gpu/table.py WORK OUT

Only the standard library is used: it also works where a package is missing.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

FILES = {
    "gpu_environment.json": ("environment", "tests"),
    "gpu_grpo.json": ("passes", "update", "qwen3", "update_more"),
    "gpu_sft.json": ("sft",),
    "gpu_training.json": ("tiny", "base"),
    "gpu_memory.json": ("memory",),
}
LOG_END = 400_000  # characters of each log that are kept


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def status(work: Path, step: str) -> str:
    """ "ok", "failed", "timed out", "skipped" or "not run", with seconds."""
    path = work / "steps" / f"{step}.status"
    if not path.is_file():
        return "not run"
    words = path.read_text().split()
    if words[0] == "skipped":
        return "skipped: no time left"
    code, took, limit = (int(word) for word in words)
    name = "ok" if not code else "timed out" if code in (124, 137) else "failed"
    return f"{name}, {took} s (limit {limit} s)"


def rows_of(entries: list[dict[str, Any]]) -> list[str]:
    """A line for each measurement: its name, then numbers, or its error."""
    lines = []
    for entry in entries:
        if "error" in entry:
            last = entry["error"].strip().splitlines()[-1]
            lines.append(f"  {entry['name']:<34} ERROR {last[:110]}")
            continue
        shown = {k: v for k, v in entry.items() if k in entry.get("show", ())}
        text = "  ".join(f"{key} {short(value)}" for key, value in shown.items())
        lines.append(f"  {entry['name']:<34} {text}")
    return lines


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + " ".join(short(v) for v in value) + "]"
    return str(value)


def main(work: Path, out: Path) -> None:
    """Write OUT/gpu_*.json, logs.txt.gz and table.txt."""
    head = read(work / "steps" / "device.json") or {}
    lines = [str(head.get("device", "no device line")), ""]
    for name, steps in FILES.items():
        found = {step: read(work / "steps" / f"{step}.json") for step in steps}
        for step in steps:
            lines.append(f"{step}: {status(work, step)}")
            lines += rows_of((found[step] or {}).get("entries", []))
        made = {
            step: {"status": status(work, step), **value}
            for step, value in found.items()
            if value is not None
        }
        if made:
            text = json.dumps({**head, "steps": made}, indent=1, ensure_ascii=False)
            (out / name).write_text(text + "\n", encoding="utf-8")
    (out / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with gzip.open(out / "logs.txt.gz", "wt", encoding="utf-8") as handle:
        for log in sorted((work / "logs").glob("*.log")):
            text = log.read_text(encoding="utf-8", errors="replace")
            handle.write(f"==== {log.name}\n{text[-LOG_END:]}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""One GRPO update: stock TRL against shared prompts. `make bench` runs it.

Writes notebooks/reference_runs/bench_grpo.json and .png; prints the table and the bars.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from univg_nb import io, runs

HERE = Path(__file__).parent
OUT = runs.repo_root(HERE) / "notebooks" / "reference_runs" / "bench_grpo.json"
MAIN = {"images": 6, "group": 8}  # the case that the bars are about
CASES = [
    {"images": 1, "group": 4},
    {"images": 1, "group": 8},
    {"images": 3, "group": 8},
    {"images": 6, "group": 4},
    MAIN,
    {"images": 6, "group": 16},
]
TINY = {"completion": 64, "side": 128, "prompts": 2}
# Prompt over reply as at full scale: the 3,000 tokens of six images to 256. The tokens
# of the policy pass grow by (P + 16C) / (P + 8C), so the longer the prompt, the less.
SHORT = TINY | {"completion": 36}
LARGE = {"completion": 256, "side": 448, "prompts": 1}
LARGE_MODELS = ("Qwen2-VL-2B-Instruct", "Qwen2-VL-7B-Instruct")


def run_case(case: dict | list[dict], folder: Path, on_gpu: bool) -> dict:
    """One case, or two in turns, in a process of its own, with all cores."""
    source, result = folder / "case.json", folder / "result.json"
    source.write_text(json.dumps(case))
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    script = [sys.executable, str(HERE / "grpo_update.py"), str(source), str(result)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-4000:]
    return io.read_json(result)


def grown(base: dict, folder: Path, on_gpu: bool) -> dict:
    """`grpo_update.in_turns` for groups of 16 over groups of 8."""
    case = {**base, **MAIN, "way": "shared", "updates": 3}
    return run_case([case, {**case, "group": 16}], folder, on_gpu)


def flop_bound(row: dict) -> float:
    """How much fewer tokens go through the policy when a group shares its prompt."""
    prompt, reply, group = row["prompt"], row["completion"], row["group"]
    return group * (prompt + reply) / (prompt + group * reply)


def table_of(rows: list[dict]) -> pd.DataFrame:
    keys = ("images", "prompt", "completion", "group", "way")
    costs = ("prompt_tokens", "images_encoded", "base_mb", "peak_mb")
    return pd.DataFrame(
        [
            {k: row[k] for k in keys}
            | {k: round(v, 3) for k, v in row["seconds"].items()}
            | {k: row[k] for k in costs}
            for row in rows
        ]
    )


def pair(rows: list[dict], **case: int) -> tuple[dict, dict]:
    """(stock, shared) of one case."""
    found = [r for r in rows if all(r[k] == v for k, v in case.items())]
    return tuple(next(r for r in found if r["way"] == w) for w in ("stock", "shared"))


def bars(rows: list[dict], growth: float | None = None) -> list[dict]:
    """What the step has to reach, and whether it does. growth: time of an update with
    groups of 16 over that with groups of 8, where it has been measured."""
    stock, shared = pair(rows, **MAIN)
    gain = {k: v / shared["seconds"][k] for k, v in stock["seconds"].items()}
    added = [row["peak_mb"] - row["base_mb"] for row in (shared, stock)]
    found = [
        ("policy forward + backward, share of FLOP bound", ">=", 0.8,
         gain["policy"] / flop_bound(stock)),
        ("whole update, times faster than stock", ">=", 2.5, gain["update"]),
        ("G 16 over G 8, time of an update", "<=", 1.5, growth),
        ("memory an update adds, share of stock", "<=", 0.5, added[0] / added[1]),
    ]  # fmt: skip
    return [
        {
            "bar": name,
            "needed": f"{sign} {limit}",
            "measured": round(value, 3),
            "met": bool(value >= limit if sign == ">=" else value <= limit),
        }
        for name, sign, limit, value in found
        if value is not None
    ]


def draw(rows: list[dict], path: Path) -> None:
    """Seconds of the policy pass and of the update against G and prompt length."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for column, (along, fixed) in enumerate(
        (("group", {"images": 6}), ("prompt", {"group": 8}))
    ):
        chosen = [r for r in rows if all(r[k] == v for k, v in fixed.items())]
        for line, part in enumerate(("policy", "update")):
            ax = axes[line, column]
            for way, color in (("stock", "0.5"), ("shared", "tab:blue")):
                some = sorted(
                    (r for r in chosen if r["way"] == way), key=lambda r: r[along]
                )
                x = [r[along] for r in some]
                y = [r["seconds"][part] for r in some]
                ax.plot(x, y, "o-", color=color, label=way)
                if way == "stock" and part == "policy":
                    least = [v / flop_bound(r) for v, r in zip(y, some, strict=True)]
                    ax.plot(x, least, "k--", label="stock / FLOP bound")
            ax.set(
                ylim=(0, None), xlabel={"group": "G", "prompt": "prompt tokens"}[along]
            )
            ax.set_ylabel(f"{part}, s")
            name, value = next(iter(fixed.items()))
            ax.set_title(f"{'G' if name == 'group' else name} = {value}")
    axes[0, 0].legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


@pytest.mark.bench
def test_update_on_the_cpu(tmp_path):
    began, rows = time.perf_counter(), []
    for case in CASES:
        rows += [
            run_case({**TINY, **case, "way": way}, tmp_path, False)
            for way in ("stock", "shared")
        ]
    OUT.parent.mkdir(exist_ok=True)
    report = {
        "device": rows[0]["device"],
        "versions": runs.versions(),
        "commit": runs.git_hash(),
        "seconds": round(time.perf_counter() - began),
        "bars": bars(rows),
        "rows": rows,
    }
    io.write_json(OUT, report)
    draw(rows, OUT.with_suffix(".png"))
    print("\n" + table_of(rows).to_string(index=False))
    print(pd.DataFrame(report["bars"]).to_string(index=False))
    for case in CASES:
        stock, shared = pair(rows, **case)
        # each of 3 passes holds a prompt once instead of G times
        prompts = 3 * TINY["prompts"]
        assert stock["prompt_tokens"] >= prompts * case["group"] * stock["prompt"]
        assert shared["prompt_tokens"] <= prompts * shared["prompt"]
        assert shared["images_encoded"] == TINY["prompts"] * case["images"]


@pytest.mark.bench
def test_growth_on_the_cpu(tmp_path):
    """Added to the report of the test above."""
    report = io.read_json(OUT)
    growth = grown(TINY, tmp_path, False) | {"commit": runs.git_hash()}
    report |= {
        "bars": bars(report["rows"], growth["ratio"]),
        "growth": growth,
        "growth_of_short_replies": grown(SHORT, tmp_path, False),
    }
    io.write_json(OUT, report)
    print(pd.DataFrame(report["bars"]).to_string(index=False))
    print(report["growth"], report["growth_of_short_replies"])


@pytest.mark.bench
@pytest.mark.gpu
@pytest.mark.parametrize("model", LARGE_MODELS)
def test_update_on_a_gpu(tmp_path, model):
    if not torch.cuda.is_available():
        message = f"no NVIDIA GPU here: the shapes of {model} were not measured"
        print(message)
        pytest.skip(message)
    rows = [
        run_case({**LARGE, **case, "way": way, "model": model}, tmp_path, True)
        for case in CASES
        for way in ("stock", "shared")
    ]
    report = {"device": rows[0]["device"], "versions": runs.versions()}
    growth = grown({**LARGE, "model": model}, tmp_path, True)
    report |= {"commit": runs.git_hash(), "bars": bars(rows, growth["ratio"])}
    report |= {"growth": growth, "rows": rows}
    io.write_json(OUT.with_name(f"bench_grpo_{model}.json"), report)
    print("\n" + table_of(rows).to_string(index=False))
    print(pd.DataFrame(report["bars"]).to_string(index=False))

"""What was measured on a GPU: the records of tests/bench/gpu/run.sh, gpu_*.json."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from univg_nb.figures.drawing import BLUE, GRAY, GREEN, ORANGE
from univg_nb.figures.plots import create_axes
from univg_nb.io import read_json

NOTHING = (
    "No measurement on a GPU is recorded here (gpu_*.json); "
    "`tests/bench/gpu/run.sh OUT` makes one."
)
COLUMNS = ["device", "measured", "way", "seconds", "memory_gb", "speedup"]
_PLAIN = ("whole rows, sdpa", "stock", "plain")  # what the other ways are compared with


def load_gpu_records(folder: str | Path) -> pd.DataFrame:
    """Load the times of all gpu_*.json files of a folder, dry runs left out.

    Returns:
        COLUMNS, a row for each device, thing that was measured (passes of a GRPO group,
        whole updates, steps of SFT) and way of computing it: seconds, peak memory of
        tensors in GB, and how many times as fast as the plain way (1 for that one, NaN
        where it was not measured). No rows without such a file.
    """
    rows = []
    for path in sorted(Path(folder).glob("gpu_*.json")):
        record = read_json(path)
        for step in record["steps"].values():
            if not step.get("dry"):
                rows += [(record["device"], *row) for row in _list_times(step)]
    made = pd.DataFrame(rows, columns=COLUMNS[:-1])
    plain = made[made["way"].isin(_PLAIN)]
    times = plain.set_index(["device", "measured"])["seconds"].to_dict()
    keys = zip(made["device"], made["measured"], strict=True)
    before = pd.Series([times.get(key, float("nan")) for key in keys], dtype=float)
    return made.assign(speedup=before / made["seconds"])


def _list_times(step: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """Yield (measured, way, seconds, GB) of the entries that a step finished."""
    for entry in step.get("entries", []):
        name, _, way = entry["name"].rpartition(": ")
        name, memory = name.replace("-Instruct", ""), entry.get("allocated_gb", 0.0)
        if "policy_s" in entry:
            yield f"{name}: policy pass", way, entry["policy_s"], memory
            yield f"{name}: reference pass", way, entry["reference_s"], memory
        elif "updates_seconds" in entry:
            yield f"{name}: update", way, entry["seconds"]["update"], memory
        elif "step_s" in entry and "adapter" in entry:
            weights = "all weights" if entry["adapter"] == "none" else "LoRA"
            label = f"{name.split()[1]} {weights}: SFT step"
            yield label, way, entry["step_s"], memory


def format_gpu_line(records: pd.DataFrame) -> str:
    """Return the devices of the records as a sentence, or that there are none."""
    if records.empty:
        return NOTHING
    return f"Measured on: {'; '.join(dict.fromkeys(records['device']))}."


def compare_ways(records: pd.DataFrame) -> pd.DataFrame:
    """Put the plain way and the fastest other one side by side, where both have a time.

    Returns a row for each device and thing that was measured, under its name: device,
    plain s, ours s, times as fast, plain GB, ours GB.
    """
    keys = ["device", "measured"]
    is_plain = records["way"].isin(_PLAIN)
    ours = records[~is_plain].sort_values("seconds").drop_duplicates(keys)
    both = records[is_plain].merge(ours, on=keys, suffixes=("_plain", ""))
    return pd.DataFrame(
        {
            "measured": both["measured"],
            "device": both["device"],
            "plain, s": both["seconds_plain"],
            "ours, s": both["seconds"],
            "times as fast": both["speedup"],
            "plain, GB": both["memory_gb_plain"],
            "ours, GB": both["memory_gb"],
        }
    ).set_index("measured")


def plot_gpu_speedups(records: pd.DataFrame) -> Figure:
    """Draw how many times as fast each way is as the plain one, a color per device.

    Raises:
        ValueError: nothing was measured in two ways.
    """
    shown = records[records["speedup"].notna() & ~records["way"].isin(_PLAIN)]
    if shown.empty:
        raise ValueError(f"no way to compare with: {format_gpu_line(records)}")
    figure, ax = create_axes(None, 8.5, 1.4 + 0.36 * len(shown))
    places = pd.Series(range(len(shown))[::-1], index=shown.index)
    for number, (device, rows) in enumerate(shown.groupby("device", sort=False)):
        color = (BLUE, ORANGE, GREEN)[number % 3]
        bars = ax.barh(places[rows.index], rows["speedup"], 0.62, color=color)
        bars.set_label(device)
        texts = [
            f"{row.speedup:.1f} × ({row.seconds:.2g} s, {row.memory_gb:.1f} GB)"
            for row in rows.itertuples()
        ]
        ax.bar_label(bars, texts, padding=4, fontsize=9)
    labels = [f"{row.measured}, {row.way}" for row in shown.itertuples()]
    ax.set_yticks(places, labels, fontsize=9)
    ax.axvline(1, color=GRAY, linewidth=1, linestyle="--")
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.set_xlim(0, 1.5 * float(shown["speedup"].max()))
    ax.set_xlabel("times as fast as whole rows, stock TRL or plain SFTTrainer")
    figure.legend(loc="outside upper center", frameon=False, ncols=2, fontsize=9)
    return figure

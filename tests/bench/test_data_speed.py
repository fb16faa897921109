"""The data layer's measurements: `make bench`. Printed, and held against the bars."""

import json
import os
import random
import subprocess
import sys
import time

import pytest

from univg_nb.data.audit import audit

pytestmark = pytest.mark.bench

ITEMS = 630_000  # boxed turns, as many as MGrounding-630k's name says
LEAST_SPEED = 50_000  # items a second of processor time, JSON parse included
MOST_MEMORY = 300  # MiB
MOST_SECONDS = 5  # audit of the MIG-Bench annotation

# In a process of its own, so that its peak memory is the reader's.
READ = """
import json, resource, sys, time
from univg_nb.data.files import iter_samples
wall, cpu = time.perf_counter(), time.process_time()
count = sum(1 for _ in iter_samples(sys.argv[1], image_root="data"))
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
unit = 2**20 if sys.platform == "darwin" else 2**10
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
print(json.dumps({"items": count, "wall": wall, "cpu": cpu, "peak": peak}))
"""


def dialogue(rng: random.Random) -> tuple[dict, int]:
    """A row in the manner of MGrounding-630k, and its boxed turns."""
    count, turns = rng.choice((2, 2, 3, 4, 5)), rng.choice((1, 1, 1, 2, 3))
    conversation = []
    for turn in range(turns):
        xs, ys = (sorted(rng.sample(range(1000), 2)) for _ in "xy")
        human = (
            "<image>\n"
            * count
            * (turn == 0)
            + "Which region of the images shows <|object_ref_start|>the person in a "
            f"red coat, number {rng.randrange(99)}<|object_ref_end|>? Give its box."
        )
        box = f"<|box_start|>({xs[0]},{ys[0]}),({xs[1]},{ys[1]})<|box_end|>"
        conversation += [{"from": "human", "value": human}]
        conversation += [{"from": "gpt", "value": f"It is at the left. {box}"}]
    folder = "./MGrounding-630k/Group_Grounding/images"
    names = [f"{folder}/{rng.randrange(10**9):09d}.jpg" for _ in range(count)]
    row = {"images": names, "conversations": conversation, "type": "group_grounding"}
    return row, turns


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_streaming_mgrounding(tmp_path, suffix):
    rng = random.Random(0)
    pool = [(json.dumps(row)[1:], n) for row, n in (dialogue(rng) for _ in range(5000))]
    path, lines = tmp_path / f"m.{suffix}", suffix == "jsonl"
    made = row = 0
    with path.open("w") as out:
        out.write("" if lines else "[\n")
        while made < ITEMS:
            text, turns = pool[row % len(pool)]
            out.write(",\n" if row and not lines else "\n" if row else "")
            out.write(f'{{"id": "group_{row:07d}", {text}')
            made, row = made + turns, row + 1
        out.write("\n" if lines else "\n]\n")
    command = [sys.executable, "-c", READ, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(
        f"\n{suffix}: {found['items']} items in {row} rows, "
        f"{path.stat().st_size / 2**20:.0f} MiB: {found['cpu']:.1f} s of processor "
        f"time ({found['items'] / found['cpu']:.0f} items/s), {found['wall']:.1f} s by "
        f"the clock, {found['peak']:.0f} MiB at most"
    )
    assert found["items"] == made
    assert found["peak"] < MOST_MEMORY
    assert found["items"] / found["cpu"] > LEAST_SPEED


@pytest.mark.skipif(
    not os.environ.get("UNIVG_MIG_BENCH"), reason="UNIVG_MIG_BENCH is not set"
)
def test_audit_of_the_real_annotation():
    began, cpu = time.perf_counter(), time.process_time()
    report = audit(os.environ["UNIVG_MIG_BENCH"])
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"\naudit: {report['rows']} rows in {seconds:.2f} s ({cpu:.2f} s processor)")
    assert cpu < MOST_SECONDS

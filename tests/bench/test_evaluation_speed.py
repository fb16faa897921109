"""Speed of evaluation: `make bench`. Printed, and held against the bars."""

import time

import pytest
import torch

from univg_nb import models, samples, scoring
from univg_nb.boxes import MODES, parse_box
from univg_nb.generation import generate
from univg_nb.minimig import export

pytestmark = pytest.mark.bench

LEAST_GAIN = 5  # batched against one at a time
MOST_SECONDS = 0.05  # a hostile reply of a megabyte
MEGABYTE = 1_000_000


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_batched_generation_is_faster_and_says_the_same(tmp_path, two_threads):
    sizes = {"stage1": 1, "stage2": 1, "single": 0, "zero_shot": 1, "single_test": 1}
    files = export.build(tmp_path / "data", sizes | {"test_per_task": 12}, 0)
    items = samples.read(files["mig_bench"], image_root=tmp_path / "data")
    loaded = models.load(
        {"name_or_path": "tiny", "min_pixels": 256, "max_pixels": 4096}
    )
    seconds, said = {}, {}
    for size in (64, 1):  # the scale's batch; one at a time
        out = tmp_path / f"{size}.jsonl"
        generate(*loaded, items[:4], tmp_path / f"warm{size}", max_new_tokens=2)
        began = time.perf_counter()
        generate(
            *loaded, items, out, max_new_tokens=128, batch_size=size, progress=False
        )
        seconds[size] = time.perf_counter() - began
        said[size] = scoring.read_predictions(out)
    gain = seconds[1] / seconds[64]
    same = sum(said[1][i] == said[64][i] for i in said[1])
    print(
        f"\n{len(items)} items: {seconds[1]:.1f} s one at a time, {seconds[64]:.1f} s "
        f"in batches of 64: {gain:.1f} times; {same} replies equal"
    )
    assert same == len(items)
    assert gain >= LEAST_GAIN


HOSTILE = ["(", "(1,", "(1,1),", "(1,1),(1,1),", "[1", "[0.1, ", "<box>1 ", "<answer>"]
HOSTILE += ["<answer></answer>", "(1,2),(3,4)", "(" + "1" * MEGABYTE]
HOSTILE += ["(1," + " " * MEGABYTE, "(0." + "0" * MEGABYTE, "1" * MEGABYTE]
HOSTILE += ["([", "(,),(,)", "(,,,)", "[1,2,3,4]", "(1,2,3,4)", "(0.1,0.2,0.3,0.4)"]
HOSTILE += ["<box>1 2 3 4</box>", "(1,2),(3,4),", "(1,2), (3,4", "1" * 4300 + " "]


def test_a_hostile_megabyte_is_read_in_no_time():
    slowest = []
    for mode in MODES:
        for piece in HOSTILE:
            reply = (piece * (MEGABYTE // len(piece) + 1))[:MEGABYTE]
            took = []
            for _ in range(5):
                began = time.process_time()
                parse_box(reply, mode)
                took.append(time.process_time() - began)
            slowest.append((min(took), mode, piece[:20]))
    for seconds, mode, piece in sorted(slowest, reverse=True)[:5]:
        print(f"\n{1000 * seconds:.1f} ms  {mode}  {piece!r}", end="")
    print()
    assert max(slowest)[0] < MOST_SECONDS, max(slowest)

"""Speed of evaluation: `make bench`. Printed, and held against the bars."""

import time

import pytest
import torch

from univg_nb import models
from univg_nb.data import files as samples
from univg_nb.data.boxes import MODES, parse_box
from univg_nb.evaluate import predictions
from univg_nb.evaluate.generate import GenerationOptions, generate
from univg_nb.minimig import export

pytestmark = pytest.mark.bench

LEAST_GAIN = 5  # batched against one at a time
LEAST_MIXED_GAIN = 1.7  # the same, replies of 1 to 256 tokens
MOST_SECONDS = 0.05  # a hostile reply of a megabyte
MEGABYTE = 1_000_000


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(two_threads):
    """The shipped model; what it answers, and where it stops, is set by the tests."""
    return models.load_for_inference(
        {"name_or_path": "tiny", "min_pixels": 256, "max_pixels": 4096}
    )


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sizes = {"stage1": 1, "stage2": 1, "single": 0, "zero_shot": 1, "single_test": 1}
    files = export.build(folder, sizes | {"test_per_task": 12}, 0)
    return samples.read(files["mig_bench"], image_root=folder)


def batched_and_alone(loaded, items, folder, **options):
    """How much faster a batch of 64 (the scale's) is than one item at a time, in wall
    and in CPU time, once both are seen to say the same."""
    clock, cpu, said = {}, {}, {}
    generate(*loaded, items[:4], folder / "warm", GenerationOptions(max_new_tokens=2))
    for size in (64, 1):
        out = folder / f"{size}.jsonl"
        began = time.perf_counter(), time.process_time()
        how = GenerationOptions(batch_size=size, **options)
        summary = generate(*loaded, items, out, how)
        clock[size] = time.perf_counter() - began[0]
        cpu[size] = time.process_time() - began[1]
        said[size] = predictions.read_predictions(out)
    same = sum(said[1][i] == said[64][i] for i in said[1])
    print(
        f"\n{len(items)} items, {summary['tokens']} tokens: {clock[1]:.1f} s one at a "
        f"time, {clock[64]:.1f} s in batches of 64: {clock[1] / clock[64]:.1f} times "
        f"({cpu[1] / cpu[64]:.1f} in CPU time); {same} replies equal"
    )
    assert same == len(items)
    return clock[1] / clock[64]


def test_batched_generation_is_faster_and_says_the_same(tiny, items, tmp_path):
    """Greedy replies of 64 tokens each, about the length of a chain with its answer."""
    model, processor = tiny
    never = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")  # it is banned
    model.generation_config.eos_token_id = never
    gain = batched_and_alone(tiny, items, tmp_path, max_new_tokens=64)
    assert gain >= LEAST_GAIN


def test_batches_of_very_different_replies_are_not_slow(tiny, items, tmp_path):
    """Any token at random, every 40th an end token: some replies have one token, some
    the full 256. A batch that kept its ended rows would hardly gain anything."""
    model, _ = tiny
    vocabulary = model.config.text_config.vocab_size
    model.generation_config.eos_token_id = list(range(5, vocabulary, 40))
    options = {"max_new_tokens": 256, "temperature": 1000.0}
    assert batched_and_alone(tiny, items, tmp_path, **options) >= LEAST_MIXED_GAIN


HOSTILE = ["(", "(1,", "(1,1),", "(1,1),(1,1),", "[1", "[0.1, ", "<box>1 ", "<answer>"]
HOSTILE += ["<answer></answer>", "(1,2),(3,4)", "(" + "1" * MEGABYTE]
HOSTILE += ["(1," + " " * MEGABYTE, "(0." + "0" * MEGABYTE, "1" * MEGABYTE]
HOSTILE += ["([", "(,),(,)", "(,,,)", "[1,2,3,4]", "(1,2,3,4)", "(0.1,0.2,0.3,0.4)"]
HOSTILE += ["<box>1 2 3 4</box>", "(1,2),(3,4),", "(1,2), (3,4", "1" * 4300 + " "]
# Behind one true box every bracket has to be tried, or seen to be idle.
FLOODS = ["(", "(1", "[1,1", "(1,1),(1,", "(1,1),(11,1,", "1,1,1,(1,1),("]
FLOODS += ["),(1,1,(1,1 ", "(1,1),(1,1,11111,"]


def test_a_hostile_megabyte_is_read_in_no_time():
    slowest = []
    for mode in MODES:
        hostile = [("", piece) for piece in HOSTILE]
        for start, piece in hostile + [("[1,2,3,4] ", flood) for flood in FLOODS]:
            reply = (start + piece * (MEGABYTE // len(piece) + 1))[:MEGABYTE]
            took = []
            for _ in range(5):
                began = time.process_time()
                parse_box(reply, mode)
                took.append(time.process_time() - began)
            slowest.append((min(took), mode, start + piece[:20]))
    for seconds, mode, piece in sorted(slowest, reverse=True)[:5]:
        print(f"\n{1000 * seconds:.1f} ms  {mode}  {piece!r}", end="")
    print()
    assert max(slowest)[0] < MOST_SECONDS, max(slowest)

"""Train the shipped stage-1 model from the shipped base: `make stage1`.

Chains come as in notebook 02: a teacher writes three candidates, the checks refuse what
is malformed, a selector takes one. The stand-in writes in a mixture of styles, as real
teachers do (`ARMS`). All language weights train. Every step is resumable: data that are
there are kept, and the training goes on from its last whole checkpoint.

The arm `thorough` is the same training on thorough chains only: what a policy could
reach that always reasons. What ships is put together in the arm's folder `shipped`.
"""

import argparse
import os
import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from univg_nb import config, errors, io
from univg_nb.cot.checks import extract_thinking
from univg_nb.cot.stand_in import HABITS, StandInTeacher
from univg_nb.cot.teacher import Teacher, write_chain
from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.minimig.export import save_images
from univg_nb.minimig.items import TASKS, make
from univg_nb.train.sft import train

SEED = 20  # of the items and of the teacher; the course and its tests use others
ITEMS = 52_000  # of the ten tasks, with chains
SINGLE = 6_000  # single pictures without a chain, so that pointing is not forgotten
SINGLE_COT = 8_000  # single pictures with a chain, so that it learns to reason on one
ARMS = {
    "mixture": StandInTeacher(
        SEED,
        error_rate=0.1,
        **HABITS,
        selector="form",
    ),
    "thorough": StandInTeacher(SEED, error_rate=0.0),
}
TEACHER = Teacher(base_url="", model="stand-in")
SETTINGS = (
    "sft.learning_rate=1.0e-3",
    "sft.adam_beta2=0.99",
    "sft.per_device_train_batch_size=8",
    "sft.logging_steps=10",
    "sft.save_strategy=steps",
    "sft.save_steps=500",
)
DATA_FILE = "stage1_cotsft.json"


class Made(NamedTuple):
    """A sample with its chain, if one passed the checks, and the chain's origin."""

    sample: GroundingSample
    accepted: bool
    style: str = ""
    error: str = ""


def make_sample(images: Path, arm: str, spec: tuple[str, int, str, int]) -> Made:
    """Draw one item, save its images where they are not there, and write its chain."""
    item = make(*spec)
    sample = item.sample
    if not all((images / path).is_file() for path in sample.images):
        save_images(item, images)
    if not sample.cot:
        return Made(sample, True)
    teacher = ARMS[arm]
    row = write_chain(teacher.reply, sample, TEACHER)
    if row["chosen"] is None:
        return Made(sample, False)
    chain = extract_thinking(row["candidates"][row["chosen"]]["text"])
    _, error, style = teacher.write(sample, row["chosen"])
    return Made(replace(sample, chain=chain), True, style, error)


def build_data(out: Path, images: Path, arm: str, sizes: Mapping[str, int]) -> Path:
    """Write the training file of an arm and beside it what it is made of.

    Args:
        out: folder of the file.
        images: folder of the images, which all arms share.
        arm: a key of `ARMS`.
        sizes: number of "items" of the ten tasks together, and of single-picture items
            without ("single") and with a chain ("single_cot").

    Returns:
        Path of the file; its image paths are relative to `images`.
    """
    path, tasks = out / DATA_FILE, list(TASKS)
    if path.is_file():
        return path
    specs = [
        (tasks[i % len(tasks)], SEED, "train", i // len(tasks))
        for i in range(sizes["items"])
    ]
    for task in ("single", "single_cot"):
        specs += [(task, SEED, "train", i) for i in range(sizes[task])]
    cores = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        made = list(pool.map(partial(make_sample, images, arm), specs, chunksize=64))
    accepted = [one for one in made if one.accepted]
    counts = Counter((one.style, one.error) for one in accepted if one.style)
    mixture = [
        {"style": style, "error": error, "chains": n}
        for (style, error), n in sorted(counts.items())
    ]
    io.write_json(
        out / "mixture.json", {"refused": len(made) - len(accepted), "chains": mixture}
    )
    random.Random(SEED).shuffle(accepted)
    files.write(
        (one.sample for one in accepted), path, "stage1_cotsft", image_root=images
    )
    return path


def ship(training: Path) -> Path:
    """Put together what ships of a finished training: weights, settings, log, counts.

    Returns:
        The folder training/shipped, which plain transformers loads.
    """
    unfinished = training / "shipped.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    leave = shutil.ignore_patterns("training_args.bin")
    shutil.copytree(training / "adapter", unfinished, ignore=leave)
    described = io.read_json(unfinished / "config.json")
    # The trainer turns the cache off, and the folder is for generation too.
    io.write_json(unfinished / "config.json", described | {"use_cache": True})
    for name in ("config.yaml", "mixture.json"):
        shutil.copy(training / name, unfinished)
    shutil.copy(training / "metrics.jsonl", unfinished / "training_log.jsonl")
    shutil.rmtree(training / "shipped", ignore_errors=True)
    return unfinished.rename(training / "shipped")


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the data and train."""
    parser = argparse.ArgumentParser(
        prog="python -m univg_nb.base_model.stage1",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m univg_nb.base_model.stage1 --out runs/stage1",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of data and trainings")
    add("--arm", choices=ARMS, default="mixture", help="default: mixture")
    add("--items", type=int, default=ITEMS, help=f"default: {ITEMS}")
    add("--single", type=int, default=SINGLE, help=f"default: {SINGLE}")
    add("--single-cot", type=int, default=SINGLE_COT, help=f"default: {SINGLE_COT}")
    options = parser.parse_args(arguments)
    out, images = options.out / options.arm, options.out / "data"
    sizes = {key: getattr(options, key) for key in ("items", "single", "single_cot")}
    path = build_data(out, images, options.arm, sizes)
    samples = files.read(path, image_root=images)
    scale = config.load_scale("tiny", SETTINGS)
    print(train(scale, out, samples, adapter="none"))
    print(f"shipped: {ship(out)}")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))

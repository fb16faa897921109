"""Writes MiniMIG as files in the released formats, pictures beside them."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.minimig.items import TASKS, Item, make

# Rows a file gets when `sizes` does not say: the tiny course.
SIZES = {
    "stage1": 6000,
    "stage2": 1500,
    "single": 600,
    "test_per_task": 40,
    "zero_shot": 100,
    "single_test": 500,
}
STAGE2_START = 100_000  # index of stage 2's first item: no item is in both stages


Spec = tuple[str, int, str, int]  # (task, seed, split, index): makes an item
FEW = 200  # items that are made before further processes would have started


def _rounds(n: int, seed: int, split: str, first: int = 0) -> Iterator[Spec]:
    """``n`` items, the ten tasks taking turns."""
    for i in range(n):
        turn, number = divmod(i, len(TASKS))
        yield tuple(TASKS)[number], seed, split, first + turn


def _of(task: str, n: int, seed: int, split: str, first: int = 0) -> Iterator[Spec]:
    return ((task, seed, split, first + i) for i in range(n))


def _stage2(sizes: Mapping[str, int], seed: int) -> Iterator[Spec]:
    """The ten tasks with the single-image items spread evenly between them."""
    total, single = sizes["stage2"], sizes["single"]
    if single > total:
        raise ValueError(
            f"single is {single}, more than the {total} rows of stage2 it is part of; "
            "lower data.single or raise data.stage2"
        )
    multi = _rounds(total - single, seed, "train", STAGE2_START)
    alone = _of("single", single, seed, "train", STAGE2_START)
    for i in range(total):
        yield next(alone if (i + 1) * single // total > i * single // total else multi)


def save_images(item: Item, folder: Path) -> None:
    """The item's pictures as PNGs at the paths its sample names."""
    for path, image in zip(item.sample.images, item.images, strict=True):
        target = folder / path
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        # Twice as fast as the default level, half as large again.
        image.save(temporary, "PNG", compress_level=2)
        os.replace(temporary, target)


def _made(folder: Path, spec: Spec) -> GroundingSample:
    """Draws one item and saves its pictures."""
    item = make(*spec)
    save_images(item, folder)
    return item.sample


def _workers(items: int) -> ProcessPoolExecutor | None:
    """Processes to draw with, one a core; none for so few items."""
    cores = min(os.cpu_count() or 1, 8)
    if cores == 1 or items < FEW:
        return None
    # Not forked: the parent may hold threads, of torch for one.
    return ProcessPoolExecutor(cores, mp_context=get_context("spawn"))


def build(
    out_dir: str | os.PathLike[str],
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> dict[str, Path]:
    """Writes all files of MiniMIG below ``out_dir``; returns the path of each.

    Args:
        sizes: rows by name, as in the data section of a scale: stage1; stage2, of
            which ``single`` are single-image; test_per_task; zero_shot, for each of
            the two families; single_test. Missing names are taken from `SIZES`.
        seed: same seed, same bytes.

    Keys of the result: stage1, stage2, mig_bench, single, lisa, video. Image paths in
    the files are relative to ``out_dir``. Raises ValueError for a size that is unknown
    or negative.
    """
    wanted = SIZES | dict(sizes or {})
    for name, n in wanted.items():
        if name not in SIZES or not isinstance(n, int) or n < 0:
            raise ValueError(
                f"size {name}={n!r}: give a whole number of rows for any of "
                f"{', '.join(SIZES)}"
            )
    out = Path(out_dir)
    (out / "images").mkdir(parents=True, exist_ok=True)
    per_task = wanted["test_per_task"]
    plan = {
        "stage1": ("stage1_cotsft.json", "stage1_cotsft",
                   _rounds(wanted["stage1"], seed, "train")),
        "stage2": ("stage2_rl.json", "stage2_rl", _stage2(wanted, seed)),
        "mig_bench": ("mig_bench.json", "mig_bench",
                      (s for t in TASKS for s in _of(t, per_task, seed, "test"))),
        "single": ("refcoco_val.json", "stage2_rl",
                   _of("single", wanted["single_test"], seed, "test")),
        "lisa": ("lisa_eval.json", "lisa",
                 _of("lisa", wanted["zero_shot"], seed, "test")),
        "video": ("reasonvos_eval.json", "reasonvos",
                  _of("video", wanted["zero_shot"], seed, "test")),
    }  # fmt: skip
    specs = {key: list(items) for key, (_, _, items) in plan.items()}
    pool = _workers(sum(map(len, specs.values())))
    with pool or nullcontext():
        for key, (name, format, _) in plan.items():
            draw = partial(_made, out)
            many = specs[key]
            made = pool.map(draw, many, chunksize=32) if pool else map(draw, many)
            # Image paths stay relative in the file; the zero-shot writers open the
            # pictures for their size, and find them under image_root.
            files.write(made, out / name, format, image_root=out)
    return {key: out / name for key, (name, _, _) in plan.items()}


def validation(out_dir: str | os.PathLike[str], per_task: int, seed: int = 0) -> Path:
    """Writes ``per_task`` validation items of each of the ten tasks as a MIG-Bench file
    below ``out_dir``; settings are chosen on these, never on the test."""
    out = Path(out_dir)
    (out / "images").mkdir(parents=True, exist_ok=True)
    specs = (spec for task in TASKS for spec in _of(task, per_task, seed, "val"))
    made = map(partial(_made, out), specs)
    files.write(made, out / "validation.json", "mig_bench", image_root=out)
    return out / "validation.json"

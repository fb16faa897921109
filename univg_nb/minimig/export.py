"""Write MiniMIG as files in the released formats, with the images beside them."""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from univg_nb import io
from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.minimig.items import TASKS, Item, make

# Rows of each file where the caller does not say: those of the tiny course.
SIZES = {
    "stage1": 6000,
    "stage2": 1500,
    "single": 600,
    "test_per_task": 40,
    "zero_shot": 100,
    "single_test": 500,
}
STAGE2_START = 100_000  # index of stage 2's first item: no item is in both stages
MIN_PARALLEL = 200  # fewer items are made before further processes would have started

Spec = tuple[str, int, str, int]  # (task, seed, split, index), the arguments of `make`


def _list_specs(task: str, n: int, seed: int, split: str, first: int = 0) -> list[Spec]:
    return [(task, seed, split, first + i) for i in range(n)]


def _alternate_tasks(n: int, seed: int, first: int = 0) -> list[Spec]:
    """Return `n` training items, the tasks taking turns."""
    tasks = list(TASKS)
    turns = (divmod(i, len(tasks)) for i in range(n))
    return [(tasks[number], seed, "train", first + turn) for turn, number in turns]


def _list_stage2(total: int, single: int, seed: int) -> Iterator[Spec]:
    """Yield the tasks' items with the single-image ones spread evenly among them."""
    if single > total:
        raise ValueError(
            f"single is {single}, more than the {total} rows of stage2 it is part of; "
            "lower data.single or raise data.stage2"
        )
    multi = iter(_alternate_tasks(total - single, seed, STAGE2_START))
    alone = iter(_list_specs("single", single, seed, "train", STAGE2_START))
    for i in range(total):
        yield next(alone if (i + 1) * single // total > i * single // total else multi)


def save_images(item: Item, folder: Path) -> None:
    """Write the item's images as PNG files.

    Args:
        item: an item of `items.make`.
        folder: folder that the paths in the item's sample are relative to.
    """
    for path, image in zip(item.sample.images, item.images, strict=True):
        with io.open_atomically(folder / path, "wb") as file:
            # Twice as fast as the default level, and the files half as large again.
            image.save(file, "PNG", compress_level=2)


def _make_and_save(folder: Path, spec: Spec) -> GroundingSample:
    item = make(*spec)
    save_images(item, folder)
    return item.sample


def build(
    out_dir: str | os.PathLike[str],
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> dict[str, Path]:
    """Write all files of MiniMIG.

    Args:
        out_dir: folder for the files; image paths in them are relative to it.
        sizes: rows by name, as in the data section of a scale: stage1; stage2, of
            which `single` are single-image; test_per_task; zero_shot, for each of
            the two families; single_test. Missing names are taken from `SIZES`.
        seed: same seed, same bytes.

    Returns:
        Paths by name: stage1, stage2, mig_bench, single, lisa, video.

    Raises:
        ValueError: if a size is unknown or negative.
    """
    wanted = SIZES | dict(sizes or {})
    for name, n in wanted.items():
        if name not in SIZES or not isinstance(n, int) or n < 0:
            raise ValueError(
                f"size {name}={n!r}: give a whole number of rows for any of "
                f"{', '.join(SIZES)}"
            )
    per_task, zero_shot = wanted["test_per_task"], wanted["zero_shot"]
    bench = [s for task in TASKS for s in _list_specs(task, per_task, seed, "test")]
    plan: dict[str, tuple[str, str, Iterable[Spec]]] = {
        "stage1": (
            "stage1_cotsft.json",
            "stage1_cotsft",
            _alternate_tasks(wanted["stage1"], seed),
        ),
        "stage2": (
            "stage2_rl.json",
            "stage2_rl",
            _list_stage2(wanted["stage2"], wanted["single"], seed),
        ),
        "mig_bench": ("mig_bench.json", "mig_bench", bench),
        "single": (
            "refcoco_val.json",
            "stage2_rl",
            _list_specs("single", wanted["single_test"], seed, "test"),
        ),
        "lisa": (
            "lisa_eval.json",
            "lisa",
            _list_specs("lisa", zero_shot, seed, "test"),
        ),
        "video": (
            "reasonvos_eval.json",
            "reasonvos",
            _list_specs("video", zero_shot, seed, "test"),
        ),
    }
    return _write_files(Path(out_dir), plan)


def write_validation(
    out_dir: str | os.PathLike[str], per_task: int, seed: int = 0
) -> Path:
    """Write validation items as a MIG-Bench file, to choose settings on.

    Args:
        out_dir: folder for the file; image paths in it are relative to it.
        per_task: items of each task.
        seed: same seed, same bytes.
    """
    specs = [s for task in TASKS for s in _list_specs(task, per_task, seed, "val")]
    plan = {"validation": ("validation.json", "mig_bench", specs)}
    return _write_files(Path(out_dir), plan)["validation"]


def _write_files(
    out: Path, plan: Mapping[str, tuple[str, str, Iterable[Spec]]]
) -> dict[str, Path]:
    """Write, by name, a file of this name in this format with these items."""
    specs = {name: list(items) for name, (_, _, items) in plan.items()}
    cores = min(os.cpu_count() or 1, 8)
    parallel = cores > 1 and sum(map(len, specs.values())) >= MIN_PARALLEL
    # Not forked: the parent may hold threads, of torch for one.
    pool = ProcessPoolExecutor(cores, get_context("spawn")) if parallel else None
    draw = partial(_make_and_save, out)
    with pool or nullcontext():
        for name, (file_name, format, _) in plan.items():
            items = specs[name]
            samples = pool.map(draw, items, chunksize=32) if pool else map(draw, items)
            # Image paths stay relative in the file; the zero-shot writers open the
            # images for their size, and find them under image_root.
            files.write(samples, out / file_name, format, image_root=out)
    return {name: out / file_name for name, (file_name, _, _) in plan.items()}

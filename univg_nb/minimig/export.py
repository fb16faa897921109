"""Write MiniMIG as files in the released formats, with the images beside them."""

import os
from collections.abc import Iterator, Mapping
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
FILES = {  # name and format
    "stage1": ("stage1_cotsft.json", "stage1_cotsft"),
    "stage2": ("stage2_rl.json", "stage2_rl"),
    "mig_bench": ("mig_bench.json", "mig_bench"),
    "single": ("refcoco_val.json", "stage2_rl"),
    "lisa": ("lisa_eval.json", "lisa"),
    "video": ("reasonvos_eval.json", "reasonvos"),
}
STAGE2_START = 100_000  # index of stage 2's first item: no item is in both stages
MIN_PARALLEL = 200  # fewer items are made before further processes would have started

Spec = tuple[str, int, str, int]  # (task, seed, split, index), the arguments of `make`


def _list_specs(task: str, n: int, seed: int, split: str, start: int = 0) -> list[Spec]:
    return [(task, seed, split, start + i) for i in range(n)]


def _alternate_tasks(n: int, seed: int, start: int = 0) -> list[Spec]:
    """Return `n` training items, the tasks taking turns."""
    tasks = list(TASKS)
    turns = (divmod(i, len(tasks)) for i in range(n))
    return [(tasks[number], seed, "train", start + turn) for turn, number in turns]


def _mix_stage2(total: int, single: int, seed: int) -> Iterator[Spec]:
    """Yield the tasks' items with the single-image ones spread evenly among them."""
    multi = iter(_alternate_tasks(total - single, seed, STAGE2_START))
    alone = iter(_list_specs("single", single, seed, "train", STAGE2_START))
    for i in range(total):
        yield next(alone if (i + 1) * single // total > i * single // total else multi)


def save_images(item: Item, folder: Path) -> None:
    """Write the item's images as PNG files; their paths are relative to the folder."""
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
    test_split: str = "test",
) -> dict[str, Path]:
    """Write all files of MiniMIG.

    Args:
        out_dir: folder for the files; image paths in them are relative to it.
        sizes: rows by name, as in the data section of a scale: stage1; stage2, of
            which `single` are single-image; test_per_task; zero_shot, for each of
            the two families; single_test. Missing names are taken from `SIZES`.
        seed: same seed, same bytes.
        test_split: "val" for files that settings may be chosen on.

    Returns:
        Paths by the names of `FILES`; stage1 and stage2 are for training.

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
    total, single = wanted["stage2"], wanted["single"]
    if single > total:
        raise ValueError(
            f"single is {single}, more than the {total} rows of stage2 it is part of; "
            "lower data.single or raise data.stage2"
        )

    def list_test(task: str, size: str) -> list[Spec]:
        return _list_specs(task, wanted[size], seed, test_split)

    specs = {
        "stage1": _alternate_tasks(wanted["stage1"], seed),
        "stage2": list(_mix_stage2(total, single, seed)),
        "mig_bench": [s for task in TASKS for s in list_test(task, "test_per_task")],
        "single": list_test("single", "single_test"),
        "lisa": list_test("lisa", "zero_shot"),
        "video": list_test("video", "zero_shot"),
    }
    out = Path(out_dir)
    cores = min(os.cpu_count() or 1, 8)
    parallel = cores > 1 and sum(map(len, specs.values())) >= MIN_PARALLEL
    # Not forked: the parent may hold threads, of torch for one.
    pool = ProcessPoolExecutor(cores, get_context("spawn")) if parallel else None
    draw = partial(_make_and_save, out)
    with pool or nullcontext():
        for key, items in specs.items():
            samples = pool.map(draw, items, chunksize=32) if pool else map(draw, items)
            name, format = FILES[key]
            # Image paths stay relative in the file; the zero-shot writers open the
            # images for their size, and find them under image_root.
            files.write(samples, out / name, format, image_root=out)
    return {key: out / name for key, (name, _) in FILES.items()}

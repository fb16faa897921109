"""Writes MiniMIG as files in the released formats, pictures beside them."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from univg_nb import samples
from univg_nb.minimig.items import TASKS, Item, make
from univg_nb.rows import GroundingSample

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


def _rounds(n: int, seed: int, split: str, first: int = 0) -> Iterator[Item]:
    """``n`` items, the ten tasks taking turns."""
    for i in range(n):
        turn, number = divmod(i, len(TASKS))
        yield make(tuple(TASKS)[number], seed, split, first + turn)


def _of(task: str, n: int, seed: int, split: str, first: int = 0) -> Iterator[Item]:
    return (make(task, seed, split, first + i) for i in range(n))


def _stage2(sizes: Mapping[str, int], seed: int) -> Iterator[Item]:
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


def _saved(items: Iterator[Item], folder: Path) -> Iterator[GroundingSample]:
    for item in items:
        save_images(item, folder)
        yield item.sample


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
                      (i for t in TASKS for i in _of(t, per_task, seed, "test"))),
        "single": ("refcoco_val.json", "stage2_rl",
                   _of("single", wanted["single_test"], seed, "test")),
        "lisa": ("lisa_eval.json", "lisa",
                 _of("lisa", wanted["zero_shot"], seed, "test")),
        "video": ("reasonvos_eval.json", "reasonvos",
                  _of("video", wanted["zero_shot"], seed, "test")),
    }  # fmt: skip
    for name, format, items in plan.values():
        # Image paths stay relative in the file; the zero-shot writers open the pictures
        # for their size, and find them under image_root.
        samples.write(_saved(items, out), out / name, format, image_root=out)
    return {key: out / name for key, (name, _, _) in plan.items()}

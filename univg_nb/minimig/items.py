"""One item of MiniMIG, made from (task, seed, split, index) and nothing else."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from univg_nb.data.sample import GroundingSample
from univg_nb.minimig import tasks_groups, tasks_pairs, tasks_zero_shot
from univg_nb.minimig.compose import LEVELS, Draft
from univg_nb.minimig.scenes import rng_for

TASKS: dict[str, Callable[[np.random.Generator, str, str], Draft]] = {
    "diff": tasks_pairs.diff,
    "view_diff": tasks_pairs.view_diff,
    "common_object": tasks_groups.common_object,
    "object_tracking": tasks_groups.object_tracking,
    "multi_view": tasks_groups.multi_view,
    "region": tasks_groups.region,
    "refer_grounding": tasks_pairs.refer_grounding,
    "group_grounding": tasks_groups.group_grounding,
    "reasoning": tasks_pairs.reasoning,
    "correspondence": tasks_pairs.correspondence,
}
OTHERS: dict[str, Callable[[np.random.Generator, str, str], Draft]] = {
    "single": tasks_zero_shot.single,
    "lisa": tasks_zero_shot.lisa,
    "video": tasks_zero_shot.video,
}
_NUMBERS = {task: number for number, task in enumerate((*TASKS, *OTHERS))}
_STRIDE = 16  # more than there are tasks: (index, task) pairs never meet


@dataclass(frozen=True)
class Item:
    """A sample (image paths relative to the data folder) with its pictures.

    ``level`` is easy, medium or hard, ``draft`` holds the scenes behind the pictures.
    """

    sample: GroundingSample
    images: tuple[Image.Image, ...]
    level: str
    draft: Draft


def make(task: str, seed: int, split: str, index: int) -> Item:
    """The item: same arguments, same question, pictures and box.

    ``split`` is train, val or test; all scenes of the item belong to it. The levels
    take turns with ``index``. Raises ValueError for an unknown task or split.
    """
    families = TASKS | OTHERS
    if task not in families:
        raise ValueError(f"task {task!r} is unknown; use one of {', '.join(families)}")
    rng = rng_for(seed, split, index * _STRIDE + _NUMBERS[task])
    level = LEVELS[index % len(LEVELS)]
    draft = families[task](rng, level, split)
    name = f"{split}_{task}_{index:06d}"
    x1, y1, x2, y2 = (min(999, v) for v in draft.answer)
    sample = GroundingSample(
        id=f"minimig-{task}-{split}-{level}-{index:06d}",
        task=task,
        images=tuple(f"images/{name}_{i}.png" for i in range(1, len(draft.images) + 1)),
        question=draft.question,
        answer=(x1, y1, x2, y2),
        cot=task in TASKS or task in ("lisa", "video"),
        chain=draft.chain,
    )
    return Item(sample, draft.images, level, draft)


def level_of(sample_id: str) -> str:
    """easy, medium or hard, read from a MiniMIG sample's id.

    Raises ValueError for an id of another origin.
    """
    parts = sample_id.split("-")
    if parts[0] != "minimig" or len(parts) != 5 or parts[3] not in LEVELS:
        raise ValueError(f"sample id {sample_id!r} is not one of MiniMIG's")
    return parts[3]

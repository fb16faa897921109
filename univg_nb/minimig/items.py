"""One item of MiniMIG, made from (task, seed, split, index) and nothing else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from univg_nb.data.sample import GroundingSample
from univg_nb.minimig import tasks_groups, tasks_pairs, tasks_zero_shot
from univg_nb.minimig.compose import LEVELS, Draft, Sampler
from univg_nb.minimig.scenes import make_rng


class Task(NamedTuple):
    """A task: the function that draws its items, and their stream of random numbers."""

    draw: Callable[[Sampler], Draft]
    # 0..15, different for every task. It fixes the task's items: a new task takes the
    # next free number, and none is ever changed or used again.
    stream: int
    cot: bool = True  # a chain is asked for


# The tasks of both training stages and of the benchmark file; a new task is added here.
TASKS: dict[str, Task] = {
    "diff": Task(tasks_pairs.draw_diff, 0),
    "view_diff": Task(tasks_pairs.draw_view_diff, 1),
    "common_object": Task(tasks_groups.draw_common_object, 2),
    "object_tracking": Task(tasks_groups.draw_object_tracking, 3),
    "multi_view": Task(tasks_groups.draw_multi_view, 4),
    "region": Task(tasks_groups.draw_region, 5),
    "refer_grounding": Task(tasks_pairs.draw_refer_grounding, 6),
    "group_grounding": Task(tasks_groups.draw_group_grounding, 7),
    "reasoning": Task(tasks_pairs.draw_reasoning, 8),
    "correspondence": Task(tasks_pairs.draw_correspondence, 9),
}
# Tasks with files of their own.
OTHER_TASKS: dict[str, Task] = {
    "single": Task(tasks_zero_shot.draw_single, 10, cot=False),
    "lisa": Task(tasks_zero_shot.draw_lisa, 11),
    "video": Task(tasks_zero_shot.draw_video, 12),
    "single_cot": Task(tasks_zero_shot.draw_single_cot, 13),
}
_NUM_STREAMS = 16


@dataclass(frozen=True)
class Item:
    """A sample with its images."""

    sample: GroundingSample  # its image paths are relative to the data folder
    images: tuple[Image.Image, ...]  # at these paths
    level: str  # easy, medium or hard
    draft: Draft  # the scenes behind the images, and the target


def make(task: str, seed: int, split: str, index: int) -> Item:
    """Return an item: same arguments, same question, images and box.

    Args:
        task: a key of `TASKS` or `OTHER_TASKS`.
        seed: seed of the data.
        split: train, val or test; all scenes of the item belong to it.
        index: number of the item; the levels alternate with it.

    Raises:
        ValueError: if task or split is unknown.
    """
    known = TASKS | OTHER_TASKS
    if task not in known:
        raise ValueError(f"task {task!r} is unknown; use one of {', '.join(known)}")
    rng = make_rng(seed, split, index * _NUM_STREAMS + known[task].stream)
    level = LEVELS[index % len(LEVELS)]
    draft = known[task].draw(Sampler(rng, level, split))
    name = f"images/{split}_{task}_{index:06d}"
    x1, y1, x2, y2 = (min(999, v) for v in draft.answer)
    sample = GroundingSample(
        id=f"minimig-{task}-{split}-{level}-{index:06d}",
        task=task,
        images=tuple(f"{name}_{i}.png" for i in range(1, len(draft.images) + 1)),
        question=draft.question,
        answer=(x1, y1, x2, y2),
        cot=known[task].cot,
        chain=draft.chain,
        target_image=draft.target_image,
    )
    return Item(sample, tuple(draft.images), level, draft)

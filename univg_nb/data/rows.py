"""What the readers of all formats share.

`GroundingSample` itself is in `grounding_sample`; row readers are in `formats` and
`zero_shot_formats`, whole files in `samples`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from univg_nb.data.boxes import GRID, INVERTED, Box, box_status
from univg_nb.data.sample import IMAGE_MARKER, GroundingSample

SINGLE_IMAGE_PATH = "dataset/coco/train2014/COCO"
_SEQUENCES = (list, tuple)
_NUMBERS = frozenset((int, float))
_INTEGERS = frozenset((int,))
_TEXTS = frozenset((str,))
_OWN_KEYS = frozenset(("task", "chain", "cot"))  # see `extras`


class RowError(ValueError):
    """A row that cannot be read; ``kind`` is what the audit counts it under."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Place:
    """Where a row comes from, and what its reader must know besides the row.

    strict=True refuses out-of-range boxes in evaluation files, which are otherwise
    clipped; ``scale`` is 1 or 1000 once a MIG-Bench file has shown its unit.
    """

    file: str
    row: int = 0
    image_root: str | None = None
    strict: bool = False
    scale: int | None = None
    prefix: str = field(init=False)  # image_root with a slash at its end

    def __post_init__(self) -> None:
        self.prefix = os.path.join(self.image_root, "") if self.image_root else ""

    def error(self, kind: str, problem: str, remedy: str) -> RowError:
        return RowError(kind, f"{self.file}, row {self.row}: {problem}; {remedy}")

    def get(self, row: dict[str, Any], key: str, kind: type) -> Any:
        """``row[key]``, checked to exist and to be of this type."""
        value = row.get(key)  # None is of no type that is ever asked for
        if isinstance(value, kind):
            return value
        if key not in row:
            raise self.error(
                "missing_key",
                f"key {key!r} is missing (found {sorted(row)})",
                "add it or pass the right format=",
            )
        raise self.error(
            "wrong_type",
            f"{key!r} is {value!r:.60}, expected {kind.__name__}",
            "correct the row or pass the right format=",
        )

    def image(self, path: str) -> str:
        """The path with a leading "./" dropped, joined to image_root (PF T7)."""
        return self._rooted((path,))[0]

    def _rooted(self, paths: Sequence[str]) -> list[str]:
        prefix = self.prefix
        return [
            prefix + path[2:].lstrip("/")
            if path[:2] == "./"
            else path
            if path[:1] == "/"  # quicker than os.path.isabs
            else prefix + path
            for path in paths
        ]

    def unrooted(self, path: str) -> str:
        """The inverse of `image`: relative to image_root where it lies below it."""
        return path.removeprefix(self.prefix)

    def name(self, row: dict[str, Any]) -> str:
        """The row's id; file and number of a row that has none."""
        if "id" in row:
            return str(row["id"])
        return f"{os.path.splitext(os.path.basename(self.file))[0]}#{self.row}"

    def images(self, row: dict[str, Any], key: str = "images") -> tuple[str, ...]:
        paths = self.get(row, key, list)
        if not paths or not _TEXTS.issuperset(map(type, paths)) or not all(paths):
            raise self.error(
                "bad_images", f"{key!r} is {paths!r:.80}", "give a list of image paths"
            )
        return tuple(self._rooted(paths))

    def numbers(self, value: Any, count: int = 4) -> list[float]:
        # A set of types is quick, and leaves out bool, which isinstance would not.
        if (
            not isinstance(value, _SEQUENCES)
            or len(value) != count
            or not _NUMBERS.issuperset(map(type, value))
            or not all([-1e9 < v < 1e9 for v in value])
        ):
            raise self.error(
                "bad_box", f"box {value!r:.80}", f"give {count} finite numbers"
            )
        return list(value)


def training_box(value: Any, place: Place) -> Box:
    """A 0-1000 box of a training file: integers, in range, with an area, or an error.

    A bad target would be trained on silently, hence no clipping here.
    """
    if _INTEGERS.issuperset(map(type, value)) and len(value) == 4:
        x1, y1, x2, y2 = value
        if 0 <= x1 < x2 <= GRID and 0 <= y1 < y2 <= GRID:
            return (x1, y1, x2, y2)  # as nearly always: nothing to round or refuse
    numbers = place.numbers(value)
    high = max(numbers)
    if high <= 1 and any(v != int(v) for v in numbers):
        raise place.error(
            "box_unit",
            f"box {numbers} looks like 0-1 floats",
            f"multiply by {GRID}, or pass format='mig_bench' if it is a benchmark file",
        )
    x1, y1, x2, y2 = box = tuple(map(round, numbers))
    if min(numbers) < 0 or high > GRID:
        raise place.error(
            "box_out_of_range",
            f"box {numbers} leaves 0-{GRID}",
            "rescale it to the 0-1000 grid or drop the row",
        )
    if x1 >= x2 or y1 >= y2:
        raise _no_area(numbers, box, place)
    return box


def _no_area(numbers: list[float], box: Box, place: Place) -> RowError:
    inverted = box[0] > box[2] or box[1] > box[3]
    return place.error(
        "box_inverted" if inverted else "box_degenerate",
        f"box {numbers} is {'inverted' if inverted else 'without area'}",
        "order it as x1 < x2, y1 < y2 or drop the row",
    )


def check_evaluation_box(
    numbers: list[float], box: Box, limit: tuple[float, float], place: Place
) -> None:
    """In strict mode (the audit) refuse what reading an evaluation file clips."""
    if not place.strict:
        return
    w, h = limit
    if any(not 0 <= v <= m for v, m in zip(numbers, (w, h, w, h), strict=True)):
        raise place.error(
            "box_out_of_range",
            f"box {numbers} leaves 0-{w:g} x 0-{h:g}",
            "it is clipped on reading",
        )
    if box_status(box) == INVERTED:
        raise _no_area(numbers, box, place)


def is_single_image(images: tuple[str, ...]) -> bool:
    """The released rule: the first image lies in COCO train2014 (PF sec. 2.2)."""
    return SINGLE_IMAGE_PATH in images[0]


def _optional(row: dict[str, Any], key: str, kind: type, place: Place) -> Any:
    """One of our own keys, checked; None where the row has none."""
    return place.get(row, key, kind) if row.get(key) is not None else None


def own_keys(
    row: dict[str, Any], place: Place, images: tuple[str, ...]
) -> tuple[str, bool, str | None]:
    """(task, cot, chain) by our optional keys; what a row without them means, if not.

    Released rows have none of the keys: then not one is looked up, since looking up
    takes a third of reading a long file.
    """
    task = cot = chain = None
    if not _OWN_KEYS.isdisjoint(row):
        task = _optional(row, "task", str, place)
        cot = _optional(row, "cot", bool, place)
        chain = _optional(row, "chain", str, place)
    return task or "", not is_single_image(images) if cot is None else cot, chain


def build(
    row: dict[str, Any],
    place: Place,
    images: tuple[str, ...],
    text: str,
    answer: Box,
    *,
    task: str | None = None,
    cot: bool | None = None,
    chain: str | None = None,
    boxes: tuple[Box, ...] | None = None,
) -> GroundingSample:
    """A sample from what a format gave; what it did not, from our optional keys."""
    own_task, own_cot, own_chain = own_keys(row, place, images)
    if boxes is None:
        several = _optional(row, "boxes", list, place) or ()
        boxes = tuple(tuple(map(round, place.numbers(b))) for b in several)
    return make(
        place,
        place.name(row),
        own_task if task is None else task,
        images,
        text,
        answer,
        own_cot if cot is None else cot,
        own_chain if chain is None else chain,
        boxes,
    )


def make(
    place: Place,
    id: str,
    task: str,
    images: tuple[str, ...],
    text: str,
    answer: Box,
    cot: bool,
    chain: str | None,
    boxes: tuple[Box, ...],
) -> GroundingSample:
    """A sample of this row, or a RowError that says what it lacks."""
    question = text.replace(IMAGE_MARKER, "").lstrip("\n")
    source = f"{place.file}#{place.row}"
    try:
        return GroundingSample(
            id, task, images, question, answer, cot, chain, boxes, source
        )
    except ValueError as error:
        raise place.error("bad_sample", str(error), "correct the row") from error


def extras(sample: GroundingSample, *, chain: bool = True) -> dict[str, Any]:
    """Our optional keys, so that reading back gives an equal sample.

    The released loaders read only the keys they know.
    """
    keys: dict[str, Any] = {"id": sample.id}
    if sample.task:
        keys["task"] = sample.task
    if sample.cot == is_single_image(sample.images):  # the rule alone would err
        keys["cot"] = sample.cot
    if chain and sample.chain is not None:
        keys["chain"] = sample.chain
    if sample.boxes:
        keys["boxes"] = [list(b) for b in sample.boxes]
    return keys

"""Read and write one row of a released file: training files and MIG-Bench.

The helpers of all formats are here, too; `zero_shot_formats` has the files with boxes
in pixels, `files` reads whole files. Schemas: docs/paper_facts.md#files.

Image markers and the request for a chain exist in files only: they are removed on
reading and added on writing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from univg_nb.data.boxes import GRID, Box, find_boxes, format_box
from univg_nb.data.prompts import COT_SUFFIX, SINGLE_IMAGE_PREFIX, reply_text, user_text
from univg_nb.data.sample import IMAGE_MARKER, GroundingSample

Row: TypeAlias = dict[str, Any]
Samples: TypeAlias = Iterator[GroundingSample]
StrPath: TypeAlias = str | os.PathLike[str]

# The released rule: single-image mode is for a first image in COCO train2014.
SINGLE_IMAGE_PATH = "dataset/coco/train2014/COCO"
_UNIT_LIMIT = 2.0  # above it a coordinate cannot be a 0-1 float, however sloppy
_NUMBERS = frozenset((int, float))
_TEXTS = frozenset((str,))
# Optional keys of this project, which the released loaders do not look at.
_OWN_KEYS = {"task": str, "cot": bool, "chain": str, "target_image": int, "boxes": list}
_OWN_NAMES = frozenset(_OWN_KEYS)


class RowError(ValueError):
    """A row that cannot be used; `kind` is what the audit counts it under.

    `clipped`: it can be used after all, with its box cut at the edge of the image.
    """

    clipped = False

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class RowContext:
    """Where a row comes from, and what its reader must know besides the row."""

    file: StrPath
    image_root: StrPath | None = None  # None leaves the paths of images as they are
    row: int = 0
    scale: int | None = None  # 1 or 1000 once a MIG-Bench file has shown its unit
    doubts: list[RowError] = field(default_factory=list)  # boxes read though wrong

    def __post_init__(self) -> None:
        self.file = os.fspath(self.file)
        root = os.fspath(self.image_root or "")
        self._prefix = f"{root.rstrip('/')}/" if root else ""

    @property
    def place(self) -> str:
        """File and row, for messages."""
        return f"{self.file}, row {self.row}"

    def error(self, kind: str, problem: str) -> RowError:
        """Return (not raise) an error that names file and row."""
        return RowError(kind, f"{self.place}: {problem}")

    def get(self, row: Row, key: str, kind: type) -> Any:
        """Return `row[key]` or raise a `RowError` if it is missing or not of `kind`."""
        value = row.get(key)  # None is of no type that is ever asked for
        if type(value) is kind:  # true is no number
            return value
        remedy = "or pass the right format="
        if key not in row:
            problem = f"key {key!r} is missing (found {sorted(row)}); add it {remedy}"
            raise self.error("missing_key", problem)
        problem = f"{key!r} is {value!r:.60}, expected {kind.__name__}"
        raise self.error("wrong_type", f"{problem}; correct the row {remedy}")

    def join_root(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Drop a leading "./" of each path and join relative ones to image_root."""
        root = self._prefix
        joined = [
            path if path[:1] == "/" else root + path.removeprefix("./").lstrip("/")
            for path in paths
        ]
        return tuple(joined)

    def strip_root(self, paths: Sequence[str]) -> list[str]:
        """Make paths relative to image_root where they lie below it."""
        return [path.removeprefix(self._prefix) for path in paths]

    def images(self, row: Row, key: str = "images") -> tuple[str, ...]:
        """Return the image paths under `key`, joined to image_root."""
        paths = self.get(row, key, list)
        if not paths or not _TEXTS.issuperset(map(type, paths)) or "" in paths:
            problem = f"{key!r} is {paths!r:.80}; give a list of image paths"
            raise self.error("bad_images", problem)
        return self.join_root(paths)

    def sample_id(self, row: Row) -> str:
        """Return the row's id, or file and row number where it has none."""
        name = row.get("id")
        return f"{Path(self.file).stem}#{self.row}" if name is None else str(name)

    def numbers(self, value: Any) -> list[float]:
        """Return the four finite numbers of a box, or raise a `RowError`."""
        # the set of types leaves out bool, which isinstance would not
        if (
            isinstance(value, list | tuple)
            and len(value) == 4
            and _NUMBERS.issuperset(map(type, value))
            and all([-1e9 < v < 1e9 for v in value])
        ):
            return list(value)
        raise self.error("bad_box", f"box {value!r:.80}; give 4 finite numbers")


# ---------------------------------------------------------------- shared by all formats


def parse_training_box(value: Any, context: RowContext) -> Box:
    """Return the 0-1000 box of a training file as integers; nothing is clipped.

    Raises a `RowError` if `value` is not four numbers in 0-1000 that enclose an area.
    """
    if len(value) == 4:
        x1, y1, x2, y2 = value
        integers = type(x1) is type(y1) is type(x2) is type(y2) is int
        if integers and 0 <= x1 < x2 <= GRID and 0 <= y1 < y2 <= GRID:
            return (x1, y1, x2, y2)  # as nearly always: nothing to round or refuse
    numbers = context.numbers(value)
    if max(numbers) <= 1 and any(v != int(v) for v in numbers):
        problem = f"box {numbers} looks like 0-1 floats; multiply by {GRID}"
        raise context.error("box_unit", f"{problem}, or pass format='mig_bench'")
    if min(numbers) < 0 or max(numbers) > GRID:
        problem = f"box {numbers} leaves 0-{GRID}; rescale it or drop the row"
        raise context.error("box_out_of_range", problem)
    x1, y1, x2, y2 = map(round, numbers)
    if error := _check_area(numbers, (x1, y1, x2, y2), context):
        raise error
    return (x1, y1, x2, y2)


def _check_area(numbers: list[float], box: Box, context: RowContext) -> RowError | None:
    """Return the error of a box that encloses no area."""
    x1, y1, x2, y2 = box
    if x1 < x2 and y1 < y2:
        return None
    kind, what = "box_degenerate", "without area"
    if x1 > x2 or y1 > y2:
        kind, what = "box_inverted", "inverted"
    problem = f"box {numbers} is {what}; order it as x1 < x2, y1 < y2 or drop the row"
    return context.error(kind, problem)


def clip_to_grid(
    numbers: list[float],
    size: tuple[float, float],
    context: RowContext,
    highest: int = GRID,
) -> Box:
    """Convert a box of a benchmark to 0-1000, rounded and clipped.

    The numbers and the image's size (width, height) are in the file's unit. A box that
    leaves the image or has no area is noted in `context.doubts`.
    """
    pairs = list(zip(numbers, (*size, *size), strict=True))
    x1, y1, x2, y2 = (min(highest, max(0, round(GRID * v / m))) for v, m in pairs)
    if any(not 0 <= v <= m for v, m in pairs):
        problem = f"box {numbers} leaves 0-{size[0]:g} x 0-{size[1]:g}; it is clipped"
        context.doubts.append(context.error("box_out_of_range", problem))
        context.doubts[-1].clipped = True
    elif error := _check_area(numbers, (x1, y1, x2, y2), context):
        context.doubts.append(error)
    return (x1, y1, x2, y2)


def build_sample(
    row: Row,
    context: RowContext,
    images: tuple[str, ...],
    question: str,
    answer: Box,
    **fields: Any,
) -> GroundingSample:
    """Return the sample of a row, with the keys of this project that the row has.

    `fields` are those of `GroundingSample` that the format itself gives; they win.
    """
    if not _OWN_NAMES.isdisjoint(row):  # released rows have none of them
        for key, kind in _OWN_KEYS.items():
            if key not in fields and row.get(key) is not None:
                fields[key] = context.get(row, key, kind)
                if key == "boxes":
                    boxes = map(context.numbers, fields[key])
                    fields[key] = tuple(tuple(map(round, box)) for box in boxes)
    if "id" not in fields:
        fields["id"] = context.sample_id(row)
    if "cot" not in fields:
        fields["cot"] = SINGLE_IMAGE_PATH not in images[0]
    fields.setdefault("task", "")
    fields["source"] = f"{context.file}#{context.row}"
    try:
        return GroundingSample(
            images=images, question=question, answer=answer, **fields
        )
    except ValueError as error:
        raise context.error("bad_sample", f"{error}; correct the row") from error


def own_keys(sample: GroundingSample, *without: str) -> Row:
    """Return the optional keys that a sample needs, but for those in `without`."""
    # in other samples True is understood
    told = not sample.cot or SINGLE_IMAGE_PATH in sample.images[0]
    keys = {
        "id": sample.id,
        "task": sample.task or None,
        "cot": sample.cot if told else None,
        "chain": sample.chain,
        "boxes": [list(box) for box in sample.boxes] or None,
        "target_image": sample.target_image,
    }
    return {k: v for k, v in keys.items() if v is not None and k not in without}


def _strip_markers(text: str, context: RowContext, first: bool = True) -> str:
    """Remove the markers at the beginning: in front of it the pictures will stand.

    Of a dialogue that is the beginning of the `first` question.
    """
    last = text.rfind(IMAGE_MARKER)
    if last >= 0 and (not first or text[:last].replace(IMAGE_MARKER, "").strip()):
        problem = f"{IMAGE_MARKER} within the text, in {text[:80]!r}"
        remedy = f'put every {IMAGE_MARKER} first and name a picture as "image 1"'
        raise context.error("marker_place", f"{problem}; {remedy}")
    return text.replace(IMAGE_MARKER, "").lstrip("\n")


def _add_markers(sample: GroundingSample, text: str) -> str:
    return IMAGE_MARKER * len(sample.images) + text


# ---------------------------------------------------------------- stage 2, MIG-Bench


def _read_stage2(row: Row, context: RowContext) -> Samples:
    question = _strip_markers(context.get(row, "question", str), context)
    answer = parse_training_box(context.get(row, "answer", list), context)
    yield build_sample(row, context, context.images(row), question, answer)


def _write_stage2(sample: GroundingSample, context: RowContext) -> Row:
    return {
        "images": context.strip_root(sample.images),
        "question": _add_markers(sample, sample.question),
        "answer": list(sample.answer),
        **own_keys(sample),
    }


def _read_mig(row: Row, context: RowContext) -> Samples:
    """Read 0-1 floats (original) or 0-1000 (revised), one unit per file."""
    numbers = context.numbers(context.get(row, "answer", list))
    unit = max(numbers) <= _UNIT_LIMIT
    context.scale = context.scale or (1 if unit else GRID)
    whole = numbers == [*map(int, numbers)]
    if not unit if context.scale == 1 else unit and not whole:
        problem = f"answer {numbers} is not in the file's unit; use 0-{context.scale}"
        raise context.error("box_unit", problem)
    highest = GRID - 1 if context.scale == 1 else GRID
    box = clip_to_grid(numbers, (context.scale, context.scale), context, highest)
    context.get(row, "task", str)
    question = _strip_markers(context.get(row, "question", str), context)
    yield build_sample(row, context, context.images(row), question, box)


def _write_mig(sample: GroundingSample, context: RowContext) -> Row:
    if max(sample.answer) >= GRID:
        problem = f"answer {sample.answer} would be read clipped; give at most 999"
        raise context.error("box_out_of_range", problem)
    return {
        "task": sample.task,
        "images": context.strip_root(sample.images),
        "question": sample.question,
        "answer": [v / GRID for v in sample.answer],
        "additional_info": "",
        "need_format": True,
        **own_keys(sample, "task"),
    }


# ---------------------------------------------------------------- sharegpt dialogues

# the key of the turns: keys of a turn, who asks and who replies
_TURNS = {
    "conversations": ("from", "value", ("human", "gpt")),
    "messages": ("role", "content", ("user", "assistant")),
}


def _read_turns(
    row: Row, context: RowContext, images: tuple[str, ...]
) -> list[tuple[str, str]]:
    """Return (question, reply) pairs without markers; system turns are skipped.

    LLaMA-Factory pairs markers and images in order, so they must agree in number.
    """
    key = "conversations" if "conversations" in row else "messages"
    who, what, roles = _TURNS[key]
    texts: list[str] = []
    for turn in context.get(row, key, list):
        if not isinstance(turn, dict):
            raise context.error("bad_turn", f"turn {turn!r:.60}; give {who} and {what}")
        role = turn.get(who)
        if role == roles[len(texts) % 2]:
            texts.append(context.get(turn, what, str))
        elif role != "system":
            problem = f"turn {len(texts)} is from {role!r}; alternate {roles}"
            raise context.error("bad_turn", problem)
    if not texts or len(texts) % 2:
        problem = f"{len(texts)} turns; give question and reply in pairs"
        raise context.error("bad_turn", problem)
    markers = "\n".join(texts[::2]).count(IMAGE_MARKER)
    if markers != len(images):
        problem = f"{markers} {IMAGE_MARKER} markers for {len(images)} images"
        raise context.error("marker_mismatch", f"{problem}; write one for each image")
    questions = [_strip_markers(t, context, not i) for i, t in enumerate(texts[::2])]
    return list(zip(questions, texts[1::2], strict=True))


def _read_stage1(row: Row, context: RowContext) -> Samples:
    images = context.images(row)
    pairs = _read_turns(row, context, images)
    if len(pairs) != 1:
        problem = f"{len(pairs)} turns; files with several are format='mgrounding'"
        raise context.error("bad_turn", problem)
    ((text, reply),) = pairs
    if row.get("cot") is not None:
        cot = context.get(row, "cot", bool)
    else:
        simple = text.startswith(SINGLE_IMAGE_PREFIX) or SINGLE_IMAGE_PATH in images[0]
        cot = text.endswith(COT_SUFFIX) or not simple
    fields: dict[str, Any] = {"cot": cot}
    think, closed, rest = reply.partition("</think>")
    if "<think>" in rest or "</think>" in rest:
        problem = f"reply {reply[:60]!r} has several <think>; give one chain"
        raise context.error("bad_reply", problem)
    if closed and "<think>" in think:
        fields["chain"] = think.partition("<think>")[2]
    boxes = find_boxes(rest if closed else reply)
    if len(boxes) != 1:
        problem = f"reply {reply[-60:]!r} answers with {len(boxes)} boxes; give one box"
        raise context.error("bad_reply", problem)
    answer = parse_training_box(boxes[0], context)
    asked = text.removesuffix(COT_SUFFIX)
    question = asked if cot else text.removeprefix(SINGLE_IMAGE_PREFIX)
    yield build_sample(row, context, images, question, answer, **fields)


def _write_stage1(sample: GroundingSample, context: RowContext) -> Row:
    reply = reply_text(sample, cot=sample.chain is not None)
    return {
        "conversations": [
            {"from": "human", "value": _add_markers(sample, user_text(sample))},
            {"from": "gpt", "value": reply},
        ],
        "images": context.strip_root(sample.images),
        **own_keys(sample, *(["chain"] if sample.cot else [])),
    }


def _read_mgrounding(row: Row, context: RowContext) -> Samples:
    """Read every pair whose reply holds a box; the first of several is the answer."""
    images = context.images(row)
    pairs = _read_turns(row, context, images)
    fields = {"task": context.get(row, "type", str)} if row.get("type") else {}
    name = context.sample_id(row)
    for turn, (question, reply) in enumerate(pairs):
        if found := find_boxes(reply):
            boxes = tuple([parse_training_box(box, context) for box in found])
            fields["id"] = name if len(pairs) == 1 else f"{name}/{turn}"
            fields["boxes"] = boxes if len(boxes) > 1 else ()
            yield build_sample(row, context, images, question, boxes[0], **fields)


def _write_mgrounding(sample: GroundingSample, context: RowContext) -> Row:
    boxes = map(format_box, sample.boxes or (sample.answer,))
    marked = [f"<|box_start|>{box}<|box_end|>" for box in boxes]
    return {
        "id": sample.id,
        "images": context.strip_root(sample.images),
        "conversations": [
            {"from": "human", "value": _add_markers(sample, sample.question)},
            {"from": "gpt", "value": "".join(marked)},
        ],
        "type": sample.task,
        **own_keys(sample, "id", "task", "boxes"),
    }


class Format(NamedTuple):
    """How one kind of file is read and written, row by row."""

    read: Callable[[Row, RowContext], Samples]
    write: Callable[[GroundingSample, RowContext], Row]
    training: bool  # True: a bad box is an error; False: it is clipped


FORMATS = {
    "stage1_cotsft": Format(_read_stage1, _write_stage1, True),
    "stage2_rl": Format(_read_stage2, _write_stage2, True),
    "mgrounding": Format(_read_mgrounding, _write_mgrounding, True),
    "mig_bench": Format(_read_mig, _write_mig, False),
}

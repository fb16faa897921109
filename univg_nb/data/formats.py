"""One row of a released file to and from `GroundingSample`: training and MIG-Bench.

The zero-shot files, whose boxes are in pixels, are in `zero_shot_formats`; whole files
are read and written by `samples`. Schemas: PF sec. 2.3 and 9.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from univg_nb.data.boxes import GRID, find_boxes, format_box, from_unit
from univg_nb.data.prompts import (
    COT_SUFFIX,
    SINGLE_IMAGE_PREFIX,
    prompt_text,
    target_text,
)
from univg_nb.data.rows import (
    Place,
    build,
    check_evaluation_box,
    extras,
    is_single_image,
    make,
    own_keys,
    training_box,
)
from univg_nb.data.sample import IMAGE_MARKER, GroundingSample

_UNIT_LIMIT = 2.0  # above it a coordinate cannot be a 0-1 float, however sloppy
_USUAL_BOX = re.compile(r"\(([0-9]{1,4}),([0-9]{1,4})\),\(([0-9]{1,4}),([0-9]{1,4})\)")


class _Style(NamedTuple):
    """One kind of sharegpt row: keys of the row and of a turn, who asks and replies."""

    key: str
    who: str
    what: str
    asks: str
    replies: str


_STYLES = {
    "conversations": _Style("conversations", "from", "value", "human", "gpt"),
    "messages": _Style("messages", "role", "content", "user", "assistant"),
}


def _markers(sample: GroundingSample) -> str:
    return IMAGE_MARKER * len(sample.images)


def read_stage2(row: dict[str, Any], place: Place) -> Iterator[GroundingSample]:
    question = place.get(row, "question", str)
    answer = training_box(place.get(row, "answer", list), place)
    yield build(row, place, place.images(row), question, answer)


def write_stage2(sample: GroundingSample, place: Place) -> dict[str, Any]:
    return {
        "images": [place.unrooted(p) for p in sample.images],
        "question": _markers(sample) + sample.question,
        "answer": list(sample.answer),
        **extras(sample),
    }


def read_mig(row: dict[str, Any], place: Place) -> Iterator[GroundingSample]:
    """MIG-Bench: 0-1 floats (original) or 0-1000 (revised), one unit per file (E3)."""
    numbers = place.numbers(place.get(row, "answer", list))
    unit = max(numbers) <= _UNIT_LIMIT
    if place.scale is None:
        place.scale = 1 if unit else GRID
    mixed = not unit if place.scale == 1 else unit and numbers != [*map(int, numbers)]
    if mixed:
        raise place.error(
            "box_unit",
            f"answer {numbers} is not in the file's unit (0-{place.scale})",
            "write all answers in one unit",
        )
    box = from_unit(numbers if place.scale == 1 else [v / GRID for v in numbers])
    if place.scale == GRID:
        x1, y1, x2, y2 = (min(GRID, max(0, round(v))) for v in numbers)
        box = (x1, y1, x2, y2)
    check_evaluation_box(numbers, box, (place.scale, place.scale), place)
    place.get(row, "task", str)
    yield build(row, place, place.images(row), place.get(row, "question", str), box)


def write_mig(sample: GroundingSample, place: Place) -> dict[str, Any]:
    if max(sample.answer) >= GRID:
        raise place.error(
            "box_out_of_range",
            f"answer {sample.answer} of sample {sample.id} holds {GRID}",
            "0-1 files are read back clipped to 0..999: use min(v, 999), "
            "or format 'mig_bench_revised'",
        )
    row = write_mig_revised(sample, place)
    return row | {"answer": [v / GRID for v in sample.answer]}


def write_mig_revised(sample: GroundingSample, place: Place) -> dict[str, Any]:
    return {
        "task": sample.task,
        "images": [place.unrooted(p) for p in sample.images],
        "question": sample.question,
        "answer": list(sample.answer),
        "additional_info": "",
        "need_format": True,
        **{k: v for k, v in extras(sample).items() if k != "task"},
    }


def read_mig_revised(row: dict[str, Any], place: Place) -> Iterator[GroundingSample]:
    place.scale = GRID
    return read_mig(row, place)


def _boxes_in(text: str) -> list[tuple[float, ...]]:
    """As `find_boxes`, in half the time for what nearly every reply holds."""
    usual = _USUAL_BOX.search(text)
    if usual and text.count("(") == 2 and "[" not in text and "<box>" not in text:
        return [tuple(map(int, usual.groups()))]
    return find_boxes(text)


def _turns(
    row: dict[str, Any], place: Place, images: tuple[str, ...]
) -> list[tuple[str, str]]:
    """(human, gpt) pairs of a sharegpt row, in either key style; system turns skipped.

    Checks that ``<image>`` markers and images agree in number: LLaMA-Factory pairs them
    in order, so one too few shifts or drops a picture.
    """
    style = _STYLES["conversations" if "conversations" in row else "messages"]
    turns = place.get(row, style.key, list)
    pairs = _pairs(turns, style) or _pairs(_without_system(turns, style, place), style)
    markers = sum([question.count(IMAGE_MARKER) for question, _ in pairs])
    if markers != len(images):
        raise place.error(
            "marker_mismatch",
            f"{markers} {IMAGE_MARKER} markers for {len(images)} images",
            "write one marker for each image",
        )
    return pairs


def _pairs(turns: list[Any], style: _Style) -> list[tuple[str, str]]:
    """Questions and replies; [] unless all turns are texts and alternate in pairs."""
    _, who, what, asks, replies = style
    pairs = []
    try:
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            question, reply = human[what], gpt[what]
            if human[who] != asks or gpt[who] != replies:
                return []
            if type(question) is not str or type(reply) is not str:
                return []
            pairs.append((question, reply))
    except (KeyError, TypeError, ValueError):  # no such key, no object, an odd number
        return []
    return pairs


def _without_system(turns: list[Any], style: _Style, place: Place) -> list[Any]:
    """The turns but for the system's, looked at one by one to say what is wrong."""
    _, who, what, *names = style
    kept = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise place.error("bad_turn", f"turn {turn!r:.60}", f"give {who}/{what}")
        role = place.get(turn, who, str)
        if role == "system":
            continue
        if role != names[len(kept) % 2]:
            raise place.error(
                "bad_turn",
                f"turn {len(kept)} is from {role!r}",
                f"turns must alternate {names[0]}, {names[1]}",
            )
        place.get(turn, what, str)
        kept.append(turn)
    if not kept or len(kept) % 2:
        raise place.error(
            "bad_turn", f"{len(kept)} turns", "give question and reply in pairs"
        )
    return kept


def read_stage1(row: dict[str, Any], place: Place) -> Iterator[GroundingSample]:
    images = place.images(row)
    pairs = _turns(row, place, images)
    if len(pairs) != 1:
        raise place.error(
            "bad_turn",
            f"{len(pairs)} question/reply pairs",
            "stage1_cotsft has one; multi-turn files are format='mgrounding'",
        )
    text, reply = pairs[0]
    text = text.replace(IMAGE_MARKER, "").lstrip("\n")
    asked = text.endswith(COT_SUFFIX)
    if row.get("cot") is not None:
        cot = place.get(row, "cot", bool)
    else:
        simple = text.startswith(SINGLE_IMAGE_PREFIX) or is_single_image(images)
        cot = asked or not simple
    text = text.removesuffix(COT_SUFFIX) if cot else text
    text = text if cot else text.removeprefix(SINGLE_IMAGE_PREFIX)
    think, closed, rest = reply.partition("</think>")
    chain = think.partition("<think>")[2] if closed and "<think>" in think else None
    boxes = _boxes_in(rest if closed else reply)
    if len(boxes) != 1:
        raise place.error(
            "bad_reply",
            f"reply {reply[-60:]!r} answers with {len(boxes)} boxes",
            "write <answer>(x1,y1),(x2,y2)</answer> with one box",
        )
    answer = training_box(boxes[0], place)
    yield build(row, place, images, text, answer, cot=cot, chain=chain)


def write_stage1(sample: GroundingSample, place: Place) -> dict[str, Any]:
    text = prompt_text(sample.question, sample.cot)
    reply = target_text(sample.answer, sample.cot, sample.chain)
    return {
        "conversations": [
            {"from": "human", "value": _markers(sample) + text},
            {"from": "gpt", "value": reply},
        ],
        "images": [place.unrooted(p) for p in sample.images],
        **extras(sample, chain=not sample.cot),
        # said in so many words: a question may end like the request for a chain
        **({} if sample.cot else {"cot": False}),
    }


def read_mgrounding(row: dict[str, Any], place: Place) -> Iterator[GroundingSample]:
    """Every pair whose reply holds a box; pairs without one (captions) are passed over.

    Several boxes in one reply: all in ``boxes``, the first is the answer.
    """
    images = place.images(row)
    pairs = _turns(row, place, images)
    name = place.name(row)
    task, cot, chain = own_keys(row, place, images)
    if row.get("type"):
        task = place.get(row, "type", str)
    for turn, (human, gpt) in enumerate(pairs):
        if found := _boxes_in(gpt):
            boxes = [training_box(box, place) for box in found]
            several = tuple(boxes) if len(boxes) > 1 else ()
            id = name if len(pairs) == 1 else f"{name}/{turn}"
            yield make(place, id, task, images, human, boxes[0], cot, chain, several)


def write_mgrounding(sample: GroundingSample, place: Place) -> dict[str, Any]:
    boxes = sample.boxes or (sample.answer,)
    if boxes[0] != sample.answer or len(sample.boxes) == 1:
        raise place.error(
            "bad_sample",
            f"sample {sample.id}: boxes {sample.boxes} against {sample.answer}",
            "boxes must be () or several, the answer first",
        )
    marked = [f"<|box_start|>{format_box(b)}<|box_end|>" for b in boxes]
    keys = extras(sample)
    return {
        "id": sample.id,
        "images": [place.unrooted(p) for p in sample.images],
        "conversations": [
            {"from": "human", "value": _markers(sample) + sample.question},
            {"from": "gpt", "value": "".join(marked)},
        ],
        "type": sample.task,
        **{k: v for k, v in keys.items() if k in ("cot", "chain")},
    }


class Format(NamedTuple):
    """How one kind of file is read and written, row by row."""

    read: Callable[[dict[str, Any], Place], Iterator[GroundingSample]]
    write: Callable[[GroundingSample, Place], dict[str, Any]]
    training: bool  # True: a bad box is an error; False: it is clipped


FORMATS = {
    "stage1_cotsft": Format(read_stage1, write_stage1, True),
    "stage2_rl": Format(read_stage2, write_stage2, True),
    "mgrounding": Format(read_mgrounding, write_mgrounding, True),
    "mig_bench": Format(read_mig, write_mig, False),
    "mig_bench_revised": Format(read_mig_revised, write_mig_revised, False),
}

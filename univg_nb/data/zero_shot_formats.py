"""Rows of files with pixel boxes: LISA, LLMSeg, ReasonVOS, ReVOS (PF sec. 2.3, 9),
and RefCOCO/+/g.

Their boxes are pixels, so reading needs each image's size: the row's optional keys
"width" and "height", else the image's header. Instructions are wrapped in the released
sentence on reading and unwrapped on writing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from univg_nb.data.boxes import GRID, Box, to_pixels
from univg_nb.data.formats import FORMATS, Format
from univg_nb.data.images import image_size
from univg_nb.data.rows import Place, build, check_evaluation_box, extras
from univg_nb.data.sample import GroundingSample

INSTRUCTION = (
    "Output the bounding box in the image corresponding to the instruction: ",
    ".",
)
VIDEO_INSTRUCTION = (
    "This is a sequence of images from a video. Please understand the entire video "
    "content, and then output the bounding box in the third image according to the "
    "instruction: ",
    ".",
)
SCORED_FRAME = 2  # the third image, whatever the number of frames
_NUMBER = re.compile(r"-?\d++(?:\.\d++)?+(?:[eE][+-]?\d++)?+")


def _size(row: dict[str, Any], path: str, place: Place) -> tuple[int, int]:
    if "width" in row or "height" in row:
        width, height = (place.get(row, key, int) for key in ("width", "height"))
        if width < 1 or height < 1:
            raise place.error(
                "bad_size", f"size {width} x {height}", "give the image's pixels"
            )
        return width, height
    try:
        return image_size(path)
    except ValueError as error:
        raise place.error(
            "bad_image",
            f"pixel boxes need the size of the image: {error}",
            "pass image_root= or add the keys width and height",
        ) from error


def _grid_box(value: Any, size: tuple[int, int], place: Place) -> Box:
    """Pixels to 0-1000, rounded, clipped to the grid (an error in strict mode)."""
    numbers = place.numbers(value)
    w, h = size
    x1, y1, x2, y2 = (
        min(GRID, max(0, round(GRID * v / m)))
        for v, m in zip(numbers, (w, h, w, h), strict=True)
    )
    check_evaluation_box(numbers, (x1, y1, x2, y2), (w, h), place)
    return (x1, y1, x2, y2)


def _pixel_box(box: Box, size: tuple[int, int]) -> list[float]:
    """Whole pixels where they read back as the same box, else decimals."""
    exact = to_pixels(box, *size)
    whole = [round(v) for v in exact]
    w, h = size
    back = [round(GRID * v / m) for v, m in zip(whole, (w, h, w, h), strict=True)]
    return list(whole) if back == list(box) else list(exact)


def _wrap(template: tuple[str, str], text: str) -> str:
    return template[0] + text + template[1]


def _unwrap(template: tuple[str, str], sample: GroundingSample, place: Place) -> str:
    before, after = template
    text = sample.question
    if not (text.startswith(before) and text.endswith(after)):
        raise place.error(
            "bad_question",
            f"question {text[:60]!r} of sample {sample.id}",
            f"a sample of this format begins with {before!r}",
        )
    return text[len(before) : -len(after)]


def _rest(sample: GroundingSample) -> dict[str, Any]:
    return {k: v for k, v in extras(sample).items() if k != "boxes"}


def _single(
    row: dict[str, Any], place: Place, key: str, boxes: list[Any]
) -> Iterator[GroundingSample]:
    path = place.image(place.get(row, "image_path", str))
    if not boxes:
        raise place.error("bad_box", "no box at all", "give at least one")
    size = _size(row, path, place)
    grid = tuple(_grid_box(b, size, place) for b in boxes)
    question = _wrap(INSTRUCTION, place.get(row, key, str))
    # The released scorers use the first box alone (E8); all are kept in boxes.
    several = grid if len(grid) > 1 else ()
    yield build(row, place, (path,), question, grid[0], boxes=several)


def _write_single(
    sample: GroundingSample, place: Place, key: str, box_key: str
) -> dict[str, Any]:
    boxes = sample.boxes or (sample.answer,)
    if len(sample.images) != 1 or boxes[0] != sample.answer or len(sample.boxes) == 1:
        raise place.error(
            "bad_sample",
            f"sample {sample.id} has {len(sample.images)} images, boxes {sample.boxes}",
            "this format has one image; boxes must be () or several, the answer first",
        )
    path = place.unrooted(sample.images[0])
    size = _size({}, place.image(path), place)
    return {
        "image_path": path,
        key: _unwrap(INSTRUCTION, sample, place),
        box_key: [_pixel_box(b, size) for b in boxes],
        "width": size[0],
        "height": size[1],
        **_rest(sample),
    }


def read_lisa(row: dict[str, Any], place: Place) -> Iterator[GroundingSample]:
    yield from _single(row, place, "instruction", place.get(row, "boxes", list))


def write_lisa(sample: GroundingSample, place: Place) -> dict[str, Any]:
    return _write_single(sample, place, "instruction", "boxes")


def read_llmseg(row: dict[str, Any], place: Place) -> Iterator[GroundingSample]:
    """``bbox`` holds boxes of four, or corner points of two, as lists."""
    value = place.get(row, "bbox", list)
    if value and all(isinstance(v, list) and len(v) == 2 for v in value):
        if len(value) % 2:
            raise place.error("bad_box", f"{len(value)} corner points", "give pairs")
        value = [a + b for a, b in zip(value[::2], value[1::2], strict=True)]
    yield from _single(row, place, "question", value)


def write_llmseg(sample: GroundingSample, place: Place) -> dict[str, Any]:
    return _write_single(sample, place, "question", "bbox")


def read_refcoco(row: dict[str, Any], place: Place) -> Iterator[GroundingSample]:
    """RefCOCO/+/g as VLM-R1 distributes them: ``problem`` asks, ``solution`` is a box.

    Always in single-image mode, wherever the images lie; the task is the file's name
    (refcoco_val), the column of the paper's Table 3.
    """
    path = place.image(place.get(row, "image", str))
    value = place.get(row, "solution", list)
    box = _grid_box(value, _size(row, path, place), place)
    text, task = place.get(row, "problem", str), row.get("task", Path(place.file).stem)
    yield build(row, place, (path,), text, box, cot=False, task=task)


def write_refcoco(sample: GroundingSample, place: Place) -> dict[str, Any]:
    if sample.cot or len(sample.images) != 1 or sample.boxes:
        raise place.error(
            "bad_sample",
            f"sample {sample.id} has {len(sample.images)} images, cot {sample.cot}",
            "this format has one image and one box, and asks for no chain",
        )
    path = place.unrooted(sample.images[0])
    size = _size({}, place.image(path), place)
    return {
        "image": path,
        "problem": sample.question,
        "solution": _pixel_box(sample.answer, size),
        "width": size[0],
        "height": size[1],
        **_rest(sample),
    }


def _video(
    row: dict[str, Any], place: Place, images: tuple[str, ...]
) -> Iterator[GroundingSample]:
    boxes = place.get(row, "bbox_list", list)
    if len(images) <= SCORED_FRAME or len(boxes) <= SCORED_FRAME:
        raise place.error(
            "bad_frames",
            f"{len(images)} frames, {len(boxes)} boxes",
            f"the box of frame {SCORED_FRAME + 1} is the answer: give at least as many",
        )
    value = boxes[SCORED_FRAME]
    if isinstance(value, str):  # decimals kept whole, unlike the released reader (E8)
        value = [float(n) for n in _NUMBER.findall(value)]
    elif isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = [float(n) for v in value for n in _NUMBER.findall(v)]
    box = _grid_box(value, _size(row, images[SCORED_FRAME], place), place)
    question = _wrap(VIDEO_INSTRUCTION, place.get(row, "question", str))
    yield build(row, place, images, question, box)


def _write_video(sample: GroundingSample, place: Place) -> dict[str, Any]:
    if len(sample.images) <= SCORED_FRAME or sample.boxes:
        raise place.error(
            "bad_sample",
            f"sample {sample.id}: {len(sample.images)} frames, boxes {sample.boxes}",
            f"a video item has more than {SCORED_FRAME} frames and one box",
        )
    middle = place.image(place.unrooted(sample.images[SCORED_FRAME]))
    size = _size({}, middle, place)
    boxes: list[Any] = [[] for _ in sample.images]
    boxes[SCORED_FRAME] = _pixel_box(sample.answer, size)
    return {
        "question": _unwrap(VIDEO_INSTRUCTION, sample, place),
        "bbox_list": boxes,
        "width": size[0],
        "height": size[1],
        **_rest(sample),
    }


def read_reasonvos(row: dict[str, Any], place: Place) -> Iterator[GroundingSample]:
    yield from _video(row, place, place.images(row, "image_list"))


def write_reasonvos(sample: GroundingSample, place: Place) -> dict[str, Any]:
    row = _write_video(sample, place)
    row["bbox_list"] = [str(b) for b in row["bbox_list"]]  # strings, as released
    return {"image_list": [place.unrooted(p) for p in sample.images], **row}


def _number_in(name: str) -> int:
    return int(_NUMBER.findall(name)[0])


@lru_cache(maxsize=4096)
def _frames(folder: str) -> tuple[str, ...]:
    """Frame files of a video folder in order of the first number in their names."""
    names = [n for n in os.listdir(folder) if n.endswith((".jpg", ".png"))]
    return tuple(sorted((n for n in names if re.search(r"\d", n)), key=_number_in))


def _video_frames(folder: str, place: Place) -> tuple[str, ...]:
    if not os.path.isdir(folder):
        raise place.error(
            "bad_image",
            f"video folder {folder} does not exist",
            "pass the folder that holds the videos as image_root=",
        )
    return _frames(folder)


def read_revos(row: dict[str, Any], place: Place) -> Iterator[GroundingSample]:
    """``frames`` counts the sorted files of the folder ``video_id``."""
    folder = place.image(place.get(row, "video_id", str))
    names = _video_frames(folder, place)
    picked = place.get(row, "frames", list)
    for index in picked:
        if not isinstance(index, int) or not 0 <= index < len(names):
            raise place.error(
                "bad_frames",
                f"frame {index!r} of {len(names)} in {folder}",
                "check that the video is complete",
            )
    images = tuple(os.path.join(folder, names[i]) for i in picked)
    yield from _video(row, place, images)


def write_revos(sample: GroundingSample, place: Place) -> dict[str, Any]:
    paths = [place.unrooted(p) for p in sample.images]
    folders = {os.path.dirname(p) for p in paths}
    if len(folders) != 1:
        raise place.error(
            "bad_frames",
            f"sample {sample.id} has frames in {len(folders)} folders",
            "a ReVOS video is one folder",
        )
    video = folders.pop()
    names = _video_frames(place.image(video), place)
    missing = [p for p in paths if os.path.basename(p) not in names]
    if missing:
        raise place.error("bad_frames", f"{missing} not found", "write the images")
    row = _write_video(sample, place)
    frames = [names.index(os.path.basename(p)) for p in paths]
    return {"video_id": video, "frames": frames, **row}


ALL_FORMATS = FORMATS | {
    "lisa": Format(read_lisa, write_lisa, False),
    "llmseg": Format(read_llmseg, write_llmseg, False),
    "reasonvos": Format(read_reasonvos, write_reasonvos, False),
    "revos": Format(read_revos, write_revos, False),
    "refcoco": Format(read_refcoco, write_refcoco, False),
}

"""Read and write rows with pixel boxes: LISA, LLMSeg, ReasonVOS, ReVOS, RefCOCO/+/g.

Reading a pixel box needs the size of its image: the row's optional keys "width" and
"height", else the image's header. Instructions are wrapped in the released sentence
on reading and unwrapped on writing. Schemas: docs/paper_facts.md#files.
"""

import re
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from univg_nb.data.boxes import GRID, Box, to_pixels
from univg_nb.data.formats import (
    FORMATS,
    Format,
    Row,
    RowContext,
    Samples,
    build_sample,
    clip_to_grid,
    own_keys,
)
from univg_nb.data.images import image_size
from univg_nb.data.sample import GroundingSample

# What stands before and after an instruction: `text.join(INSTRUCTION)` wraps it.
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
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SCORED_FRAME = 2  # the third image, whatever the number of frames
_NUMBER = re.compile(r"-?\d++(?:\.\d++)?+(?:[eE][+-]?\d++)?+")


def _find_size(row: Row, path: str, context: RowContext) -> tuple[int, int]:
    if "width" in row or "height" in row:
        width, height = (context.get(row, key, int) for key in ("width", "height"))
        if width < 1 or height < 1:
            problem = f"size {width} x {height}; give the image's pixels"
            raise context.error("bad_size", problem)
        return width, height
    try:
        return image_size(path)
    except ValueError as error:
        problem = f"{error}; its size is needed: pass image_root= or add width, height"
        raise context.error("bad_image", problem) from error


def _to_whole_pixels(box: Box, size: tuple[int, int]) -> list[float]:
    """Return whole pixels where they read back as the same box, else decimals."""
    exact = to_pixels(box, *size)
    whole = [round(v) for v in exact]
    back = [round(GRID * v / m) for v, m in zip(whole, (*size, *size), strict=True)]
    return list(whole) if back == list(box) else list(exact)


def _unwrap(
    template: tuple[str, str], sample: GroundingSample, context: RowContext
) -> str:
    before, after = template
    text = sample.question
    if text.startswith(before) and text.endswith(after):
        return text[len(before) : -len(after)]
    problem = f"question {text[:60]!r} of {sample.id}; it must begin with {before!r}"
    raise context.error("bad_question", problem)


def _write_pixels(
    sample: GroundingSample, context: RowContext, index: int = 0
) -> tuple[str, list[list[float]], Row]:
    """Return the path of an image, the boxes in its pixels and the other keys."""
    if index == 0 and len(sample.images) != 1:
        problem = f"sample {sample.id} has {len(sample.images)} images"
        raise context.error("bad_sample", f"{problem}; this format has one")
    path = context.strip_root(sample.images)[index]
    width, height = size = _find_size({}, context.join_root([path])[0], context)
    boxes = [_to_whole_pixels(b, size) for b in sample.boxes or (sample.answer,)]
    return path, boxes, {"width": width, "height": height, **own_keys(sample, "boxes")}


# ---------------------------------------------------------------- one image


def _read_single(row: Row, context: RowContext, *, text: str, boxes: str) -> Samples:
    """Read LISA or LLMSeg, where boxes are lists of four or corner points of two."""
    images = context.join_root([context.get(row, "image_path", str)])
    values = context.get(row, boxes, list)
    if values and all(isinstance(v, list) and len(v) == 2 for v in values):
        if len(values) % 2:
            raise context.error("bad_box", f"{len(values)} corner points; give pairs")
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
    if not values:
        raise context.error("bad_box", "no box at all; give at least one")
    size = _find_size(row, images[0], context)
    grid = [clip_to_grid(context.numbers(v), size, context) for v in values]
    question = context.get(row, text, str).join(INSTRUCTION)
    # the released scorers use the first box alone (docs/paper_facts.md#e8)
    several = tuple(grid) if len(grid) > 1 else ()
    yield build_sample(row, context, images, question, grid[0], boxes=several)


def _write_single(
    sample: GroundingSample, context: RowContext, *, text: str, boxes: str
) -> Row:
    path, pixels, rest = _write_pixels(sample, context)
    question = _unwrap(INSTRUCTION, sample, context)
    return {"image_path": path, text: question, boxes: pixels, **rest}


def _read_refcoco(row: Row, context: RowContext) -> Samples:
    """Read RefCOCO/+/g as VLM-R1 distributes them, in single-image mode.

    The task is the file's name (refcoco_val), a column of the paper's Table 3.
    """
    images = context.join_root([context.get(row, "image", str)])
    numbers = context.numbers(context.get(row, "solution", list))
    box = clip_to_grid(numbers, _find_size(row, images[0], context), context)
    text = context.get(row, "problem", str)
    fields: dict[str, Any] = {"cot": False}
    if row.get("task") is None:
        fields["task"] = Path(context.file).stem
    yield build_sample(row, context, images, text, box, **fields)


def _write_refcoco(sample: GroundingSample, context: RowContext) -> Row:
    if sample.cot or sample.boxes:
        problem = f"sample {sample.id}; this format has one box and asks for no chain"
        raise context.error("bad_sample", problem)
    path, (box,), rest = _write_pixels(sample, context)
    return {"image": path, "problem": sample.question, "solution": box, **rest}


# ---------------------------------------------------------------- videos


def _read_video(row: Row, context: RowContext, images: tuple[str, ...]) -> Samples:
    boxes = context.get(row, "bbox_list", list)
    if len(images) <= SCORED_FRAME or len(boxes) <= SCORED_FRAME:
        problem = f"{len(images)} frames, {len(boxes)} boxes; the third is the answer"
        raise context.error("bad_frames", problem)
    value: Any = boxes[SCORED_FRAME]
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        # decimals are kept whole, unlike in the released reader
        value = [float(number) for text in texts for number in _NUMBER.findall(text)]
    size = _find_size(row, images[SCORED_FRAME], context)
    question = context.get(row, "question", str).join(VIDEO_INSTRUCTION)
    box = clip_to_grid(context.numbers(value), size, context)
    yield build_sample(row, context, images, question, box)


def _write_video(sample: GroundingSample, context: RowContext) -> Row:
    if len(sample.images) <= SCORED_FRAME or sample.boxes:
        problem = f"sample {sample.id} has {len(sample.images)} frames"
        raise context.error("bad_sample", f"{problem}; give three and one box")
    _, (box,), rest = _write_pixels(sample, context, SCORED_FRAME)
    boxes: list[list[float]] = [[] for _ in sample.images]
    boxes[SCORED_FRAME] = box
    question = _unwrap(VIDEO_INSTRUCTION, sample, context)
    return {"question": question, "bbox_list": boxes, **rest}


def _read_reasonvos(row: Row, context: RowContext) -> Samples:
    yield from _read_video(row, context, context.images(row, "image_list"))


def _write_reasonvos(sample: GroundingSample, context: RowContext) -> Row:
    row = _write_video(sample, context)
    row["bbox_list"] = [str(b) for b in row["bbox_list"]]  # strings, as released
    return {"image_list": context.strip_root(sample.images), **row}


@lru_cache(maxsize=4096)
def _list_frames(folder: Path, changed: int) -> tuple[str, ...]:
    """Return a folder's pictures in the order of the numbers in their names.

    Another time of change, in nanoseconds, lists the folder anew. The names must differ
    by their numbers only; hidden files (macOS leaves "._1.jpg") are no frames.
    """
    names = [
        (tuple(map(int, re.findall(r"\d+", path.stem))), path)
        for path in folder.iterdir()
        if path.suffix.lower() in _PICTURES and path.name[0] != "."
    ]
    for (number, path), (following, other) in pairwise(sorted(names)):
        texts = [re.split(r"\d+", one.stem) for one in (path, other)]
        if number == following or texts[0] != texts[1]:
            problem = f"{path.name} and {other.name} in {folder} have no order"
            raise ValueError(f"{problem}; give frames one name and a number each")
    return tuple(str(path) for _, path in sorted(names))


def _find_frames(video: str, context: RowContext) -> tuple[str, ...]:
    """Return the paths of a video's frames."""
    folder = Path(context.join_root([video])[0])
    if not folder.is_dir():
        problem = f"no video folder {folder}; pass its parent as image_root="
        raise context.error("bad_image", problem)
    try:
        frames = _list_frames(folder, folder.stat().st_mtime_ns)
    except ValueError as error:
        raise context.error("bad_frames", str(error)) from error
    if not frames:
        problem = f"no picture ({', '.join(_PICTURES)}) in folder {folder}; fetch it"
        raise context.error("bad_frames", problem)
    return frames


def _read_revos(row: Row, context: RowContext) -> Samples:
    """Read `frames` as positions in the sorted files of the folder `video_id`."""
    video = context.get(row, "video_id", str)
    frames, picked = _find_frames(video, context), context.get(row, "frames", list)
    for index in picked:
        if type(index) is not int or not 0 <= index < len(frames):
            problem = f"frame {index!r} of {len(frames)} in {video}; fetch it again"
            raise context.error("bad_frames", problem)
    yield from _read_video(row, context, tuple(frames[index] for index in picked))


def _write_revos(sample: GroundingSample, context: RowContext) -> Row:
    video = str(Path(context.strip_root(sample.images)[0]).parent)
    frames, paths = _find_frames(video, context), context.join_root(sample.images)
    if missing := set(paths) - set(frames):
        problem = f"{sorted(missing)} not found in {video}; write the images there"
        raise context.error("bad_frames", problem)
    places = [frames.index(path) for path in paths]
    return {"video_id": video, "frames": places, **_write_video(sample, context)}


def _single_format(text: str, boxes: str) -> Format:
    read = partial(_read_single, text=text, boxes=boxes)
    return Format(read, partial(_write_single, text=text, boxes=boxes), False)


ALL_FORMATS = FORMATS | {
    "lisa": _single_format("instruction", "boxes"),
    "llmseg": _single_format("question", "bbox"),
    "reasonvos": Format(_read_reasonvos, _write_reasonvos, False),
    "revos": Format(_read_revos, _write_revos, False),
    "refcoco": Format(_read_refcoco, _write_refcoco, False),
}

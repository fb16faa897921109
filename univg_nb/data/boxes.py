"""Boxes on the 0-1000 grid: parse one from a reply, write one, compute IoU.

A box is `(x1, y1, x2, y2)`: top left and bottom right corner, integers, 0 to 1000
relative to the image's width and height, as Qwen2-VL writes them
(docs/paper_facts.md#prompts). Only the standard library is imported here.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

Box = tuple[int, int, int, int]
GRID = 1000

OK = "ok"
NO_ANSWER = "no_answer"
NO_BOX = "no_box"
INVERTED = "inverted"
OUT_OF_RANGE = "out_of_range"
STATUSES = (OK, NO_ANSWER, NO_BOX, INVERTED, OUT_OF_RANGE)
MODES = ("answer", "released")

# Only the end of a longer reply is read; the released evaluation stops at a hundredth.
MAX_REPLY = 100_000


class ParsedBox(NamedTuple):
    """What `parse_box` found: the box (or None) and one of `STATUSES`."""

    box: Box | None
    status: str


# Every quantifier is possessive and every alternative starts with a bracket, so the
# time of a search is linear in the length of the text.
_N, _S = r"[+-]?[0-9]++(?:\.[0-9]++)?+", r"\s*+"
_C = f"{_S},{_S}"
_BOX = re.compile(
    # (x1,y1),(x2,y2) or four numbers in one bracket
    rf"\({_S}{_N}{_C}{_N}"
    rf"(?:{_S}\){_C}\({_S}{_N}{_C}{_N}{_S}\)|{_C}{_N}{_C}{_N}{_S}[)\]])"
    rf"|\[{_S}{_N}{_C}{_N}{_C}{_N}{_C}{_N}{_S}[)\]]"
    rf"|<box>{_S}{_N}\s++{_N}\s++{_N}\s++{_N}{_S}</box>"
)
_NUMBER = re.compile(r"[0-9.+-]++")  # in a match of `_BOX`
_USUAL = re.compile(r"\((\d{1,4}),(\d{1,4})\),\((\d{1,4}),(\d{1,4})\)", re.ASCII)
# The notations that the released parser tries, one after the other.
_I, _F, _G = r"\d++", r"\d++\.\d++", r",\s*+"
_RELEASED = (
    rf"\({_I}{_G}{_I}\){_G}\({_I}{_G}{_I}\)",
    rf"\[{_F}{_G}{_F}{_G}{_F}{_G}{_F}\]",
    rf"\({_F},{_F}\),\({_F},{_F}\)",
    rf"\({_F}{_G}{_F}{_G}{_F}{_G}{_F}\)",
    rf"\[{_I}{_G}{_I}{_G}{_I}{_G}{_I}\]",
    rf"<box>{_I}\s++{_I}\s++{_I}\s++{_I}</box>",
)
_RELEASED_NUMBER = re.compile(r"[\d.]++")


def box_status(box: Sequence[float]) -> str:
    """Return `ok`, `out_of_range` (outside 0-1000) or `inverted` (no area)."""
    x1, y1, x2, y2 = box
    if min(box) < 0 or max(box) > GRID:
        return OUT_OF_RANGE
    return OK if x1 < x2 and y1 < y2 else INVERTED


def _parse_last(text: str) -> ParsedBox | None:
    found = _BOX.findall(text)
    if not found:
        return None
    values = [float(number) for number in _NUMBER.findall(found[-1])]
    if max(map(abs, values)) >= 1e9:  # no coordinate; infinite in the worst case
        return ParsedBox(None, OUT_OF_RANGE)
    # a decimal point with nothing above 1 can only be the 0-1 notation
    scale = GRID if max(values) <= 1 and "." in found[-1] else 1
    x1, y1, x2, y2 = (round(scale * v) for v in values)
    return ParsedBox((x1, y1, x2, y2), box_status((x1, y1, x2, y2)))


def find_boxes(text: str) -> list[tuple[float, ...]]:
    """Return the four numbers of every box in a text, unscaled and unchecked."""
    usual = _USUAL.findall(text)
    # All brackets are those of usual boxes, as in nearly all files: twice as fast.
    if text.count("(") == 2 * len(usual) and "[" not in text and "<box>" not in text:
        return [(int(x1), int(y1), int(x2), int(y2)) for x1, y1, x2, y2 in usual]
    return [tuple(map(float, _NUMBER.findall(box))) for box in _BOX.findall(text)]


def scan_boxes(text: str) -> list[tuple[int, int, tuple[float, ...]]]:
    """Return (start, end, four numbers) of every box in a text, as `find_boxes`."""
    return [
        (*match.span(), tuple(map(float, _NUMBER.findall(match[0]))))
        for match in _BOX.finditer(text)
    ]


def parse_box(text: str, mode: str = "answer") -> ParsedBox:
    """Parse the box of a reply. Whatever the reply is, no error is raised.

    Args:
        text: the reply; only its last `MAX_REPLY` characters are read.
        mode: "answer" takes the last box inside the last closed `<answer>...</answer>`
            or, in a reply without answer tags, the last box, in any notation that the
            released parser knows, with decimals too (0-1 floats are scaled).
            "released" returns what the released MIG-Bench parser returns, defects
            included (docs/paper_facts.md#e1 to #e3): the first of several boxes, and
            (0, 0, 0, 0) for floats and for a reply without a box.

    Returns:
        The box and its status. In mode "answer": `ok`; `no_answer` for no tags and no
        box, or a tag that is never closed (the reply was cut); `no_box` for answer tags
        without a box; `inverted` for x2 <= x1 or y2 <= y1; `out_of_range` for a
        coordinate outside 0-1000. The last two keep the box as written, unless a number
        is 10**9 or more.
    """
    if mode not in MODES:
        raise ValueError(f"parse_box: mode {mode!r} is unknown; use one of {MODES}")
    text = text[-MAX_REPLY:]
    if mode == "released":
        return _parse_released(text)
    last_close = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, last_close) if last_close >= 0 else -1
    if start >= 0:
        inside = text[start + len("<answer>") : text.find("</answer>", start)]
        return _parse_last(inside) or ParsedBox(None, NO_BOX)
    if "<answer>" in text:
        return ParsedBox(None, NO_ANSWER)
    return _parse_last(text) or ParsedBox(None, NO_ANSWER)


def _parse_released(text: str) -> ParsedBox:
    """Parse as the released MIG-Bench evaluation does.

    It takes all boxes of the first notation that is in the reply at all, drops the last
    if there are several, and returns the first of the rest; `int` fails on floats.
    """
    matches = (re.search(pattern, text) for pattern in _RELEASED)
    first = next((match[0] for match in matches if match), "")
    try:
        x1, y1, x2, y2 = map(int, _RELEASED_NUMBER.findall(first))
    except ValueError:
        return ParsedBox((0, 0, 0, 0), NO_BOX)
    return ParsedBox((x1, y1, x2, y2), box_status((x1, y1, x2, y2)))


def compute_intersection(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the area that two boxes (x1, y1, x2, y2) have in common."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union, 0..1, of two boxes in one unit.

    It is 0.0 if a box has no area (docs/paper_facts.md#e4).
    """
    if not (a[0] < a[2] and a[1] < a[3] and b[0] < b[2] and b[1] < b[3]):
        return 0.0
    inter = compute_intersection(a, b)
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    # tiny float boxes can underflow to an area of zero
    union = area_a + area_b - inter
    return min(1.0, inter / union) if union > 0 else 0.0


def format_box(box: Sequence[int]) -> str:
    """Return `(x1,y1),(x2,y2)`, the notation of prompts, replies and files."""
    x1, y1, x2, y2 = box
    return f"({x1},{y1}),({x2},{y2})"


def to_pixels(
    box: Sequence[float], width: int, height: int
) -> tuple[float, float, float, float]:
    """Convert a 0-1000 box to pixels of an image of this size; not rounded."""
    x1, y1, x2, y2 = box
    sx, sy = width / GRID, height / GRID
    return (x1 * sx, y1 * sy, x2 * sx, y2 * sy)


def stretch_box(box: Box) -> Box:
    """Stretch a box as the paper does for Migician's row, rounding included.

    y1 moves down by a twentieth and y2 by a tenth, neither beyond 999; see
    docs/paper_facts.md#evaluation.
    """
    x1, y1, x2, y2 = box
    moved = (min(y, GRID) / GRID * f for y, f in ((y1, 1.05), (y2, 1.10)))
    top, bottom = (int(GRID * round(min(0.999, y), 3)) for y in moved)
    return (x1, top, x2, bottom)

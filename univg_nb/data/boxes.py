"""Boxes on the 0-1000 grid: reading one out of a reply, writing one, IoU.

A box is ``(x1, y1, x2, y2)``: top left and bottom right corner, integers, 0 to 1000
relative to the image's width and height (the Qwen2-VL convention; PF sec. 1, 9).
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Box = tuple[int, int, int, int]
GRID = 1000

OK = "ok"
NO_ANSWER = "no_answer"
NO_BOX = "no_box"
INVERTED = "inverted"
OUT_OF_RANGE = "out_of_range"
STATUSES = (OK, NO_ANSWER, NO_BOX, INVERTED, OUT_OF_RANGE)
MODES = ("answer", "released")


class ParsedBox(NamedTuple):
    """What `parse_box` found: the box (or None) and one of `STATUSES`."""

    box: Box | None
    status: str


# Every quantifier is possessive and every alternative starts with a bracket of its own
# that the rest cannot contain more than once: nothing is ever scanned more than a fixed
# number of times, so a hostile reply of a megabyte costs milliseconds.
_S = r"\s*+"
_C = f"{_S},{_S}"


def _box_pattern(number: str) -> str:
    """Every notation of a box, as an expression; `number` is one coordinate's."""
    n = number
    two_more = rf"{_C}{n}{_C}{n}{_S}[)\]]"
    return (
        rf"(?:\({_S}{n}{_C}{n}"
        # (x1,y1),(x2,y2) or four in one bracket
        rf"(?:{_S}\){_C}\({_S}{n}{_C}{n}{_S}\)|{two_more})"
        rf"|\[{_S}{n}{_C}{n}{two_more}"  # [x1, y1, x2, y2]
        rf"|<box>{_S}{n}\s++{n}\s++{n}\s++{n}{_S}</box>)"
    )


_NUMBER_FORM = r"[+-]?[0-9]++(?:\.[0-9]++)?+"
_BOX = re.compile(_box_pattern(f"({_NUMBER_FORM})"))
_ANY = _box_pattern(_NUMBER_FORM)
# Boxes with no other bracket between them in one match, which takes two thirds of the
# time of one match each; group 1 is where the last begins, if there are several.
_RUN = re.compile(rf"{_ANY}(?:[^(\[<]*+(){_ANY})*+")
# Brackets that no match can have inside: what is read from there on is what a reading
# from the start would find there.
_BETWEEN = re.compile(r"\[|(?<![,\s])\(")
_NEAR = 2000  # characters at the end of a reply that are tried first
_MAX_DIGITS = 9  # longer numbers are no coordinates; int() of thousands of digits fails


def _released_pattern(best: int) -> re.Pattern[str]:
    """The first `best` of the six notations the released parser tries, in one pass.

    A group each, n1 to n6 in that parser's order of preference (PF sec. 9, E2). No
    match of one can begin inside a match of another, so one pass finds what six would.
    """
    i, f, gap = r"\d++", r"\d++\.\d++", r",\s*+"

    def four(number: str, between: str) -> str:
        return between.join([number] * 4)

    notations = (
        ("(", rf"(?P<n1>{i}{gap}{i}\){gap}\({i}{gap}{i})\)"),
        ("[", rf"(?P<n2>{four(f, gap)})\]"),
        ("(", rf"(?P<n3>{f},{f}\),\({f},{f})\)"),
        ("(", rf"(?P<n4>{four(f, gap)})\)"),
        ("[", rf"(?P<n5>{four(i, gap)})\]"),
        ("<box>", rf"(?P<n6>{four(i, chr(92) + 's++')})</box>"),
    )[:best]
    opened: dict[str, list[str]] = {}
    for bracket, rest in notations:
        opened.setdefault(re.escape(bracket), []).append(rest)
    return re.compile(
        "|".join(rf"{b}(?=\d)(?:{'|'.join(rest)})" for b, rest in opened.items())
    )


_RELEASED = {f"n{best + 1}": _released_pattern(best) for best in range(1, 7)}
_RELEASED_FLOATS = ("n2", "n3", "n4")
_NUMBER = re.compile(r"\d++")
_MOST_DIGITS = 4300  # int() refuses more
_ZEROS = bytes.maketrans(b"123456789?", b"0" * 10)  # "?": not ASCII, maybe a digit
# What is left of the notations without numbers and blanks, and the bytes of those.
_SHAPES = (b"(,),(,)", b"(,,,)", b"[,,,]", b"(,,,]", b"[,,,)", b"<box></box>")
_INSIDE = b"0123456789.+- \t\n\r\v\f\x1c\x1d\x1e\x1f"


def _may_hold_a_box(text: str) -> bool:
    """False only if no notation can be in `text`: a look that takes 1 ms a megabyte,
    where the patterns take 20 to find nothing in brackets without end."""
    bare = text.encode("ascii", "ignore").translate(None, _INSIDE)
    return any(shape in bare for shape in _SHAPES)


_SIGN = np.array([c not in _INSIDE for c in range(128)] + [False])
_DENSE = 10  # from one bracket in so many characters on, trying each takes too long
_LONG = 100_000  # characters from which it pays to look


def _without_idle_brackets(text: str) -> str:
    """`text` with an "x" for every bracket that no box begins with or holds.

    A pattern tries each of them, at a tenth of a microsecond: too long for a megabyte
    of brackets. Finds the same boxes.
    """
    brackets = text.count("(") + text.count("[")
    if len(text) < _LONG or brackets * _DENSE < len(text):
        return text
    form, kind = "utf-32-le", np.uint32
    if text.isascii():
        form, kind = "ascii", np.uint8
    codes = np.frombuffer(text.encode(form, "surrogatepass"), kind).copy()
    at = np.flatnonzero(_SIGN[np.minimum(codes, 128)])
    signs = np.pad(codes[at], (0, 7))  # (signs + 7,)
    opens = (signs == ord("(")) | (signs == ord("["))
    commas, round_end = signs == ord(","), signs == ord(")")
    ends = round_end | (signs == ord("]"))
    count = len(at)

    def after(marks: np.ndarray, steps: int) -> np.ndarray:
        return marks[steps : steps + count]

    four = after(commas, 1) & after(commas, 2) & after(commas, 3) & after(ends, 4)
    pair = after(commas, 1) & after(round_end, 2) & after(commas, 3)  # (a, b), (c, d)
    pair &= after(signs == ord("("), 4) & after(commas, 5) & after(round_end, 6)
    used = four | pair
    used[4:] |= pair[:-4]
    codes[at[opens[:count] & ~used]] = ord("x")
    return codes.tobytes().decode(form, "surrogatepass")


def _may_hold_a_long_number(text: str) -> bool:
    """False only if no number in `text` is too long for int()."""
    long_number = b"0" * (_MOST_DIGITS + 1)
    return long_number in text.encode("ascii", "replace").translate(_ZEROS)


def box_status(box: Sequence[float]) -> str:
    """``ok``, ``out_of_range`` (outside 0-1000) or ``inverted`` (no area)."""
    x1, y1, x2, y2 = box
    if min(box) < 0 or max(box) > GRID:
        return OUT_OF_RANGE
    return OK if x1 < x2 and y1 < y2 else INVERTED


def _to_box(numbers: Sequence[str]) -> ParsedBox:
    if any(len(n.split(".")[0].lstrip("+-")) > _MAX_DIGITS for n in numbers):
        return ParsedBox(None, OUT_OF_RANGE)
    values = [float(n[:32]) for n in numbers]
    # A decimal point with nothing above 1 can only be the 0-1 notation (E2).
    scale = GRID if max(values) <= 1 and any("." in n for n in numbers) else 1
    x1, y1, x2, y2 = (round(scale * v) for v in values)
    return ParsedBox((x1, y1, x2, y2), box_status((x1, y1, x2, y2)))


def _last_box(text: str) -> ParsedBox | None:
    if not _may_hold_a_box(text):
        return None
    text = _without_idle_brackets(text)
    near = _BETWEEN.search(text, max(0, len(text) - _NEAR))
    for start in (near.start() if near else 0, 0):
        last = deque(_RUN.finditer(text, start), maxlen=1)  # in C, faster than a loop
        if last:
            box = _BOX.match(text, max(last[0].start(), last[0].start(1)))
            return _to_box([g for g in box.groups() if g is not None])
        if not start:
            break
    return None


def find_boxes(text: str) -> list[tuple[float, ...]]:
    """The four numbers of every box written in ``text``, unscaled and unchecked."""
    # findall gives "" for the groups of the notations that are not there
    found = [[g[:32] for g in groups if g] for groups in _BOX.findall(text)]
    return [tuple(map(float, numbers)) for numbers in found]


def parse_box(text: str, mode: str = "answer") -> ParsedBox:
    """Read the box out of a reply. Never raises on a reply; linear in its length.

    ``mode="answer"``: the last box inside the last closed ``<answer>…</answer>``; in a
    reply without answer tags, its last box. Read are ``(x1,y1),(x2,y2)`` and the other
    notations the released parser knows, with decimals too (0-1 floats are scaled), so
    that the two modes differ by the defects alone. Statuses:

    - ``ok``
    - ``no_answer``: nothing was answered: no tags and no box, or a tag never closed
      (the reply was cut at its token limit); box None
    - ``no_box``: the answer tags hold no box; box None
    - ``inverted``: x2 <= x1 or y2 <= y1; box as written (its IoU is 0)
    - ``out_of_range``: a coordinate outside 0-1000; box as written (None where a number
      has more than nine digits)

    ``mode="released"``: what the released MIG-Bench parser returns, defects included
    (PF sec. 9): with two or more boxes it drops the last and takes the first (E1),
    floats end as (0, 0, 0, 0) (E2), the unit is always 0-1000 (E3), a reply without a
    box is (0, 0, 0, 0) too.

    Raises ValueError for an unknown mode.
    """
    if mode == "released":
        return _parse_released(text)
    if mode != "answer":
        raise ValueError(f"parse_box: mode {mode!r} is unknown; use one of {MODES}")
    last_close = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, last_close) if last_close >= 0 else -1
    if start >= 0:
        inside = text[start + len("<answer>") : text.find("</answer>", start)]
        return _last_box(inside) or ParsedBox(None, NO_BOX)
    if "<answer>" in text:
        return ParsedBox(None, NO_ANSWER)
    return _last_box(text) or ParsedBox(None, NO_ANSWER)


def _parse_released(text: str) -> ParsedBox:
    nothing = ParsedBox((0, 0, 0, 0), NO_BOX)
    if not _may_hold_a_box(text):
        return nothing
    text = _without_idle_brackets(text)
    # the first box of the notation that is preferred to all others in the reply
    notation, first, place = "n7", "", 0
    while notation != "n1":
        match = _RELEASED[notation].search(text, place)
        if match is None:
            break
        notation, place = match.lastgroup, match.end()
        first = match[notation]
    if not first or notation in _RELEASED_FLOATS:  # int() fails on floats
        return nothing
    found = [first]
    if _may_hold_a_long_number(text):
        # then a later box may fail as well, save for the last, which is dropped
        every = [m[notation] for m in _RELEASED["n7"].finditer(text) if m[notation]]
        found += [numbers for numbers in every[:-1] if len(numbers) > _MOST_DIGITS]
    try:
        boxes = [tuple(map(int, _NUMBER.findall(numbers))) for numbers in found]
    except ValueError:
        return nothing
    return ParsedBox(boxes[0], box_status(boxes[0]))


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Plain intersection over union in 0..1; 0.0 if a box is inverted or has no area.

    The boxes share one unit. Never divides by zero (PF sec. 9, E4).
    """
    if not (a[0] < a[2] and a[1] < a[3] and b[0] < b[2] and b[1] < b[3]):
        return 0.0
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    # tiny float boxes can underflow to an area of zero
    union = area_a + area_b - inter
    return min(1.0, inter / union) if union > 0 else 0.0


def format_box(box: Sequence[int]) -> str:
    """``(x1,y1),(x2,y2)``, the notation of prompts, replies and files."""
    x1, y1, x2, y2 = box
    return f"({x1},{y1}),({x2},{y2})"


def to_pixels(
    box: Sequence[float], width: int, height: int
) -> tuple[float, float, float, float]:
    """0-1000 box to pixels of an image of this size; floats, not rounded."""
    x1, y1, x2, y2 = box
    sx, sy = width / GRID, height / GRID
    return (x1 * sx, y1 * sy, x2 * sx, y2 * sy)


def from_unit(box: Sequence[float]) -> Box:
    """0-1 floats to the grid: ``round(1000 * v)`` clipped to 0..999.

    Raises ValueError for a coordinate that is not a finite number.
    """
    if not all(math.isfinite(v) for v in box):
        raise ValueError(f"box {list(box)} holds a number that is not finite")
    x1, y1, x2, y2 = (min(GRID - 1, max(0, round(GRID * v))) for v in box)
    return (x1, y1, x2, y2)


def stretched(box: Sequence[float]) -> Box:
    """Migician's box as its published row is scored (PF sec. 9): y1 a twentieth and y2
    a tenth further down, on the grid and neither beyond 999. For no other row."""
    x1, y1, x2, y2 = box

    def down(y: float, factor: float) -> int:
        # in thousandths, rounded, then cut to a whole number: as the row was made
        return int(GRID * round(min(0.999, min(y, GRID) / GRID * factor), 3))

    return (x1, down(y1, 1.05), x2, down(y2, 1.10))

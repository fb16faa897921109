"""Reading a box: both parsers, the released defects E1 to E4, hostile replies."""

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from univg_nb.data.boxes import (
    MAX_REPLY,
    MODES,
    STATUSES,
    find_boxes,
    format_box,
    iou,
    parse_box,
    to_pixels,
)

quick = settings(max_examples=50, deadline=None)
coordinate = st.integers(0, 1000)
boxes = st.tuples(coordinate, coordinate, coordinate, coordinate)


@pytest.mark.parametrize(
    ("reply", "box", "status"),
    [
        (
            "<think>a</think><answer>(1,2),(3,4)</answer>",
            (1, 2, 3, 4),
            "ok",
        ),
        ("(1,2),(3,4)", (1, 2, 3, 4), "ok"),
        ("( 1 , 2 ) ,\n( 3 , 4 )", (1, 2, 3, 4), "ok"),
        ("<|box_start|>(1,2),(3,4)<|box_end|>", (1, 2, 3, 4), "ok"),
        ("see (1,2),(3,4), then (5,6),(7,8)", (5, 6, 7, 8), "ok"),
        ("<answer>(1,2),(3,4) or (5,6),(7,8)</answer>", (5, 6, 7, 8), "ok"),
        (
            "<answer>(1,2),(3,4)</answer><answer>(5,6),(7,8)</answer>",
            (5, 6, 7, 8),
            "ok",
        ),
        ("<answer>(1,2),(3,4)</answer> not (5,6),(7,8)", (1, 2, 3, 4), "ok"),
        ("<answer>(1,2),(3,4)</answer> (5,6),(7,8) </answer>", (1, 2, 3, 4), "ok"),
        ("<answer>[1, 2, 3, 4]</answer>", (1, 2, 3, 4), "ok"),
        ("<box>1 2 3 4</box>", (1, 2, 3, 4), "ok"),
        ("", None, "no_answer"),
        ("I see no cup.", None, "no_answer"),
        ("(1,2)", None, "no_answer"),
        ("<think>(1,2),(3,4)</think><answer>(5,6),(7", None, "no_answer"),
        ("<think>(1,2),(3,4)</think><answer>none</answer>", None, "no_box"),
        ("<answer></answer>", None, "no_box"),
        ("<answer>(5,2),(3,4)</answer>", (5, 2, 3, 4), "inverted"),
        ("<answer>(3,2),(3,4)</answer>", (3, 2, 3, 4), "inverted"),
        ("<answer>(1,2),(3,1001)</answer>", (1, 2, 3, 1001), "out_of_range"),
        ("<answer>(-1,2),(3,4)</answer>", (-1, 2, 3, 4), "out_of_range"),
        ("(1,2),(3,12345678901)", None, "out_of_range"),
        ("(1,2),(3," + "9" * 5000 + ")", None, "out_of_range"),
        ("(12.4,20.6),(300.0,400)", (12, 21, 300, 400), "ok"),
    ],
)
def test_answer_mode(reply, box, status):
    assert parse_box(reply) == (box, status)


def test_E1_released_takes_the_first_of_several_boxes():
    think = "<think>it moved from (451,265),(519,388)</think>"
    reply = think + "<answer>(100,100),(200,200)</answer>"
    assert parse_box(reply, "released").box == (451, 265, 519, 388)
    assert parse_box(reply).box == (100, 100, 200, 200)
    three = "(1,1),(2,2) (3,3),(4,4) (5,5),(6,6)"
    assert parse_box(three, "released").box == (1, 1, 2, 2)


@pytest.mark.parametrize(
    "reply",
    [
        "[0.1, 0.2, 0.3, 0.4]",
        "(0.1,0.2),(0.3,0.4)",
        "(0.1, 0.2, 0.3, 0.4)",
        "<answer>(0.100,0.200),(0.300,0.400)</answer>",
    ],
)
def test_E2_released_loses_floats(reply):
    assert parse_box(reply, "released") == ((0, 0, 0, 0), "no_box")
    assert parse_box(reply) == ((100, 200, 300, 400), "ok")


def test_E2_released_without_a_box_gives_zeros():
    assert parse_box("nothing here", "released").box == (0, 0, 0, 0)
    assert parse_box("(1,2),(3," + "9" * 5000 + ")", "released").box == (0, 0, 0, 0)


def test_E3_the_two_units_never_meet():
    """0-1000 predictions against the original file's floats have no overlap."""
    truth = (0.502, 0.008, 0.839, 0.392)
    predicted = parse_box("<answer>(502,8),(839,392)</answer>", "released").box
    assert iou(predicted, truth) == 0.0
    assert iou(predicted, [1000 * v for v in truth]) == pytest.approx(1.0)


def test_E4_degenerate_boxes_do_not_divide_by_zero():
    point = (5, 5, 5, 5)
    assert iou(point, point) == 0.0
    assert iou((9, 9, 1, 1), (9, 9, 1, 1)) == 0.0
    assert iou((9, 9, 1, 1), (1, 1, 9, 9)) == 0.0
    assert iou((0.0, 0.0, 1e-200, 1e-200), (0.0, 0.0, 1e-200, 1e-200)) == 0.0


@pytest.mark.parametrize(
    ("reply", "box"),
    [
        ("(1,2),(3,4)", (1, 2, 3, 4)),
        ("(1, 2),  (3,\n4)", (1, 2, 3, 4)),
        ("( 1,2),(3,4)", (0, 0, 0, 0)),
        ("(1 ,2),(3,4)", (0, 0, 0, 0)),
        ("[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("[9,9,9,9] (1,2),(3,4)", (1, 2, 3, 4)),
        ("[9,9,9,9] [0.1,0.2,0.3,0.4]", (0, 0, 0, 0)),
        ("(1, 2, 3, 4)", (0, 0, 0, 0)),
        ("<box>1 2\t3 4</box>", (1, 2, 3, 4)),
        ("(1,2),(3,4) and (5,6),(7,8", (1, 2, 3, 4)),
        ("(5,2),(3,4)", (5, 2, 3, 4)),
    ],
)
def test_released_notations(reply, box):
    assert parse_box(reply, "released").box == box


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "piece",
    [
        *("(", "(1,", "(1,1),", "(1,1),(1,1),", "[1", "[0.1, ", "<box>1 ", "<answer>"),
        *("(" + "1" * MAX_REPLY, "(1," + " " * MAX_REPLY, "(0." + "0" * MAX_REPLY),
        *("(,),(,)", "[1,2,3,4]", "<box>1 2 3 4</box>", "1" * 4300 + " "),
        "(1,2),(3," + "1" * 4301 + ")",
    ],
)
def test_hostile_reply_is_linear(piece, mode):
    reply = (piece * (1_000_000 // len(piece) + 1))[:1_000_000]
    started = time.process_time()
    parsed = parse_box(reply, mode)
    # quadratic work on so long a reply takes minutes
    assert time.process_time() - started < 1
    assert parsed.status in STATUSES


def test_only_the_end_of_a_reply_beyond_any_real_length_is_read():
    box, filler = "<answer>(1,2),(3,4)</answer>", "word " * (MAX_REPLY // 5)
    for mode in MODES:
        assert parse_box(filler + box, mode).box == (1, 2, 3, 4)
        longest = box + filler[: MAX_REPLY - len(box)]
        assert parse_box(longest, mode).box == (1, 2, 3, 4)
    assert parse_box(box + filler) == (None, "no_answer")
    assert MAX_REPLY >= 100_000  # 25,000 tokens: no reply that was ever sampled is cut


noise = st.lists(
    st.sampled_from(
        ["(", ")", ",", "[", "]", " ", "\n", "0", "9", "0.5", "-", "1e9", "12"]
        + ["<answer>", "</answer>", "<think>", "<box>", "</box>", "(1,2),(3,4)", "²٣"]
    ),
    max_size=40,
).map("".join)


@quick
@given(st.one_of(noise, st.text()))
def test_parse_never_raises(text):
    for mode in MODES:
        box, status = parse_box(text, mode)
        assert status in STATUSES
        assert box is None or all(type(v) is int for v in box)
    if parse_box(text).status == "ok":
        x1, y1, x2, y2 = parse_box(text).box
        assert 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000


PIECES = (
    [*"()[],. \n-+0123456789", "<answer>", "</answer>", "<think>", "</think>"]
    + ["<box>", "</box>", "(1,2),(3,4)", "[5, 6, 7, 8]", "0.25", "1e9", "9" * 12]
    + ["²", "٣", "\x00", "\ud800", "(10,20),(", "None", "<|box_start|>"]
)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**64))
def test_parse_never_raises_on_100_000_strings(seed):
    """A hundred seeds of a thousand strings: pieces of replies, or any characters."""
    rng = random.Random(seed)
    for _ in range(500):
        pieces = "".join(rng.choices(PIECES, k=rng.randrange(30)))
        anything = "".join(map(chr, rng.choices(range(0x3000), k=rng.randrange(30))))
        for text in (pieces, anything):
            for mode in MODES:
                box, status = parse_box(text, mode)
                assert status in STATUSES, text
                assert (box is None) <= (status != "ok"), text


def test_released_mode_against_a_port_of_the_released_parser():
    """All boxes of the first notation that occurs, without the last of several."""
    i, f, gap = r"\d+", r"\d+\.\d+", r",\s*"
    patterns = [
        rf"\(({i}){gap}({i})\){gap}\(({i}){gap}({i})\)",
        rf"\[({f}){gap}({f}){gap}({f}){gap}({f})\]",
        rf"\(({f}),({f})\),\(({f}),({f})\)",
        rf"\(({f}){gap}({f}){gap}({f}){gap}({f})\)",
        rf"\[({i}){gap}({i}){gap}({i}){gap}({i})\]",
        rf"<box>({i})\s+({i})\s+({i})\s+({i})</box>",
    ]
    rng, seen = random.Random(0), set()
    pieces = [*PIECES, "(0.1,0.2),(0.3,0.4)", "[0.1, 0.2, 0.3, 0.4]"]
    pieces += ["<box>1 2 3 4</box>", "(0.1,0.2,0.3,0.4)", "(9, 8), (7, 6)"]
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        found = next(filter(None, (re.findall(p, text) for p in patterns)), [])
        kept = found[:-1] if len(found) > 1 else found
        try:
            expected = tuple(map(int, kept[0])) if kept else (0, 0, 0, 0)
        except ValueError:
            expected = (0, 0, 0, 0)
        assert parse_box(text, "released").box == expected, text
        seen.add((len(found), expected == (0, 0, 0, 0)))
    assert len(seen) > 5


def test_find_boxes():
    text = "(1,2),(3,4) [0.1, 0.2, .3, 4] (-5, 6, 7.5, 8) <box>1 2 3 4</box> (1,2)"
    assert find_boxes(text) == [(1, 2, 3, 4), (-5, 6, 7.5, 8), (1, 2, 3, 4)]
    # the quick way is only for texts without any other bracket
    two = "(1,2),(3,4)<|box_end|> and (5,6),(7,8)"
    assert find_boxes(two) == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert find_boxes(f"{two} [9, 9, 9, 9]") == [*find_boxes(two), (9, 9, 9, 9)]
    assert find_boxes(f"{two} <box>9 9 9 9</box>")[2:] == [(9, 9, 9, 9)]
    assert find_boxes(f"{two} (9, 9, 9, 9)")[2:] == [(9, 9, 9, 9)]
    assert find_boxes("(1,2),(3,4),(5,6)") == [(1, 2, 3, 4)]
    assert find_boxes("(12345,2),(3,4)") == [(12345, 2, 3, 4)]
    assert find_boxes("(1,2),(3,٤)") == []


@quick
@given(boxes)
def test_format_and_parse(box):
    assert parse_box(f"<answer>{format_box(box)}</answer>").box == box
    assert parse_box(format_box(box), "released").box == box


@quick
@given(boxes, boxes)
def test_iou_properties(a, b):
    value = iou(a, b)
    assert 0.0 <= value <= 1.0
    assert value == iou(b, a)
    if a[0] < a[2] and a[1] < a[3]:
        assert iou(a, a) == 1.0


def test_iou_values():
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0


@quick
@given(st.tuples(*[st.integers(0, 999)] * 4), st.integers(1, 4000))
def test_units(box, size):
    x1, _, _, y2 = to_pixels(box, size, 2 * size)
    assert x1 == pytest.approx(box[0] * size / 1000)
    assert y2 == pytest.approx(box[3] * size / 500)


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"'first' is unknown.*answer"):
        parse_box("", "first")

"""Readers, writers, detection, broken input, the audit, the real annotation."""

import dataclasses
import json
import math
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from univg_nb.data import files
from univg_nb.data.audit import audit, main, render_table
from univg_nb.data.boxes import box_status, format_box, parse_box
from univg_nb.data.files import detect_format, iter_rows, iter_samples, read, write
from univg_nb.data.formats import RowContext, RowError, clip_to_grid
from univg_nb.data.prompts import COT_SUFFIX, SINGLE_IMAGE_PREFIX, reply_text, user_text
from univg_nb.data.sample import GroundingSample
from univg_nb.data.zero_shot_formats import (
    ALL_FORMATS,
    INSTRUCTION,
    VIDEO_INSTRUCTION,
    _to_whole_pixels,
)

REAL = os.environ.get("UNIVG_MIG_BENCH")
real = pytest.mark.skipif(not REAL, reason="UNIVG_MIG_BENCH is not set")
TEXT_FORMATS = [
    "stage1_cotsft",
    "stage2_rl",
    "mgrounding",
    "mig_bench",
]


def dump(path, rows):
    path.write_text(json.dumps(rows))
    return path


def sample(**changes):
    values = {
        "id": "a",
        "task": "diff",
        "images": ("x/1.png", "x/2.png"),
        "question": "What differs?",
        "answer": (1, 2, 300, 400),
    }
    return GroundingSample(**values | changes)


STAGE1 = {
    "conversations": [
        {"from": "human", "value": "<image>\n<image>\nWhat differs?" + COT_SUFFIX},
        {
            "from": "gpt",
            "value": "<think>Was (9,9),(10,10).</think><answer>(1,2),(3,4)</answer>",
        },
    ],
    "images": ["./a.png", "b.png"],
}
STAGE2 = {"images": ["./a.png"], "question": "<image>Q", "answer": [1, 2, 3, 4]}
MGROUNDING = {
    "id": "m",
    "type": "Group",
    "images": ["a.png", "b.png"],
    "conversations": [
        {"from": "human", "value": "<image><image>Where is the cup?"},
        {"from": "gpt", "value": "<|box_start|>(1,2),(3,4)<|box_end|>"},
        {"from": "human", "value": "Describe it."},
        {"from": "gpt", "value": "It is red."},
        {"from": "human", "value": "And both lids?"},
        {"from": "gpt", "value": "(5,6),(7,8) and (1,1),(2,2)"},
    ],
}
MIG = {
    "task": "diff",
    "images": ["./a.png"],
    "question": "Q",
    "answer": [0.1, 0.2, 0.3, 0.4],
    "additional_info": "",
    "need_format": True,
}


def test_stage1(tmp_path):
    (got,) = read(dump(tmp_path / "f.json", [STAGE1]), image_root="root")
    assert got == GroundingSample(
        "f#0",
        "",
        ("root/a.png", "root/b.png"),
        "What differs?",
        (1, 2, 3, 4),
        chain="Was (9,9),(10,10).",
    )
    assert got.source.endswith("f.json#0")


def test_stage1_messages_and_system_turn(tmp_path):
    roles = {"human": "user", "gpt": "assistant"}
    turns = [
        {"role": roles[t["from"]], "content": t["value"]}
        for t in STAGE1["conversations"]
    ]
    row = {
        "messages": [{"role": "system", "content": "Help."}, *turns],
        "images": STAGE1["images"],
    }
    there = read(dump(tmp_path / "f.json", [row]))
    assert there == read(dump(tmp_path / "f.json", [STAGE1]))


def test_single_image_mode(tmp_path):
    coco = "dataset/coco/train2014/COCO_1.jpg"
    rows = [
        STAGE2 | {"images": [coco]},
        STAGE2 | {"cot": False},
        STAGE2,
        STAGE2 | {"images": [coco], "cot": True},
    ]
    assert [s.cot for s in read(dump(tmp_path / "f.json", rows))] == [
        *(False, False, True, True)
    ]
    turns = [
        {"from": "human", "value": "<image>" + SINGLE_IMAGE_PREFIX + "the cup"},
        {"from": "gpt", "value": "(1,2),(3,4)"},
    ]
    rows = [{"conversations": turns, "images": ["a.png"]}]
    (got,) = read(dump(tmp_path / "f.json", rows), "stage1_cotsft")
    assert (got.question, got.cot, got.chain) == ("the cup", False, None)


def test_T7_image_root_is_used(tmp_path):
    rows = [STAGE2, STAGE2 | {"images": ["/abs/a.png"]}]
    path = dump(tmp_path / "f.json", rows)
    found = [s.images[0] for s in read(path, image_root=tmp_path / "pictures")]
    assert found == [str(tmp_path / "pictures/a.png"), "/abs/a.png"]
    assert read(path)[0].images == ("a.png",)


def test_mgrounding_turns(tmp_path):
    one, two = read(dump(tmp_path / "f.json", [MGROUNDING]))
    assert (one.id, one.question, one.answer) == (
        "m/0",
        "Where is the cup?",
        (1, 2, 3, 4),
    )
    assert (two.id, two.question, two.task) == ("m/2", "And both lids?", "Group")
    assert two.boxes == ((5, 6, 7, 8), (1, 1, 2, 2)) and two.answer == two.boxes[0]


def test_E3_mig_bench_in_either_unit(tmp_path):
    path = dump(tmp_path / "f.json", [MIG])
    assert read(path)[0].answer == (100, 200, 300, 400)
    path = dump(tmp_path / "f.json", [MIG | {"answer": [100, 200, 300, 1000]}])
    assert read(path)[0].answer == (100, 200, 300, 1000)


def test_mig_bench_clips(tmp_path):
    path = dump(tmp_path / "f.json", [MIG | {"answer": [-0.01, 0.2, 1.048, 1.0]}])
    assert read(path)[0].answer == (0, 200, 999, 999)


def picture(path, size=(200, 100)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def test_E8_lisa_and_llmseg_keep_all_boxes(tmp_path):
    picture(tmp_path / "a.png")
    boxes = [[20, 10, 100, 50], [0, 0, 200, 100]]
    lisa = {"image_path": "a.png", "instruction": "the cup", "boxes": boxes}
    (got,) = read(dump(tmp_path / "f.json", [lisa]), image_root=tmp_path)
    assert got.boxes == ((100, 100, 500, 500), (0, 0, 1000, 1000))
    assert got.answer == got.boxes[0]
    assert got.question == "".join((INSTRUCTION[0], "the cup", INSTRUCTION[1]))
    llmseg = {"image_path": "a.png", "question": "the cup", "bbox": boxes}
    (other,) = read(dump(tmp_path / "f.json", [llmseg]), image_root=tmp_path)
    assert other == got
    llmseg["bbox"] = [[20, 10], [100, 50]]
    (other,) = read(dump(tmp_path / "f.json", [llmseg]), image_root=tmp_path)
    assert other.answer == got.answer and other.boxes == ()


def test_E8_reasonvos_boxes_with_decimals(tmp_path):
    row = {
        "image_list": ["1.png", "2.png", "3.png"],
        "question": "who runs",
        "bbox_list": ["[]", "[]", "[20.5, 10, 100.0, 5e1]"],
        "width": 200,
        "height": 100,
    }
    (got,) = read(dump(tmp_path / "f.json", [row]))
    assert got.answer == (102, 100, 500, 500)
    assert got.question.startswith(VIDEO_INSTRUCTION[0] + "who runs")


def test_revos_frames_in_number_order(tmp_path):
    for n in (2, 10, 1, 20):
        picture(tmp_path / f"videos/v/{n}.png")
    path = dump(tmp_path / "f.json", [REVOS | {"frames": [0, 1, 3]}])
    (got,) = read(path, image_root=tmp_path / "videos")
    assert [Path(p).name for p in got.images] == ["1.png", "2.png", "20.png"]


REVOS = {
    "video_id": "v",
    "frames": [0, 1, 2],
    "question": "who runs",
    "bbox_list": [[], [], [20, 10, 100, 50]],
}


@pytest.mark.parametrize(
    "frames",
    [
        ["frame-1.png", "frame-2.png", "frame-10.png"],  # no negative numbers
        ["v2_f1.png", "v2_f9.png", "v2_f10.png"],  # the first number is the video's
        ["00001.JPG", "00002.jpeg", "00003.png"],
        ["1.webp", "2.tif", "3.BMP"],
        ["2020-12-31 9.png", "2021-01-01 8.png", "2021-01-01 10.png"],
    ],
)
def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path, frames):
    for name in reversed(frames):
        picture(tmp_path / "v" / name)
    (tmp_path / "v" / "._00001.jpg").write_bytes(b"left by macOS")
    (tmp_path / "v" / "readme.txt").write_text("no picture")
    (got,) = read(dump(tmp_path / "f.json", [REVOS]), image_root=tmp_path)
    assert [Path(path).name for path in got.images] == frames
    picture(tmp_path / "v" / frames[2]).unlink()  # a folder that changes is read anew
    with pytest.raises(ValueError, match="row 0: frame 2 of 2 in v; fetch it again"):
        read(tmp_path / "f.json", image_root=tmp_path)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["1.png", "01.jpg", "2.png"], "01.jpg and 1.png in .* have no order"),
        (["1.png", "2.png", "mask_2.png"], "2.png and mask_2.png in .* no order"),
        (["a.png", "b.png", "c.png"], "a.png and b.png in .* no order"),
        (["._1.png", "1.mp4"], r"no picture \(.jpg, .*\) in folder .*; fetch it"),
    ],
)
def test_frames_without_an_order_are_refused(tmp_path, names, problem):
    (tmp_path / "v").mkdir()
    for name in names:
        (tmp_path / "v" / name).touch()
    with pytest.raises(ValueError, match=rf"f\.json, row 0: {problem}"):
        read(dump(tmp_path / "f.json", [REVOS]), image_root=tmp_path)


# ---------------------------------------------------------------- round trips

names = st.text(st.characters(categories=("L", "N"), include_characters=" ._-"))
letters = st.characters(exclude_categories=["Cs"], exclude_characters="\uffff")
words = st.text(letters, min_size=1, max_size=40).filter(
    lambda t: "<image>" not in t and t[0] != "\n"
)


@st.composite
def ordered_boxes(draw):
    x = sorted(draw(st.sets(st.integers(0, 999), min_size=2, max_size=2)))
    y = sorted(draw(st.sets(st.integers(0, 999), min_size=2, max_size=2)))
    return (x[0], y[0], x[1], y[1])


@st.composite
def any_sample(draw):
    paths = st.sampled_from(
        ["a.png", "b/c d.jpg", "/é.png", "dataset/coco/train2014/COCO_7.jpg"]
    )
    answer = draw(ordered_boxes())
    more = draw(st.lists(ordered_boxes(), max_size=2))
    chain = st.none() | st.text(letters, max_size=30).filter(lambda t: "<" not in t)
    suffix = st.sampled_from(["", COT_SUFFIX])
    images = tuple(draw(st.lists(paths, min_size=1, max_size=4)))
    return GroundingSample(
        id=draw(names),
        task=draw(names),
        images=images,
        question=draw(st.sampled_from(["", SINGLE_IMAGE_PREFIX]))
        + draw(words)
        + draw(suffix),
        answer=answer,
        cot=draw(st.booleans()),
        chain=draw(chain),
        boxes=(answer, *more) if more else (),
        target_image=draw(st.none() | st.integers(1, len(images))),
    )


@pytest.mark.parametrize("name", TEXT_FORMATS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_round_trip(tmp_path, name, suffix):
    path = tmp_path / f"f.{suffix}"

    @settings(max_examples=25, deadline=None)
    @given(st.lists(any_sample(), max_size=3))
    def check(samples):
        assert write(samples, path, name) == len(samples)
        if samples or suffix == "json":
            assert read(path, name) == samples

    check()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["lisa", "llmseg", "reasonvos", "revos"])
def test_round_trip_of_pixel_formats(tmp_path, name):
    video = name in ("reasonvos", "revos")
    count = 5 if video else 1
    paths = [picture(tmp_path / f"v/{n}.png", (256, 187)) for n in range(count)]
    before, after = VIDEO_INSTRUCTION if video else INSTRUCTION
    answers = [(0, 0, 1000, 1000), (1, 2, 3, 4), (250, 500, 750, 999)]
    samples = [
        GroundingSample(
            f"s{i}",
            "zero",
            tuple(map(str, paths)),
            f"{before}the {i}. cup.{after}",
            answer,
            cot=i != 1,
            chain="Because." if i == 2 else None,
            boxes=(answer, (5, 5, 9, 9)) if i == 2 and not video else (),
            target_image=count if i == 2 else None,
        )
        for i, answer in enumerate(answers)
    ]
    path = tmp_path / "f.json"
    write(samples, path, name, tmp_path)
    assert str(tmp_path) not in path.read_text()
    assert read(path, None, tmp_path) == samples
    assert read(path, name, tmp_path) == samples


def test_round_trip_of_refcoco(tmp_path):
    path = picture(tmp_path / "coco/1.png", (333, 97))
    answers = [(0, 0, 1000, 1000), (1, 2, 3, 4), (250, 500, 750, 999)]
    items = [
        GroundingSample(f"r{i}", "refcoco_val", (str(path),), "cup", answer, cot=False)
        for i, answer in enumerate(answers)
    ]
    write(items, tmp_path / "refcoco_val.json", "refcoco", tmp_path)
    assert read(tmp_path / "refcoco_val.json", None, tmp_path) == items


@settings(max_examples=300, deadline=None)
@given(ordered_boxes(), st.integers(1, 9000), st.integers(1, 9000))
def test_pixels_lead_back_to_the_same_box(box, width, height):
    context, size = RowContext("f"), (width, height)
    assert clip_to_grid(_to_whole_pixels(box, size), size, context) == box
    assert not context.doubts


coordinates = st.integers(-50, 1100) | st.floats(-50, 1100) | st.floats()


@settings(max_examples=200, deadline=None)
@given(st.lists(coordinates, min_size=4, max_size=4))
def test_four_numbers_are_a_box_or_an_error(numbers):
    """Whatever the numbers: a box with an area on the grid, near them, or RowError."""
    row = STAGE2 | {"answer": numbers}
    try:
        (got,) = ALL_FORMATS["stage2_rl"].read(row, RowContext("f"))
    except RowError as error:
        assert error.kind.startswith("box_") or error.kind == "bad_box"
        finite = all(math.isfinite(v) for v in numbers)
        assert not (finite and min(numbers) >= 0 and max(numbers) <= 1000) or (
            error.kind in ("box_inverted", "box_degenerate", "box_unit")
        )
    else:
        x1, y1, x2, y2 = got.answer
        assert 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000
        assert all(abs(a - v) <= 0.5 for a, v in zip(got.answer, numbers, strict=True))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(words, st.none() | st.lists(ordered_boxes(), min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_every_boxed_turn_is_a_sample(turns):
    talk = []
    for question, boxes in turns:
        reply = "nothing" if boxes is None else " and ".join(map(format_box, boxes))
        talk += [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    talk[0] = talk[0] | {"value": "<image>\n<image>" + talk[0]["value"]}
    row = MGROUNDING | {"conversations": talk}
    got = list(ALL_FORMATS["mgrounding"].read(row, RowContext("f")))
    assert [(s.question, s.answer) for s in got] == [
        (question, boxes[0]) for question, boxes in turns if boxes
    ]
    assert len({s.id for s in got}) == len(got)


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_system_turns_are_passed_over_wherever_they_stand(key):
    who, what, *names = ("from", "value", "human", "gpt")
    if key == "messages":
        who, what, *names = ("role", "content", "user", "assistant")
    talk = [
        {who: names[i % 2], what: turn["value"]}
        for i, turn in enumerate(MGROUNDING["conversations"])
    ]
    system = {who: "system", what: "Help."}
    row = {k: v for k, v in MGROUNDING.items() if k != "conversations"}
    expected = list(ALL_FORMATS["mgrounding"].read(MGROUNDING, RowContext("f")))
    for at in range(len(talk) + 1):
        turns = [*talk[:at], system, *talk[at:]]
        read_row = ALL_FORMATS["mgrounding"].read
        assert list(read_row(row | {key: turns}, RowContext("f"))) == expected


@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_written_file_is_detected_and_reads_as_written(tmp_path, name):
    path = tmp_path / "f.json"
    samples = [sample(chain="Look."), sample(id="b", task="", cot=False)]
    write(samples, path, name)
    assert read(path) == samples
    assert [s.id for s in iter_samples(path)] == ["a", "b"]


def test_stage1_file_holds_the_very_prompt_and_reply(tmp_path):
    path = tmp_path / "f.json"
    one = sample(chain="Look.")
    write([one], path, "stage1_cotsft")
    human, gpt = (turn["value"] for turn in next(iter_rows(path))["conversations"])
    assert human == "<image><image>" + user_text(one)
    assert gpt == reply_text(one)
    assert parse_box(gpt).box == one.answer


def test_streaming_does_not_read_ahead(tmp_path):
    """The broken end of a long file is met only when it is reached."""
    path = tmp_path / "f.json"
    rows = ",".join([json.dumps(STAGE2 | {"question": "é" * 200})] * 9000)
    path.write_text(f" [ {rows} , broken", encoding="utf-8-sig")
    stream = iter_samples(path)
    for _ in range(9000):
        next(stream)
    with pytest.raises(ValueError, match=r"f\.json, row 9000: "):
        next(stream)


def test_rows_longer_than_a_chunk(tmp_path):
    rows = [STAGE2 | {"question": "q" * n} for n in (1, 3_000_000, 2)]
    path = dump(tmp_path / "f.json", rows)
    assert [len(s.question) for s in iter_samples(path)] == [1, 3_000_000, 2]
    path = tmp_path / "f.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert list(iter_rows(path)) == rows


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 64])
def test_wherever_the_chunks_end(tmp_path, monkeypatch, chunk):
    """Blanks, commas, characters of several bytes and rows cut at every place."""
    monkeypatch.setattr(files, "_CHUNK", chunk)
    rows = [{"a": "é€😀"}, {}, {"b": [1, {"c": ", ]"}]}]
    path = tmp_path / "f.json"
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    for gap in ("", " ", "\n", " \r\n\t "):
        for marks in ("[,]", "   "):
            before, comma, after = (gap + mark.strip() + gap for mark in marks)
            whole = before + (comma or " ").join(texts) + after
            for bom in (b"", b"\xef\xbb\xbf"):
                path.write_bytes(bom + whole.encode())
                assert list(iter_rows(path)) == rows
    for text, message in (
        ('[{"a": 1}  ,  ]', "row 1: parse error: unallowed token"),
        ('[{"a": 1}  ,  {"b" 1}]', "row 1: parse error: object key and value"),
        ('[{"a": 1}    {', "row 1: parse error: after array element"),
        ('[{"a": 1}  ,  ', "row 1: parse error: premature EOF"),
        ('[{"a": 1}]  x', "row 1: parse error: trailing garbage"),
        ('{"a": 1}\n{"b": 2}\n{"c"', "row 2: parse error: premature EOF"),
    ):
        path.write_text(text)
        with pytest.raises(RowError, match=re.escape(message)):
            list(iter_rows(path))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 64])
def test_half_of_a_surrogate_pair_is_found_wherever_the_chunks_end(
    tmp_path, monkeypatch, chunk
):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    texts = [
        r"a\ud83d\ude00b",
        r"\\ud83d",
        r"\uD83D",
        r"\\\udc00\"",
        r"\ud83d\ud83d\ude00",
    ]
    path = tmp_path / "f.json"
    path.write_text("".join(f'{{"a": "{text}"}}\n' for text in texts))
    got = [row["a"] for row in iter_rows(path)]
    assert got == ["a😀b", "\\ud83d", "\uffff", '\\\uffff"', "\uffff😀"]


@pytest.mark.parametrize("layout", ["array", "one line", "indented", "lines"])
def test_memory_does_not_grow_with_the_file(tmp_path, layout):
    rows = [MGROUNDING | {"id": str(n), "note": "n" * 600} for n in range(9000)]
    path = tmp_path / "f.json"
    if layout == "lines":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif layout == "array":
        path.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
    else:
        path.write_text(json.dumps(rows, indent=2 if layout == "indented" else None))
    del rows
    size = path.stat().st_size
    next(iter_samples(path))  # what is made once
    tracemalloc.start()
    try:
        assert sum(1 for _ in iter_samples(path)) == 18_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000 < size / 4


# ---------------------------------------------------------------- broken input


def turns(human="<image><image>Q", gpt="<answer>(1,2),(3,4)</answer>", **more):
    pair = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"conversations": pair, "images": ["a.png", "b.png"]} | more


BROKEN = {
    "empty file": ("", None, "empty file"),
    "not JSON": ("hello", None, "'h' begins the file"),
    "cut in a row": ('[{"images": ["a.p', None, "row 0: .*whole"),
    "cut between rows": (json.dumps([STAGE2])[:-1], None, "row 1: .*premature EOF"),
    "no comma": (
        "[" + 2 * json.dumps(STAGE2) + "]",
        None,
        "row 1: .*after array element",
    ),
    "trailing comma": (
        json.dumps([STAGE2])[:-1] + ",]",
        None,
        "row 1: .*unallowed token",
    ),
    "text after the end": (
        json.dumps([STAGE2]) + "x",
        None,
        "row 1: .*trailing garb",
    ),
    "row is a list": ([[1]], None, "row 0: an array is not an obj"),
    "number without end": (
        '[{"a": 1' + "0" * 6000 + "}]",
        None,
        "row 0: .*overflow",
    ),
    "deep nesting": (
        '[{"a": ' + "[" * 200_000,
        None,
        "row 0: nested more than 100 levels",
    ),
    "not UTF-8": (b'[{"a": "\xff"}]', None, "row 0: .*invalid bytes in UTF8"),
    "unknown keys": ([{"a": 1}], None, r"\['a'\] fit no format.*\n  stage1_cotsft"),
    "fits two": ([turns(type="x", task="y")], None, "fit .*mgrounding.*stage1"),
    "plain sharegpt": ([turns(gpt="(1,2),(3,4)")], None, "fit no format"),
    "0-1 floats, no bench": (
        [{k: MIG[k] for k in ("task", "images", "question", "answer")}],
        None,
        "fit no format",
    ),
    "missing key": ([{"images": ["a"], "answer": [1, 2, 3, 4]}], "stage2_rl", "quest"),
    "question is a number": ([STAGE2 | {"question": 3}], None, "expected str"),
    "empty question": ([STAGE2 | {"question": "<image>"}], None, "question '' must"),
    "no images": ([STAGE2 | {"images": []}], None, "give a list of image paths"),
    "image is null": ([STAGE2 | {"images": [None]}], None, "give a list of image"),
    "images is a string": ([STAGE2 | {"images": "a.png"}], None, "expected list"),
    "three numbers": ([STAGE2 | {"answer": [1, 2, 3]}], None, "give 4 finite numbers"),
    "NaN": ('[{"images":["a"],"question":"q","answer":[1,2,3,NaN]}]', None, "lexical"),
    "same key twice": ('[{"b": 1, "b": 1}]', None, "row 0: key 'b' appears twice"),
    "same key twice inside": (
        json.dumps(STAGE2) + '\n{"a": [{"b": {"c": 1, "d": 2, "c": 3}}]}',
        "stage2_rl",
        "row 1: key 'c' appears twice in one object",
    ),
    "a line is a number": (json.dumps(STAGE2) + "\n3", None, "row 1: 3 is not an obj"),
    "row is a text": ('["a"]', None, "row 0: 'a' is not an object"),
    "deep, but whole": (
        json.dumps(STAGE2)[:-1] + ', "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        None,
        "row 0: nested more than 100 levels",
    ),
    "infinite": (
        '[{"images":["a"],"question":"q","answer":[1,2,3,1e999]}]',
        None,
        "overflow",
    ),
    "boolean": ([STAGE2 | {"answer": [0, 0, 9, True]}], None, "finite numbers"),
    "text as numbers": ([STAGE2 | {"answer": ["1", 2, 3, 4]}], "stage2_rl", "finite"),
    "over 1000": ([STAGE2 | {"answer": [1, 2, 3, 1001]}], None, "leaves 0-1000"),
    "negative": ([STAGE2 | {"answer": [-1, 2, 3, 4]}], None, "leaves 0-1000"),
    "inverted": ([STAGE2 | {"answer": [5, 2, 3, 4]}], None, "inverted; order it"),
    "degenerate": ([STAGE2 | {"answer": [3, 2, 3, 4]}], None, "without area"),
    "0-1 in training": ([STAGE2 | {"answer": MIG["answer"]}], "stage2_rl", "by 1000"),
    "cot is text": ([STAGE2 | {"cot": "no"}], None, "'cot' is 'no'"),
    "chain with tags": ([STAGE2 | {"chain": "<think>a"}], None, "without tags"),
    "bad extra box": ([STAGE2 | {"boxes": [[1, 2, 3, 2000]]}], None, "integers 0-1000"),
    "target image is not there": (
        [STAGE2 | {"target_image": 2}],
        None,
        "target_image 2 must be None or 1 to 1",
    ),
    "target image is a text": ([STAGE2 | {"target_image": "1"}], None, "expected int"),
    "units mixed": ([MIG, MIG | {"answer": [1, 2, 300, 400]}], None, "row 1: .*unit"),
    "floats in revised": (
        [MIG | {"answer": [1, 2, 300, 400]}, MIG],
        None,
        "row 1: .*not in the file's unit",
    ),
    "one marker of two": ([turns("<image>Q")], None, "1 <image> markers for 2 images"),
    "two pairs": (
        [turns() | {"conversations": turns()["conversations"] * 2}],
        "stage1_cotsft",
        "turn|marker",
    ),
    "reply without box": ([turns(gpt="<answer>?</answer>")], None, "with 0 boxes"),
    "two boxes": ([turns(gpt="<answer>(1,2),(3,4)(1,2),(3,4)")], None, "with 2 boxes"),
    "bad box in a reply": (
        [turns(gpt="<answer>(9,2),(3,4)</answer>")],
        None,
        "inverted",
    ),
    "two gpt turns": (
        [turns() | {"conversations": turns()["conversations"][1:]}],
        "stage1_cotsft",
        "turn 0 is from 'gpt'",
    ),
    "no reply": (
        [turns() | {"conversations": turns()["conversations"][:1]}],
        "mgrounding",
        "in pairs",
    ),
    "turn is text": ([turns() | {"conversations": ["hi"]}], "mgrounding", "turn 'hi'"),
    "lisa, no box": (
        [{"image_path": "a.png", "instruction": "x", "boxes": []}],
        None,
        "give at least one",
    ),
    "lisa, no image": (
        [{"image_path": "no.png", "instruction": "x", "boxes": [[1, 2, 3, 4]]}],
        None,
        "size is needed: pass image_root",
    ),
    "two frames": (
        [{"image_list": ["a", "b"], "question": "q", "bbox_list": ["", ""]}],
        None,
        "2 frames, 2 boxes",
    ),
    "image path is empty": ([STAGE2 | {"images": [""]}], None, "list of image paths"),
    "answer is text": (
        [STAGE2 | {"answer": "(1,2),(3,4)"}],
        "stage2_rl",
        "expected li",
    ),
    "task is a number": ([MIG | {"task": 3}], None, "'task' is 3, expected str"),
    "llmseg, odd corners": (
        [{"image_path": "a", "question": "x", "bbox": [[1, 2], [3, 4], [5, 6]]}],
        None,
        "3 corner points; give pairs",
    ),
    "size without area": (
        [
            {"image_path": "a", "instruction": "x", "boxes": [[1, 2, 3, 4]]}
            | {"width": 0, "height": 9}
        ],
        None,
        "size 0 x 9",
    ),
    "marker in a sentence": (
        [turns("Look at <image>. Find the same in <image>, not in the first.")],
        None,
        'in .Look at <image>.*; put every <image> first and name a picture as "image',
    ),
    "marker in a question": (
        [STAGE2 | {"question": "Find the cup of <image>"}],
        None,
        "<image> within the text",
    ),
    "marker in a later turn": (
        [
            MGROUNDING
            | turns("<image>Q", "(1,2),(3,4)")
            | {
                "conversations": [
                    *turns("<image>Q", "(1,2),(3,4)")["conversations"],
                    *turns("<image>R", "(1,2),(3,4)")["conversations"],
                ]
            }
        ],
        None,
        "<image> within the text, in '<image>R'",
    ),
    "two chains": (
        [turns(gpt="<think>a</think><think>b</think><answer>(1,2),(3,4)</answer>")],
        None,
        "has several <think>; give one chain",
    ),
    "image token": (
        [STAGE2 | {"question": "Find <|image_pad|> there"}],
        None,
        r"row 0: .*remove <\|image_pad\|>, which is a token of the model's own",
    ),
    "end of a turn in a chain": (
        [turns(gpt="<think>a<|im_end|></think><answer>(1,2),(3,4)</answer>")],
        None,
        r"remove <\|im_end\|>, which",
    ),
    "lone surrogate": (
        r'[{"images": ["a"], "question": "bad \ud83d where", "answer": [1, 2, 3, 4]}]',
        None,
        "remove the half of a surrogate pair from question",
    ),
    "surrogates in the wrong order": (
        json.dumps([STAGE2])[:-2] + r', "id": "\ude00\ud83d"}]',
        None,
        "remove the half of a surrogate pair",
    ),
    "surrogate as bytes": (
        b'[{"a": "\xed\xa0\xbd"}]',
        None,
        "row 0: .*codec can't dec",
    ),
    "width is true": (
        [
            {"image_path": "a", "instruction": "x", "boxes": [[1, 2, 3, 4]]}
            | {"width": True, "height": 9}
        ],
        None,
        "'width' is True, expected int",
    ),
    "same key, once escaped": (
        r'[{"question": "q", "\u0071uestion": "r"}]',
        None,
        "key 'question' appears twice",
    ),
    "no video": (
        [{"video_id": "v", "frames": [0], "question": "q", "bbox_list": []}],
        None,
        "no video folder v; pass",
    ),
}


def test_there_are_sixty_kinds():
    assert len(BROKEN) >= 60
    inputs = [repr((content, format)) for content, format, _ in BROKEN.values()]
    assert len(set(inputs)) == len(inputs)


def said(caught, folder):
    return str(caught.value).replace(f"{folder}{os.sep}", "")


@pytest.mark.parametrize("name", list(BROKEN))
def test_broken_input(tmp_path, name):
    content, format, message = BROKEN[name]
    path = tmp_path / "data.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match="(?s)" + message) as caught:
        read(path, format)
    # which file, which row, what is there, and the way out
    assert re.match(r"data\.json, row \d: .+; \w+", said(caught, tmp_path), re.DOTALL)


def test_wrong_calls(tmp_path):
    with pytest.raises(ValueError, match=r"no\.json: no such file"):
        read(tmp_path / "no.json")
    for call in (lambda: read("x", "stage3"), lambda: write([], "x", "stage3")):
        with pytest.raises(ValueError, match=r"'stage3' is unknown.*stage2_rl"):
            call()


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("mig_bench", {"answer": (0, 0, 9, 1000)}, "give at most 999"),
        ("stage2_rl", {"answer": (9, 0, 1, 10)}, "inverted"),
        ("lisa", {}, "has 2 images"),
        ("reasonvos", {}, "2 frames"),
    ],
)
def test_a_sample_the_format_cannot_hold(tmp_path, format, changes, message):
    with pytest.raises(ValueError, match=message):
        write([sample(**changes)], tmp_path / "f.json", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"images": ()},
        {"images": ["a.png"]},
        {"question": "<image>Q"},
        {"question": "\nQ"},
        {"question": ""},
        {"answer": (0, 0, 10, 1001)},
        {"answer": (0.0, 0.0, 1.0, 1.0)},
        {"answer": (0, 0, 10)},
        {"chain": "a</think>"},
        {"chain": "a<|im_end|>"},
        {"question": "<|vision_start|>Q"},
        {"question": "\ud83d"},
        {"id": "a\ud83d"},
        {"images": ("\udce9.png",)},
        {"boxes": ((1, 2, 300, 400),)},
        {"boxes": ((1, 1, 2, 2), (1, 2, 300, 400))},
        {"target_image": 0},
        {"target_image": 3},
        {"target_image": True},
    ],
)
def test_sample_checks_itself(changes):
    with pytest.raises(ValueError, match="sample a"):
        sample(**changes)


def test_sample_is_frozen_copied_and_compared():
    one = sample(source="f#1", boxes=((1, 2, 300, 400), (1, 1, 2, 2)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.answer = (0, 0, 1, 1)
    assert pickle.loads(pickle.dumps(one)) == one == dataclasses.replace(one)
    assert dataclasses.replace(one, source="g#2") == one
    assert dataclasses.replace(one, cot=False) != one
    assert dataclasses.replace(one, target_image=2) != one
    assert len({one, dataclasses.replace(one, id="b")}) == 2
    with pytest.raises(ValueError, match="integers 0-1000"):
        dataclasses.replace(one, answer=(0, 0, 1, 1001))


def test_detection_names_the_released_files():
    assert detect_format(STAGE1) == "stage1_cotsft"
    assert detect_format(STAGE2) == "stage2_rl"
    assert detect_format(STAGE2 | {"task": "diff", "id": "1"}) == "stage2_rl"
    assert detect_format(MGROUNDING) == "mgrounding"
    assert detect_format(MIG) == "mig_bench"
    assert set(ALL_FORMATS) >= {*TEXT_FORMATS, "lisa", "llmseg", "reasonvos", "revos"}


# ---------------------------------------------------------------- audit


def test_audit_finds_planted_faults(tmp_path):
    for n in range(3):
        Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / f"{n}.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "0.png").read_bytes()[:900])
    Image.open(tmp_path / "0.png").resize((96, 96)).save(tmp_path / "copy.png")

    def row(image, answer=(1, 2, 3, 4), question="<image>Q"):
        return {"images": [image], "question": question, "answer": list(answer)}

    rows = [
        *(row("0.png"), row("0.png"), row("1.png", (5, 2, 3, 4))),
        *(row("1.png", (3, 2, 3, 4)), row("1.png", (1, 2, 3, 4000)), row("bad.png")),
        *(row("gone.png"), row("2.png", question="<image><image>R")),
        row("2.png", question="word " * 5000),
    ]
    path = dump(tmp_path / "train.json", rows)
    other = dump(tmp_path / "test.json", [row("copy.png"), row("1.png")])
    report = audit(path, image_root=tmp_path, against=[other])
    assert report["counts"] == {
        "duplicate": 1,
        "box_inverted": 1,
        "box_degenerate": 1,
        "box_out_of_range": 1,
        "image_corrupt": 1,
        "image_missing": 1,
        "marker_mismatch": 1,
        "over_token_budget": 1,
        "leak_by_picture": 1,
    }
    assert (report["rows"], report["samples"]) == (9, 6)
    assert report["breaks_training"]
    kinds = {p["kind"]: p for p in report["problems"]}
    assert (kinds["box_inverted"]["row"], kinds["image_missing"]["row"]) == (2, 6)
    assert "0.png looks like" in kinds["leak_by_picture"]["detail"]
    assert "would break training" in render_table(report)


def test_audit_of_a_benchmark_goes_on_after_rows_with_several_faults(tmp_path):
    rows = [
        MIG,
        MIG | {"answer": [0.1, 0.2, 0.3, 1.2], "question": ""},
        MIG | {"answer": [0.3, 0.2, 0.1, 0.4], "question": "R"},
        MIG | {"answer": [0.3, 0.2, 0.3, 0.4], "question": "S"},
        MIG | {"answer": [0.1, 0.2, 0.3, 1.2], "question": "T"},
        MIG | {"question": "U"},
    ]
    report = audit(dump(tmp_path / "f.json", rows))
    found = [(p["row"], p["kind"], p["severity"]) for p in report["problems"]]
    assert found == [
        (1, "box_out_of_range", "warning"),
        (1, "bad_sample", "error"),
        (2, "box_inverted", "error"),
        (3, "box_degenerate", "error"),
        (4, "box_out_of_range", "warning"),
    ]
    assert (report["rows"], report["samples"]) == (6, 5)


def test_audit_reports_what_is_read_and_yet_goes_wrong(tmp_path):
    pair = {"images": ["a.png", "a.png"], "answer": [1, 2, 3, 4]}
    rows = [
        pair | {"id": "7", "question": "Where is the cup in image 2?"},
        pair | {"id": "7", "question": "Where is the dog in image 2?"},
        pair | {"id": "7", "question": "Where is the cup in image 2?"},
        pair | {"id": None, "question": "no id"},
        pair | {"id": None, "question": "no id either" + COT_SUFFIX},
        pair | {"id": 8, "question": SINGLE_IMAGE_PREFIX + "the cat"},
    ]
    report = audit(dump(tmp_path / "f.json", rows))
    found = [(p["row"], p["kind"], p["id"]) for p in report["problems"]]
    assert found == [
        (1, "duplicate_id", "7"),
        (2, "duplicate", "7"),  # the same question once more
        (4, "request_twice", "f#4"),
        (5, "request_twice", "8"),
    ]
    assert "same id as row 0; chains are kept by id" in report["problems"][0]["detail"]
    assert not report["breaks_training"]


def test_audit_says_where_it_could_not_look_for_leaks(tmp_path):
    picture(tmp_path / "a.png")
    path = dump(tmp_path / "train.json", [STAGE2])
    test = dump(tmp_path / "test.json", [STAGE2, STAGE2 | {"images": ["gone.png"]}])
    report = audit(path, image_root=tmp_path, against=[test])
    (problem,) = [p for p in report["problems"] if p["kind"] == "leak_unknown"]
    assert "1 errors in" in problem["detail"]
    assert "first row 1: image_missing" in problem["detail"]
    assert not report["breaks_training"]


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([], "no_samples"),
        ([MGROUNDING | turns("<image><image>Q", "no box")], "no_samples"),
        ([turns(gpt="<answer>(1,2),(3,4)</answer>")], "no_chain"),
        ([turns(gpt="<think>Not closed. <answer>(1,2),(3,4)</answer>")], "no_chain"),
    ],
)
def test_audit_of_rows_that_no_training_could_start_with(tmp_path, rows, kind):
    report = audit(dump(tmp_path / "f.json", rows))
    assert [(p["row"], p["kind"]) for p in report["problems"]] == [(0, kind)]
    assert report["breaks_training"]


def test_a_benchmark_is_trained_on_without_its_boxes_without_area(tmp_path):
    clipped = MIG | {"answer": [0.1, 0.2, 0.3, 1.2]}
    path = dump(tmp_path / "f.json", [MIG, clipped])
    assert len(read(path, training=True)) == 2
    path = dump(tmp_path / "f.json", [clipped, MIG | {"answer": [0.3, 0.2, 0.1, 0.4]}])
    assert len(read(path)) == 2
    with pytest.raises(ValueError, match=r"f\.json, row 1: box .* is inverted; order"):
        read(path, training=True)


def test_audit_of_a_good_file(tmp_path):
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "a.png")
    path = dump(tmp_path / "f.json", [STAGE2])
    report = audit(path, image_root=tmp_path, against=[path])
    assert report["counts"] == {"leak_by_name": 1, "leak_by_picture": 1}
    assert not report["breaks_training"]


def test_audit_command(tmp_path, capsys):
    path = dump(tmp_path / "f.json", [STAGE2])
    options = ["--image-root", tmp_path, "--out", tmp_path / "r.json"]
    command = [sys.executable, "-m", "univg_nb", "audit", path, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 1 and "image_missing" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["samples"] == 1
    assert main([str(path)]) == 0
    with pytest.raises(ValueError, match="no such file"):
        main([str(tmp_path / "no.json")])
    path.write_text('[{"images"')
    assert main([str(path)]) == 1
    assert "bad_json" in capsys.readouterr().out


def test_audit_counts_how_the_target_image_is_known(tmp_path):
    pair = {"images": ["a.png", "b.png"], "answer": [1, 2, 3, 4]}
    rows = [
        *(pair | {"question": f"<image><image>{q}"} for q in ("Q", "Q in image 2")),
        pair | {"question": "<image><image>R", "target_image": 1},
    ]
    report = audit(dump(tmp_path / "f.json", rows))
    assert report["target_images"] == {"unknown": 1, "inferred": 1, "given": 1}


# ---------------------------------------------------------------- real annotation


@real
def test_real_mig_bench(tmp_path):
    samples = read(REAL)
    assert len(samples) == 4295
    assert sum(box_status(s.answer) != "ok" for s in samples) == 5
    write(samples, tmp_path / "f.json", "mig_bench")
    assert read(tmp_path / "f.json", "mig_bench") == samples


@real
def test_audit_of_real_mig_bench():
    report = audit(REAL)
    assert report["samples"] == 4295
    assert report["tasks"] == {
        "region": 1203,
        "common_object": 816,
        "object_tracking": 550,
        "diff": 528,
        "group_grounding": 499,
        "multi_view": 288,
        "correspondence": 117,
        "reasoning": 101,
        "refer_grounding": 99,
        "view_diff": 94,
    }
    assert report["counts"]["box_inverted"] == 5
    found = {}
    for problem in report["problems"]:
        found.setdefault(problem["kind"], {})[problem["row"]] = problem["detail"]
    assert list(found["box_inverted"]) == [7, 105, 126, 163, 512]
    assert list(found["box_out_of_range"]) == [34, 703]
    assert "1.048" in found["box_out_of_range"][34]
    assert "1.035" in found["box_out_of_range"][703]
    assert len(found["duplicate"]) == 2
    severities = {(p["kind"], p["severity"]) for p in report["problems"]}
    assert severities == {
        ("box_inverted", "error"),
        ("box_out_of_range", "warning"),
        ("duplicate", "warning"),
    }
    assert report["breaks_training"]
    assert main([REAL]) == 1


@real
def test_the_real_pair_opens():
    from univg_nb.data.images import open_image

    folder = Path(REAL).parent
    (pair,) = [
        s
        for s in iter_samples(REAL)
        if s.task == "correspondence" and s.images[0].endswith("case076_1.jpg")
    ]
    for path in pair.images:
        assert min(open_image(folder / Path(path).name, pair.id).size) >= 28

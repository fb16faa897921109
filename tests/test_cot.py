"""Checks of a teacher's chain."""

import time

import pytest

from univg_nb.cot import MAX_CHARS, check_chain
from univg_nb.prompts import reply_text
from univg_nb.samples import GroundingSample

CHAIN = "Image 1 shows a cup by the door; in image 2 it stands on the table."
SAMPLE = GroundingSample(
    "c", "object_tracking", ("a", "b"), "Find it.", (10, 20, 30, 40), chain=CHAIN
)
ANSWER = "<answer>(10,20),(30,40)</answer>"


def kinds(reply, sample=SAMPLE):
    return [p.kind for p in check_chain(sample, reply)]


def test_good_chain():
    assert check_chain(SAMPLE, reply_text(SAMPLE)) == []


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (f"<think>{CHAIN}</think><answer>(10,20),(30,41)</answer>", ["answer"]),
        (f"<think>{CHAIN}</think><answer>none</answer>", ["format", "answer"]),
        (f"<think>{CHAIN}</think>", ["format", "answer"]),
        (f"<think>{CHAIN}</think>{ANSWER} Done.", ["format"]),
        (f"Sure. <think>{CHAIN}</think>{ANSWER}", ["format"]),
        (f"<think>{CHAIN}{ANSWER}", ["format"]),
        (f"<think>{CHAIN}</think><answer> (10,20),(30,40)</answer>", ["format"]),
        (f"<think>{CHAIN} At (10,20),(30,40).</think>{ANSWER}", ["coordinates"]),
        (f"<think>{CHAIN} Near [10, 20].</think>{ANSWER}", ["coordinates"]),
        (f"<think>{CHAIN} Near (0.01, 0.02).</think>{ANSWER}", ["coordinates"]),
        (f"<think>Here.</think>{ANSWER}", ["length"]),
        (f"<think>{'a ' * MAX_CHARS}</think>{ANSWER}", ["length"]),
        ("", ["format", "answer", "length"]),
    ],
)
def test_problems(reply, expected):
    assert kinds(reply) == expected


def test_coordinates_of_the_question_are_no_leak():
    asked = GroundingSample(
        "c", "multi_view", ("a", "b"), "Find (1,2),(3,4) again.", (10, 20, 30, 40)
    )
    chain = f"<think>The object at (1, 2),(3,4) is a cup. {CHAIN}</think>"
    assert kinds(chain + ANSWER, asked) == []
    assert kinds(chain + ANSWER) == ["coordinates"]


def test_hostile_reply_is_linear():
    for piece in ("<think>", "(1,", "(1,1),", "<answer>", " ", "["):
        started = time.process_time()
        check_chain(SAMPLE, "<think>" + piece * (200_000 // len(piece)))
        assert time.process_time() - started < 5


def test_single_image_takes_no_chain():
    single = GroundingSample("s", "", ("a",), "q", (1, 2, 3, 4), cot=False)
    with pytest.raises(ValueError, match="sample s is single-image"):
        check_chain(single, "(1,2),(3,4)")

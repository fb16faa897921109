"""Prompts: the released wording, single-image mode, chat messages, replies."""

import pytest

from univg_nb.data import prompts
from univg_nb.data.sample import GroundingSample

PAIR = GroundingSample(
    "p", "diff", ("a.png", "b.png"), "What differs? ", (1, 2, 3, 4), chain="Look."
)
SINGLE = GroundingSample("s", "", ("a.png",), "the cup", (1, 2, 3, 4), cot=False)


def test_user_text():
    asked = (
        "What differs?  First output the thinking process in <think> </think> tags "
        "and then output the bounding box in <answer> </answer> tags."
    )
    assert prompts.user_text(PAIR) == asked
    assert prompts.user_text(PAIR, "plain") == "What differs? "
    assert prompts.user_text(PAIR, "direct").endswith(
        " Format:<|box_start|>(x1,y1),(x2,y2)<|box_end|>. Don't generate addtional "
        "words."
    )
    assert prompts.user_text(SINGLE) == (
        "This is a single image grounding task with simple reference. the cup"
    )


def test_unknown_style():
    with pytest.raises(ValueError, match=r"style 'cot' is unknown.*univg"):
        prompts.user_text(PAIR, "cot")


def test_messages_put_images_first():
    (turn,) = prompts.messages(PAIR)
    assert turn["role"] == "user"
    assert [part["type"] for part in turn["content"]] == ["image", "image", "text"]
    assert turn["content"][-1]["text"] == prompts.user_text(PAIR)


def test_E5_a_sample_is_not_changed_by_asking():
    before = PAIR.question
    assert prompts.user_text(PAIR) == prompts.user_text(PAIR)
    assert PAIR.question == before


def test_replies():
    answer = "<answer>(1,2),(3,4)</answer>"
    assert prompts.reply_text(PAIR) == "<think>Look.</think>" + answer
    assert prompts.reply_text(PAIR, cot=False) == answer
    assert prompts.reply_text(SINGLE) == "(1,2),(3,4)"
    assert prompts.reply_text(SINGLE, cot=False) == "(1,2),(3,4)"


def test_reply_without_a_chain():
    bare = GroundingSample("x", "", ("a.png",), "q", (1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"sample x .* no chain"):
        prompts.reply_text(bare)

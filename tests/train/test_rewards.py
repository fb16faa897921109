"""Rewards against values worked out from docs/paper_facts.md#rewards."""

import random

import pytest

from univg_nb.data import boxes
from univg_nb.train.rewards import format_reward, iou_reward, pixel_inclusive_iou

TARGET = [100, 100, 300, 300]
GOOD = "<think>the left one</think><answer>(100,100),(300,300)</answer>"


def iou_of(text, target=TARGET, cot=True):
    return iou_reward([text], answer=[target], cot=[cot])[0]


def format_of(text, cot=True):
    return format_reward([text], cot=[cot])[0]


def released_iou(a, b):
    """Pixel-inclusive (x2 - 1, then + 1), areas without the trick, as released."""
    x1, y1 = max(a[0], b[0]), max(a[1], b[1])
    x2, y2 = min(a[2], b[2]) - 1, min(a[3], b[3]) - 1
    overlap = (x2 - x1 + 1) * (y2 - y1 + 1) if x1 < x2 and y1 < y2 else 0
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return overlap / (area - overlap)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 1.0),
        ("<answer>(100, 100),\n(300,300)</answer> and more", 1.0),
        # first answer, first box in it; a box in the chain does not count
        ("(0,0),(9,9)<answer>(100,100),(300,200)</answer><answer>(0,0)</answer>", 0.5),
        ("<answer>(100,100),(300,200) or (100,100),(300,300)</answer>", 0.5),
        ("<answer>none</answer><answer>(100,100),(300,300)</answer>", 0.0),
        ("(100,100),(300,300)", 0.0),
        ("<answer>(100,100),(300,300)", 0.0),
        ("<answer>[100,100,300,300]</answer>", 0.0),
        ("<answer>(0.1,0.1),(0.3,0.3)</answer>", 0.0),
        ("<answer>(300,300),(100,100)</answer>", 0.0),
        ("<answer>(100,100),(1100,300)</answer>", 0.2),
        ("<answer>(0,0),(" + "9" * 5000 + ",300)</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_iou_reward_reads_the_first_box_of_the_first_answer(text, expected):
    assert iou_of(text) == pytest.approx(expected)


def test_single_image_items_are_rewarded_for_the_first_box_anywhere():
    text = "at (100,100),(300,200) <answer>(100,100),(300,300)</answer>"
    assert iou_of(text, cot=False) == pytest.approx(0.5)
    assert iou_of(text, cot=True) == pytest.approx(1.0)


def test_iou_equals_released_arithmetic_on_random_boxes():
    rng = random.Random(0)
    differs_from_plain = 0
    for _ in range(1000):
        a, b = (
            (x := rng.randrange(40), y := rng.randrange(40))
            + (x + rng.randint(1, 20), y + rng.randint(1, 20))
            for _ in range(2)
        )
        reward = pixel_inclusive_iou(a, b)
        assert reward == pytest.approx(released_iou(a, b), abs=1e-12)
        plain = boxes.iou(a, b)
        if reward != plain:
            differs_from_plain += 1
            overlap = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
            assert reward == 0.0
            assert min(overlap) == 1
    assert differs_from_plain > 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 1.0),
        ("<think></think>\n <answer>(1,2),(3,4)</answer>", 1.0),
        ("junk <think>a\nb</think><answer>(1, 2), (3, 4)</answer>", 1.0),
        ("<think>a</think><answer> (1,2),(3,4)</answer>", 0.0),
        ("<think>a</think><answer>(1,2),(3,4) </answer>", 0.0),
        ("<think>a</think><answer>(1,2),(3,4)</answer> done", 0.0),
        ("<think>a</think> so <answer>(1,2),(3,4)</answer>", 0.0),
        ("<answer>(1,2),(3,4)</answer>", 0.0),
        ("<think>a<answer>(1,2),(3,4)</answer>", 0.0),
        ("(1,2),(3,4)", 0.0),
    ],
)
def test_format_reward_of_multi_image_items(text, expected):
    assert format_of(text) == expected


def test_format_reward_of_single_image_items_asks_for_a_bare_box():
    assert format_of("(1,2),(3,4)", cot=False) == 1.0
    assert format_of("the box (1, 2), (3,4).", cot=False) == 1.0
    assert format_of("(1,2,3,4)", cot=False) == 0.0


def test_T1_single_image_mode_is_decided_per_sample():
    """The released code judged the batch by its first sample (paper_facts.md#t1)."""
    bare = "(100,100),(300,300)"
    replies, cot = [bare, bare, GOOD, GOOD], [False, True, True, False]
    answer = [TARGET] * 4
    expected = [1.0, 0.0, 1.0, 1.0]
    assert iou_reward(replies, answer=answer, cot=cot) == expected
    assert format_reward(replies, cot=cot) == expected
    for order in ([1, 0, 3, 2], [3, 2, 1, 0]):
        mixed = iou_reward(
            [replies[i] for i in order], answer=answer, cot=[cot[i] for i in order]
        )
        assert mixed == [expected[i] for i in order]


def test_trl_passes_messages_and_extra_columns():
    messages = [[{"role": "assistant", "content": GOOD}]] * 2
    columns = dict(
        prompts=["p", "p"], completion_ids=[[1], [2]], trainer_state=None, id=["a", "b"]
    )
    rewards = iou_reward(messages, answer=[TARGET] * 2, cot=[True] * 2, **columns)
    assert rewards == [1.0, 1.0]
    assert all(type(reward) is float for reward in rewards)
    assert format_reward(messages, cot=[True] * 2, **columns) == [1.0, 1.0]


def test_columns_of_other_lengths_are_an_error():
    with pytest.raises(ValueError, match="argument 2"):
        format_reward([GOOD], cot=[True, False])

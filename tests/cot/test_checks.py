"""Checks of a teacher's chain."""

import time
from dataclasses import replace

import pytest

from univg_nb.cot import checks
from univg_nb.cot.checks import check_chain
from univg_nb.cot.stand_in import ERRORS, WORDINGS
from univg_nb.data.prompts import reply_text
from univg_nb.data.sample import GroundingSample
from univg_nb.minimig.items import TASKS, make

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
        (f"<think>{CHAIN * 40}</think>{ANSWER}", ["length"]),
        (f"<think>看图一和图二里的杯子，目标在图二的桌子上面，杯子不在门边。"
         f"</think>{ANSWER}", ["language", "image"]),
        (f"<think>Auf dem ersten Bild, image 1, steht eine Tasse.</think>{ANSWER}",
         ["language"]),
        (f"<think>{CHAIN} As it is in image 3.</think>{ANSWER}", ["image"]),
        (f"<think>A cup is by the door, then on the table.</think>{ANSWER}", ["image"]),
        ("", ["format", "answer", "length"]),
    ],
)  # fmt: skip
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


def placed(answer, ending, question="Find it in image 2.", count=2):
    images = tuple("abcde"[:count])
    one = GroundingSample("p", "", images, question, answer)
    box = "({},{}),({},{})".format(*answer)
    text = f"<think>Look at the cups. {ending}</think><answer>{box}</answer>"
    return kinds(text, one)


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("It is the cup in image 2, at the left.", []),
        ("It is the cup in image 2, at the right.", ["place"]),
        ("It is in image 2, at the top left.", []),
        ("It is in image 2, at the bottom left.", ["place"]),
        ("It stands on the upper right-hand side of image 2.", ["place"]),
        ("In image 2 it is in the upper right corner.", ["place"]),
        ("In image 2 it is on the right side of the picture.", ["place"]),
        ("In image 2 it stands to the right of the lamp.", []),
        ("In image 2 it is the right cup, on the bottom shelf.", []),
        ("It was at the right in image 1 and is elsewhere in image 2.", []),
        ("At the right there is a lamp. It is the cup in image 2.", []),  # not the end
        ("It is the cup in image 1, at the left.", ["image"]),
        ("It is in image 2, as it is in image 1.", []),
    ],
)
def test_image_and_place_of_the_conclusion(ending, expected):
    assert placed((100, 100, 300, 300), ending) == expected


def test_place_of_a_thing_near_the_middle_and_of_one_image():
    assert placed((420, 420, 620, 620), "It is in image 2, at the left.") == []
    assert placed((600, 0, 800, 100), "It is at the left.", "Find it.", 1) == ["place"]


@pytest.mark.parametrize("task", TASKS)
def test_a_chain_that_ends_in_the_wrong_image_is_seen(task):
    """Also in `diff` and `group_grounding`, whose questions do not tell the image."""
    for index in range(6):
        sample = make(task, 3, "train", index).sample
        wrong = 1 if sample.target_image == 2 else 2
        chain = f"{sample.chain} No, the target is the one in image {wrong}."
        assert kinds(reply_text(sample), sample) == []
        assert kinds(reply_text(replace(sample, chain=chain)), sample) == ["image"]


CAUGHT = {
    "wrong box": "answer",
    "box off by one": "answer",
    "box quoted": "coordinates",
    "corner quoted": "coordinates",
    "no thinking": "length",
    "too long": "length",
    "tag left open": "format",
    "polite opening": "format",
    "other language": "language",
    "wrong image": "image",
    "left for right": "place",
    "wrong thing": None,  # only somebody who looks can see these two
    "invented thing": None,
}


def test_checks_on_planted_errors():
    assert list(CAUGHT) == list(ERRORS)
    for task in TASKS:
        for index in range(3):
            one = make(task, 5, "train", index).sample
            assert kinds(reply_text(one), one) == []
            *sound, back = [wording(one) for wording in WORDINGS]
            for chain in sound:
                assert check_chain(one, reply_text(replace(one, chain=chain))) == []
            assert kinds(reply_text(replace(one, chain=back)), one) == ["image"]
            for error, kind in CAUGHT.items():
                text = ERRORS[error](one, 5)
                unseen = text == reply_text(one)
                end = text.rpartition("So the target")[2]
                unseen |= kind == "place" and not ("left" in end or "right" in end)
                if unseen:  # a side confused before the conclusion, for one
                    continue
                assert kind in kinds(text, one) if kind else not kinds(text, one), text


def test_teacher_prompt_and_steps():
    text = checks.make_teacher_prompt(SAMPLE, "Where is the lid? (1,2),(3,4)")
    assert "2 images" in text and "Find it." in text and "the lid?" in text
    assert text.count("(10,20),(30,40)") == 2
    assert checks.STEPS["object_tracking"] in text
    assert "{" not in text
    families = {checks.get_part(task) for task in TASKS}
    assert families == set(checks.STEPS) and len(families) == 7
    assert checks.get_part("Object-Tracking") == checks.get_part("Object Tracking")
    assert (
        checks.get_part("Free-Form")
        == checks.get_part("")
        == checks.get_part("x")
        == "free_form"
    )


# The parts of MGrounding-630k by their folders (docs/paper_facts.md#chains).
FOLDERS = [
    "Common_Object",
    "Difference",
    "Free-Form",
    "Group_Grounding",
    "Object_Tracking",
    "Referring_Grounding",
    "Region_Locating",
]


def test_every_part_of_mgrounding_has_steps_of_its_own_in_the_prompt():
    prompts = {}
    for folder in FOLDERS:
        text = checks.make_teacher_prompt(replace(SAMPLE, task=folder))
        (prompts[folder],) = (
            name for name, steps in checks.STEPS.items() if steps in text
        )
        assert prompts[folder] == folder.lower().replace("-", "_")
        assert "as if you had not been told the box" in text
        assert reply_text(replace(SAMPLE, chain="your steps")) in text
    assert set(prompts.values()) == set(checks.STEPS)
    assert len(set(checks.STEPS.values())) == 7


def test_other_turns():
    turns = [replace(SAMPLE, id=f"m/{n}", question=f"Q{n}") for n in range(3)]
    alone = [replace(SAMPLE, id="n/0"), replace(SAMPLE, id="plain")]
    found = checks.collect_other_turns([*turns, *alone])
    box = "(10,20),(30,40)"
    assert found["m/1"] == f"Q0 {box} Q2 {box}"
    assert set(found) == {"m/0", "m/1", "m/2"}
    # ids that only look like turns: these are questions about other pictures
    named = [replace(turns[0], id=f"coco/{n}", images=(f"{n}.jpg",)) for n in range(3)]
    assert checks.collect_other_turns(named) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2", 1), ("Reply 1 is best.", 0), ("4", None), ("0", None), ("1 or 2", None),
     ("", None), ("none", None), ("9" * 5000, None), ("3: 3 is true", 2)],
)  # fmt: skip
def test_selected(text, expected):
    assert checks.parse_selection(text, 3) == expected


def test_selector_prompt_numbers_the_replies():
    text = checks.make_selector_prompt(SAMPLE, ["one", "two"])
    assert "Reply 1: one\nReply 2: two" in text and "{" not in text

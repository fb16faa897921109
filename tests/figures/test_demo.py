"""The interactive question: its function, and its form without a browser."""

from datetime import UTC, datetime

import builders
import numpy as np
import pytest
from PIL import Image

from univg_nb import models
from univg_nb.evaluate.predictions import Reply
from univg_nb.figures import demo


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = builders.save_model(tmp_path_factory.mktemp("model"))
    return models.load_for_inference({"name_or_path": str(folder)})


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return builders.questions(tmp_path_factory.mktemp("images"), 4)


def test_ask_draws_the_box_on_the_image_the_question_names(loaded, items, monkeypatch):
    said = "<think>In image 2 it is.</think><answer>(100,100),(900,900)</answer>"
    asked = []

    def fixed(model, processor, samples, **options):
        asked.extend(samples)
        return [Reply(said, tokens=9)]

    monkeypatch.setattr("univg_nb.evaluate.replies.reply", fixed)
    images = items[3].images[:3]
    assert len(images) == 3
    found = demo.ask(*loaded, images, " Where? ")
    assert found.parsed.box == (100, 100, 900, 900)
    assert asked[0].question == "Where?" and asked[0].cot
    # the reply names the second image; the question has the first word
    named = demo.ask(*loaded, images, "Find it in the third image.")
    assert named.picture.size == found.picture.size
    assert [red(found.picture, k) > 100 for k in range(3)] == [False, True, False]
    assert [red(named.picture, k) > 100 for k in range(3)] == [False, False, True]


def red(picture, number):
    """Pixels of the box's colour in the number-th picture of a sheet."""
    left = 308 * number  # each is 300 px wide, with a gap
    part = np.asarray(picture)[:, left : left + 300]
    return int((part == (213, 94, 0)).all(axis=-1).sum())


def test_ask_refuses_what_it_cannot_answer(loaded, items):
    with pytest.raises(ValueError, match="0 images given; choose one to 6"):
        demo.ask(*loaded, [], "Where?")
    with pytest.raises(ValueError, match="7 images"):
        demo.ask(*loaded, ["a.png"] * 7, "Where?")
    with pytest.raises(ValueError, match="question is empty"):
        demo.ask(*loaded, ["a.png"], " ")


def test_panel_asks_on_a_press_and_shows_mistakes(loaded, items, tmp_path, capsys):
    form = demo.build_panel(
        *loaded, {"one": items[0], "two": items[1]}, tmp_path / "up", max_new_tokens=2
    )
    choice, upload, question, think, button, _ = form.children
    assert question.value == items[0].question and think.value
    choice.value = "two"
    assert question.value == items[1].question
    assert capsys.readouterr().out == ""  # nothing is asked before the press
    button.click()
    assert "box None: no_answer" in capsys.readouterr().out
    content = memoryview(b"no image")
    known = {"type": "image/png", "size": 8, "last_modified": datetime.now(UTC)}
    upload.value = ({"name": "../evil.PNG", "content": content, **known},)
    button.click()
    assert "upload_1 is not an image" in capsys.readouterr().out
    # a name that a browser sends is no path here
    assert [p.name for p in (tmp_path / "up").iterdir()] == ["upload_1"]
    question.value = ""
    button.click()
    assert "the question is empty" in capsys.readouterr().out


def test_ask_from_a_shell_writes_the_image(items, tmp_path, capsys):
    out = tmp_path / "answer.png"
    arguments = ["--model", "tiny", "--style", "direct", "--out", str(out)]
    arguments += [*items[3].images[:2], "Find the cup in the second image."]
    demo.main(arguments)
    said = capsys.readouterr().out
    assert "box (" in said and ": ok" in said
    with Image.open(out) as picture:
        assert picture.width > 600
        assert red(picture, 0) == 0

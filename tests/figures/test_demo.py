"""The interactive question: its function, and its form without a browser."""

from datetime import UTC, datetime
from pathlib import Path

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


def said_by(form):
    """The text below the form, and the picture if there is one."""
    output = form.children[-1]
    return output.children[0].value, output.children[1:]


def upload_of(name, content):
    known = {"type": "image/png", "last_modified": datetime.now(UTC)}
    return {"name": name, "size": len(content), "content": memoryview(content), **known}


def test_panel_shows_pictures_asks_on_a_press_and_keeps_nothing(
    loaded, items, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    form = demo.build_panel(
        *loaded, {"one": items[0], "two": items[1]}, max_new_tokens=2
    )
    choice, files, shown, question, think, press, output = form.children
    upload, clear = files.children
    assert question.value == items[0].question and think.value
    assert len(shown.children) == len(items[0].images)
    choice.value = "two"
    assert question.value == items[1].question
    assert len(shown.children) == len(items[1].images)
    assert output.children == ()  # nothing is asked before the press
    press.click()
    text, pictures = said_by(form)
    assert "box None: no_answer" in text and len(pictures) == 1
    assert not press.disabled and press.description == "Ask"
    upload.value = (upload_of("../evil <b>.PNG", b"no image"),)
    assert [box.children[1].value for box in shown.children] == [
        "image 1: ../evil <b>.PNG"
    ]
    press.click()
    text, pictures = said_by(form)
    # The user's name for it, and not where it lay.
    assert ": image evil &lt;b&gt;.PNG is not an image" in text and not pictures
    assert list(tmp_path.iterdir()) == []
    picture = Path(items[2].images[0]).read_bytes()
    upload.value = (upload_of("a.png", picture), upload_of("a.png", picture))
    press.click()
    assert said_by(form)[1] and list(tmp_path.iterdir()) == []
    clear.click()
    assert upload.value == () and said_by(form) == (
        "<pre style='white-space: pre-wrap'></pre>",
        (),
    )
    assert len(shown.children) == len(items[1].images)
    question.value = ""
    press.click()
    assert "the question is empty" in said_by(form)[0]


def test_a_panel_is_busy_while_the_model_thinks(loaded, items, monkeypatch):
    form = demo.build_panel(*loaded, {})
    _, _, question, _, press, _ = form.children  # no example to choose
    seen = []

    def look(*_, **__):
        seen.append((press.disabled, press.description, said_by(form)[0]))
        raise ValueError("enough")

    monkeypatch.setattr(demo, "ask", look)
    question.value = "Where?"
    press.click()
    assert seen[0][:2] == (True, "Thinking …") and "is thinking" in seen[0][2]
    assert "enough" in said_by(form)[0] and not press.disabled


def test_ask_from_a_shell_writes_the_image(items, tmp_path, capsys):
    out = tmp_path / "answer.png"
    arguments = ["--model", "tiny", "--out", str(out)]
    arguments += [*items[3].images[:2], "Find the cup in the second image."]
    demo.main(arguments)
    said = capsys.readouterr().out
    assert "box (" in said and ": ok" in said
    with Image.open(out) as picture:
        assert picture.width > 600
        assert red(picture, 0) == 0

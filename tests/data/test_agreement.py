"""The audit calls a file usable if and only if training and evaluation start with it.

A property test breaks rows in every known way and compares the audit with the loading
that `sft`, `grpo` and `generate` share; a few files go through these commands.
"""

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from univg_nb import models
from univg_nb.__main__ import main as run_command
from univg_nb.data import files
from univg_nb.data.audit import audit
from univg_nb.data.images import check_images
from univg_nb.data.prompts import COT_SUFFIX, reply_text

# ---------------------------------------------------------------- files and their rows

QUESTIONS = ("question", "instruction", "problem")
PAIR = ["a.png", "b.jpg"]
TURNS = [
    {"from": "human", "value": "<image>\n<image>\nWhere is the cup?" + COT_SUFFIX},
    {
        "from": "gpt",
        "value": "<think>It is in image 2.</think><answer>(1,2),(30,40)</answer>",
    },
]
STAGE2 = {"images": PAIR, "question": "<image><image>Q", "answer": [1, 2, 30, 40]}
MIG = STAGE2 | {"task": "diff", "additional_info": "", "need_format": True}
LISA = {"image_path": "a.png", "instruction": "the cup", "boxes": [[1, 2, 30, 40]]}
VIDEO = {"image_list": [*PAIR, "a.png"], "question": "who runs"}
REPLY = TURNS[1] | {"value": "<|box_start|>(1,2),(30,40)<|box_end|>"}
ROWS = {
    "stage1_cotsft": {"images": PAIR, "conversations": TURNS},
    "stage2_rl": STAGE2,
    "mgrounding": {"id": "m", "images": PAIR, "conversations": [TURNS[0], REPLY]},
    "mig_bench": MIG,
    "lisa": LISA,
    "refcoco": {"image": "b.jpg", "problem": "cup", "solution": [1, 2, 30, 40]},
    "reasonvos": VIDEO | {"bbox_list": ["[]", "[]", "[1, 2, 30, 40]"]},
}
# A benchmark's boxes without area are errors for training alone.
NO_AREA = {"box_inverted", "box_degenerate"}


def put(key, value):
    """Break a row by another value under a key that it has."""

    def change(row):
        if key in row:
            row[key] = value

    return change


def write(old, new):
    """Break the question, or the reply where `old` stands there."""

    def change(row):
        for turn in row.get("conversations", ()):
            turn["value"] = turn["value"].replace(old, new)
        for key in QUESTIONS:
            if key in row:
                row[key] = row[key].replace(old, new) or new

    return change


def take(image):
    """Name another picture than the row's last."""

    def change(row):
        for key in ("images", "image_list"):
            if key in row:
                row[key] = [*row[key][:-1], image]
        for key in ("image_path", "image"):
            if key in row:
                row[key] = image

    return change


def drop(key):
    return lambda row: row.pop(key, None)


def add(**entries):
    return lambda row: row.update(copy.deepcopy(entries))


def ask(text):
    """Put a text at the end of what is asked."""

    def change(row):
        for turn in row.get("conversations", ())[:1]:
            turn["value"] = turn["value"].removesuffix(COT_SUFFIX) + text + COT_SUFFIX
        for key in QUESTIONS:
            if key in row:
                row[key] += text

    return change


IMAGES = (
    *("a.png", "b.jpg", "gone.png", "folder.png", "cut.png", "cut.jpg", "empty.png"),
    *("web.png", "thin.png", "dark.png", "heic.jpg", "http://x/a.png", "a\0.png"),
    "x" * 300 + ".png",
)
BOXES = (
    *([5, 2, 3, 4], [3, 2, 3, 4], [1, 2, 3, 1001], [-1, 2, 3, 4], [1, 2, 3]),
    *([0.1, 0.2, 0.3, 0.4], [1, 2, 3, True], ["1", 2, 3, 4], [[1, 2, 3, 4]], []),
    *([0, 0, 1, 1], [1.4, 2, 3.6, 4], [1, 2, 1.2, 4], "(1,2),(3,4)", None, 7),
)
TEXTS = (
    *("<image>", " in <image>?", "<|image_pad|>", "<|vision_start|>", "<|im_end|>"),
    *("<|endoftext|>", "<|box_start|>(1,2),(3,4)<|box_end|>", "<think>", "</answer>"),
    *("\ud83d", "\udc00\ud83d", "😀", "\0", "\uffff", "\\ud83d", COT_SUFFIX, "\n", "é"),
)
REPLIES = (
    *("no box", "<answer></answer>", "<answer>(1,2),(30,40)</answer>", "(1,2),(3,4)"),
    "<think>Not closed. <answer>(1,2),(30,40)</answer>",
    "<think>a</think><think>b</think><answer>(1,2),(30,40)</answer>",
    "<think></think><answer>(1,2),(30,40)</answer>",
    "<think>a<|im_end|></think><answer>(1,2),(30,40)</answer>",
    "<think>a</think><answer>(1,2),(30,40)</answer><|im_end|>",
    "<think>a</think><answer>(9,2),(3,40)</answer>",
    "<think>a</think><answer>(1,2),(3,4) or (5,6),(7,8)</answer>",
    "<think>a<answer></think><answer>(1,2),(30,40)</answer>",
    "<think>\ud83d</think><answer>(1,2),(30,40)</answer>",
)
KEYS = (
    *("images", "image_path", "image", "image_list", *QUESTIONS, "conversations"),
    *("answer", "boxes", "solution", "bbox_list", "task", "type", "id"),
)
VALUES = (None, 3, "", [], [None], [""], {}, True, "a.png", ["a.png"], ["hi"])
DEFECTS = (
    *(take(image) for image in IMAGES),
    *(put(key, box) for key in ("answer", "solution") for box in BOXES),
    *(put("boxes", [box]) for box in BOXES),
    *(put("bbox_list", ["", [], box]) for box in BOXES),
    *(put("bbox_list", ["", [], str(box)]) for box in BOXES),
    *(ask(text) for text in TEXTS),
    *(write(turn["value"], to) for turn in (TURNS[1], REPLY) for to in REPLIES),
    *(put(key, value) for key in KEYS for value in VALUES),
    *(drop(key) for key in KEYS),
    write("<image>\n", ""),
    write("<image>", ""),
    add(cot="no"),
    add(cot=False),
    add(chain="<think>a"),
    add(target_image=3),
    add(target_image=True),
    add(boxes=[[1, 2, 3, 2000], [1, 2, 3, 4]]),
    add(width=0, height=9),
    add(width=9, height=True),
    add(id=None),
    add(id="7"),
    add(id="\ud83d"),
    add(task=3),
    add(type="x"),
    add(conversations=TURNS[1:]),
    add(conversations=TURNS * 2),
    add(conversations=[*TURNS, TURNS[0]]),
    add(conversations=[TURNS[0] | {"from": "user"}, TURNS[1]]),
    add(conversations=[{"from": "system", "value": "Help."}, *TURNS]),
)
SPOIL = (  # a file's text, for the whole of it
    lambda text: text[:-2],
    lambda text: text[: len(text) // 2],
    lambda text: text.replace('"images": ', '"images": [], "images": ', 1),
    lambda text: text[:-1] + ",]",
    lambda text: text + "x",
    lambda text: text.replace("Q", "NaN", 1),
    lambda text: text.replace("[1, 2, 30, 40]", "[1, 2, 30, NaN]", 1),
    lambda text: text.replace("[1, 2, 30, 40]", "[1, 2, 30, 1e999]", 1),
    lambda text: text[:-1] + ", 3]",
    lambda text: "\ufeff" + text,
    lambda _: "[]",
    lambda _: "",
)


@st.composite
def contents(draw):
    """A format and the text of a file: rows, few of them broken, seldom all of it."""
    format = draw(st.sampled_from(list(ROWS)))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        rows.append(copy.deepcopy(ROWS[format]))
        for defect in draw(st.lists(st.sampled_from(DEFECTS), max_size=1)):
            defect(rows[-1])
    text = json.dumps(rows)
    for spoil in draw(st.sampled_from([[]] * 9 + [[spoil] for spoil in SPOIL])):
        text = spoil(text)
    return format, text


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of pictures that can be used, and of others."""
    root = tmp_path_factory.mktemp("root")
    noise = Image.effect_noise((64, 48), 80).convert("RGB")
    for name in PAIR:
        noise.save(root / name)
        (root / f"cut{Path(name).suffix}").write_bytes((root / name).read_bytes()[:900])
    (root / "folder.png").mkdir()
    (root / "empty.png").touch()
    (root / "web.png").write_text("<html>404</html>")
    (root / "heic.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    Image.new("RGB", (300, 1)).save(root / "thin.png")
    Image.new("I;16", (64, 64), 9).save(root / "dark.png")
    return root


def load(path, format, root, training):
    """What `sft`, `grpo` and `generate` do with a file before they begin."""
    samples = files.read(path, format, root, training=training)
    if not samples:
        raise ValueError(f"{path}, row 0: no sample")
    check_images(samples)
    if format == "stage1_cotsft":
        for sample in samples:
            reply_text(sample)


def refuse(function, *arguments):
    """Return the message of a call, "" if it does its work."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def names(message, problem):
    """Whether a message names the row of a problem, or its sample."""
    id = re.escape(problem["id"])
    places = rf"row {problem['row']}: |sample '?{id}'?[ :]" if id else None
    return re.search(places or rf"row {problem['row']}: ", message)


def compare(root, format, text):
    """Hold the audit of a file against the loading; return whether it is usable."""
    path = root / "data.json"
    path.write_text(text, encoding="utf-8")
    errors = audit(path, format, root)["problems"]
    errors = [problem for problem in errors if problem["severity"] == "error"]
    usable = not errors
    for training in (True, False):
        message = refuse(load, path, format, root, training)
        assert bool(errors) == bool(message), (errors, message)
        if message:
            assert any(names(message, problem) for problem in errors), message
            assert len(message.splitlines()) == 1
        if files.ALL_FORMATS[format].training:
            break
        errors = [problem for problem in errors if problem["kind"] not in NO_AREA]
    return usable


@settings(max_examples=200)
@given(contents())
def test_the_audit_and_the_loading_agree(root, content):
    compare(root, *content)


@pytest.mark.parametrize("format", list(ROWS))
def test_they_agree_on_every_defect_alone(root, format):
    found = []
    for defect in DEFECTS:
        rows = [copy.deepcopy(ROWS[format]) for _ in range(3)]
        defect(rows[1])
        if rows[1] != rows[0]:
            found.append(compare(root, format, json.dumps(rows)))
    text = json.dumps([ROWS[format]] * 2)
    found += [compare(root, format, spoil(text)) for spoil in SPOIL]
    assert len(found) > 75 and 0.05 < sum(found) / len(found) < 0.8


# ---------------------------------------------------------------- the commands


CASES = {
    "marker in the question": ask(" Is it in <image>?"),
    "image token": ask("<|image_pad|>"),
    "half of a surrogate pair": ask("\ud83d"),
    "missing picture": take("gone.png"),
    "damaged picture": take("cut.png"),
    "box that leaves the picture": write("(30,40)", "(30,4000)"),
    "no box": drop("answer"),
}


FORMATS = {"sft": "stage1_cotsft", "grpo": "stage2_rl", "generate": "mig_bench"}


def call(command, path, folder, out):
    """Run a command on a data file with the small model in `folder`."""
    model = str(folder / "base")
    if command == "generate":
        words = ["--model", model, "--scale", "smoke", "--records", str(path)]
        words += ["--image-root", str(path.parent)]
    else:
        words = ["smoke", "--data", str(path), "--set", f"model.name_or_path={model}"]
        words += ["--set", f"{command}.max_steps=1"]
    if command == "grpo":
        words += ["--sft-adapter", str(folder / "sft")]
    return run_command([command, *words, "--out", str(out)])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("command", FORMATS)
def test_the_commands_refuse_what_the_audit_refuses(
    root, grpo_folder, tmp_path, monkeypatch, capsys, command, name
):
    """One line, exit code 2, nothing written, before any model is loaded."""
    rows = [copy.deepcopy(ROWS[FORMATS[command]]) for _ in range(3)]
    CASES[name](rows[2])
    if rows[2] == rows[1]:
        pytest.skip("this row has no such key")
    path = root / "bench.json"
    path.write_text(json.dumps(rows))
    assert run_command(["audit", str(path), "--image-root", str(root)]) == 1
    for load in ("load_for_training", "load_for_inference"):
        monkeypatch.setattr(models, load, None)
    assert call(command, path, grpo_folder, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: .*(row 2: |sample '?bench#2'?[ :])", line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", FORMATS)
def test_the_commands_start_with_what_the_audit_calls_usable(
    root, grpo_folder, tmp_path, command
):
    path = root / "bench.json"
    path.write_text(json.dumps([ROWS[FORMATS[command]]] * 2))
    assert run_command(["audit", str(path), "--image-root", str(root)]) == 0
    assert call(command, path, grpo_folder, tmp_path / "out") == 0

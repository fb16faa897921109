"""How numbers, flags, lists and texts are read: in a scale file, --set and -p alike."""

import math
from typing import Any

import pytest

from univg_nb import config
from univg_nb.__main__ import main
from univg_nb.config import load_scale, override, parse_value
from univg_nb.launch.notebooks import parse_parameter

# text, its value where any type will do
VALUES = [
    ("010", 10),
    ("-007", -7),
    ("1_000", 1000),
    ("+3", 3),
    ("0x10", 16),
    ("0o17", 15),
    ("1e-3", 0.001),
    ("1E3", 1000.0),
    (".5", 0.5),
    ("5.", 5.0),
    ("-1e-3", -0.001),
    ("true", True),
    ("False", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("[1, 010, 1e-3, yes, 1:30]", [1, 10, 0.001, "yes", "1:30"]),
    ("{r: 8}", {"r": 8}),
    *(
        (text, text)
        for text in ("1:30", "1:30.5", "2026-01-02", "inf", "nan", "yes", "off", "0b1")
    ),
    *((text, text) for text in ("a: b", "- a", "x #1", "'q'", "*x", "<<", "ä", "1٣")),
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_a_value_is_read_as_typed(text, value):
    found = parse_value(text)
    assert found == value and type(found) is type(value)
    assert parse_value(text, str) == text
    assert parse_parameter("X", text, "default", "00") == text
    assert parse_parameter("X", text, None, "00") == value


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("1:30", "sft.learning_rate"),
        ("inf", "sft.learning_rate"),
        (".inf", "sft.learning_rate"),
        (".nan", "sft.learning_rate"),
        ("1" * 5000, "data.seed"),
        ("2026-01-02", "data.seed"),
        ("1e3", "data.seed"),
        ("null", "data.seed"),
        ("", "data.seed"),
        ("maybe", "sft.bf16"),
        ("1", "sft.bf16"),
        ("[q, v", "sft.lora.target_modules"),
        ("[a, b]", "evaluate.batch_size"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(text, key):
    with pytest.raises(ValueError, match=rf"--set '{key}=") as refused:
        override(load_scale("tiny"), f"{key}={text}")
    assert len(str(refused.value).splitlines()) == 1
    kind: Any = {"learning_rate": 0.5, "bf16": True, "target_modules": []}
    default = kind.get(key.split(".")[-1], 1)
    with pytest.raises(ValueError, match="00: -p X") as refused:
        parse_parameter("X", text, default, "00")
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("sft.bf16=yes", True),
        ("sft.bf16=OFF", False),
        ("sft.save_strategy=no", "no"),
        ("sft.learning_rate=1e-3", 0.001),
        ("sft.lora.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("sft.lora.target_modules=all: of them", "all: of them"),
        ("model.name_or_path=007", "007"),
        ("data.image_root=/pictures of #1: [new", "/pictures of #1: [new"),
        ("data.stage1=null", None),
        ("data.stage2=", None),
        ("data.seed=-1_0", -10),
    ],
)
def test_an_option_is_set_to_its_type(assignment, value):
    found: Any = override(load_scale("tiny"), assignment)
    for key in assignment.partition("=")[0].split("."):
        found = found[key]
    assert found == value and type(found) is type(value)


def test_a_scale_file_means_the_same(tmp_path):
    text = config.dump(load_scale("tiny"))
    path = tmp_path / "mine.yaml"
    lines = ["sft:", "  fp16: yes", "  eval_delay: 010", "  run_name: 2026-01-02"]
    path.write_text(text.replace("sft:", "\n".join(lines)))
    section = load_scale(path)["sft"]
    assert section["fp16"] is True and section["eval_delay"] == 10
    assert section["run_name"] == "2026-01-02"
    path.write_text(text.replace("learning_rate: ", "learning_rate: 1:30 #"))
    with pytest.raises(ValueError, match=r"mine.yaml: sft.learning_rate = '1:30'"):
        load_scale(path)


@pytest.mark.parametrize("text", [text for text, _ in VALUES])
def test_a_dumped_text_is_read_back(text, tmp_path):
    scale = load_scale("tiny")
    scale["data"]["image_root"] = text
    path = tmp_path / "dumped.yaml"
    path.write_text(config.dump(scale), encoding="utf-8")
    assert load_scale(path) == scale


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: b: c", "line 1: not readable as YAML: mapping values"),
        (b"sft: \xff", "not a text in UTF-8"),
        (b"sft: {a: 1, a: 2}", "key written twice: a"),
        (b"[" * 5000, "not readable as YAML"),
        (b"a: \x01", "not readable as YAML"),
    ],
)
def test_a_broken_scale_file_is_named_in_one_line(content, message, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken.yaml.*{message}") as refused:
        load_scale(path)
    assert len(str(refused.value).splitlines()) == 1


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["plan", "tiny", "--set", "sft.seed=1", "--set", "sft.seed =2"],
            "sft.seed is",
        ),
        (["run", "-p", "N", "3", "-p", "N", "4"], "argument -p: N is given twice"),
        (["plan", "tiny", "--mfu", "0"], "--mfu: '0' is wrong"),
        (["plan", "tiny", "--mfu", "nan"], "--mfu: 'nan' is wrong"),
        (["plan", "tiny", "--mfu", "-1e-3"], "--mfu: '-1e-3' is wrong"),
        (["plan", "tiny", "--gpus", "0"], "--gpus: '0' is wrong; expected int, 1 or"),
        (["plan", "tiny", "--gpus", "1.5"], "--gpus: '1.5' is wrong"),
        (["plan", "tiny", "--price", "-2"], "--price"),
        (["plan", "tiny", "--wrong"], "unrecognized arguments: --wrong"),
        (["score"], "required: --records"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("value", ["-1e-3", "-.5", "-1", "-1_000", "a b", "ä: b"])
def test_a_parameter_may_begin_with_a_minus(value):
    parser = config.make_parser("x", "", "")
    parser.add_argument("-p", nargs=2, action=config.AppendOnce, default=[])
    assert parser.parse_args(["-p", "F", value, "-p", "G", "1"]).p == [
        ["F", value],
        ["G", "1"],
    ]


def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "file" / "a" / "b.json", "file is a file; name another folder"),
    ):
        with pytest.raises(config.UnfitError, match=message):
            config.output_file(str(path))
    with pytest.raises(config.UnfitError, match="is a file; name another folder"):
        config.output_folder(tmp_path / "file")
    new = str(tmp_path / "new" / "b.json")
    assert config.output_file(new) == new and not (tmp_path / "new").exists()


def test_no_option_takes_what_is_no_number():
    assert not config.accepts(float, math.inf) and not config.accepts(Any, math.nan)

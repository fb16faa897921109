"""The measured tables of README are what the committed files say."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "fill_readme.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fill_readme", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("part", ["models", "bench"])
def test_a_table_is_not_older_than_its_file(script, part):
    text = script.README.read_text(encoding="utf-8")
    table = getattr(script, f"format_{part}")()
    assert script.fill(text, part, table) == text, "python docs/fill_readme.py RUN_DIR"


def test_the_model_card_has_the_evaluations(script):
    card = script.CARD.read_text(encoding="utf-8")
    assert script.fill(card, "models", script.format_models()) == card


def test_a_part_that_is_not_there_is_an_error(script):
    with pytest.raises(ValueError, match="<!-- prices -->"):
        script.fill("<!-- price -->", "prices", "none")


def test_minutes_of_the_notebooks(script, tmp_path):
    ran = {"00_start_here": {"seconds": 30}, "03_cot_sft_lora": {"seconds": 90}}
    manifest = {"notebooks": ran, "speed": {"gflops": 43.2, "million_steps": 80.0}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    lines = script.format_minutes(tmp_path).splitlines()
    assert lines[2].startswith("| [00_start_here](notebooks/00_start_here.ipynb) | ")
    assert lines[2].endswith(" | 0.5 |") and lines[3].endswith(" | – |")
    assert lines[-3] == "| all |  | 2.0 |"
    assert lines[-1].startswith("Machine: 43 GFLOP/s") and "80 million" in lines[-1]


def test_what_an_interval_looks_like(script):
    assert script.format_interval([0.0374, 0.065], 100, "+.1f") == "+3.7 to +6.5"
    assert script.format_interval(None, 1, "+.3f") == "one seed"

"""Defects of the released code that no other file's tests cover.

All of them are listed in docs/paper_facts.md#defects-in-training and
docs/paper_facts.md#defects-in-evaluation, and each has a test named after it.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_models import make_tiny
from transformers import Qwen2VLForConditionalGeneration

from univg_nb import io, models
from univg_nb.train import rewards

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("letter", "count"), [("T", 12), ("E", 9)])
def test_every_defect_has_a_test(letter, count):
    paths = Path(__file__).parent.glob("**/test_*.py")
    text = "".join(path.read_text() for path in paths)
    pattern = rf"^def test_(?:\w*_)?({letter}\d+)_"
    found = set(re.findall(pattern, text, re.MULTILINE))
    assert found == {f"{letter}{number}" for number in range(1, count + 1)}


def test_T6_the_class_follows_the_config_and_not_the_folders_name(tmp_path):
    """Released: a path without "Qwen2-VL" in it raised, as UniVG-R1-stage1's did."""
    folder = make_tiny(tmp_path / "UniVG-R1-stage1")
    model, _ = models.load_for_inference({"name_or_path": str(folder)})
    assert type(model) is Qwen2VLForConditionalGeneration


def test_T9_versions_are_fixed_and_flash_attention_is_not_needed():
    """Released: trl from a branch, and imports that need one version of flash-attn."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any("@" in line for line in project["dependencies"])
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"):
        assert any(re.match(rf"{name}==\d", line) for line in pinned), name
    assert not any("flash" in line for line in project["dependencies"])


def test_T10_no_name_is_undefined_and_the_format_reward_runs():
    """Released: an undefined `logger`, and a format reward without `import re`."""
    ruff = [sys.executable, "-m", "ruff", "check", "--select", "F821", "--no-cache"]
    made = subprocess.run([*ruff, str(ROOT / "univg_nb")], capture_output=True)
    assert made.returncode == 0, made.stdout.decode()
    text = "<think>a</think><answer>(1,2),(3,4)</answer>"
    assert rewards.format_reward([text], cot=[True]) == [1.0]


def test_T11_a_row_that_was_cut_off_does_not_spoil_the_next(tmp_path):
    """Released: every process appended to one debug file. One process writes ours
    (test_grpo: test_T2_nor_on_two_processes), in whole rows."""
    path = tmp_path / "rollouts.jsonl"
    io.append_jsonl(path, {"step": 1})
    with path.open("a") as file:
        file.write(json.dumps({"step": 2})[:5])
    io.append_jsonl(path, {"step": 2})
    assert io.read_jsonl(path) == [{"step": 1}, {"step": 2}]

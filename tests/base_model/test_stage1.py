"""The recipe of the shipped stage 1: chains of the teacher, kept data, one training."""

import pytest
from transformers import AutoModelForImageTextToText

from univg_nb import io
from univg_nb.base_model import stage1
from univg_nb.cot.checks import check_chain
from univg_nb.cot.stand_in import HABITS, name_style
from univg_nb.data import files
from univg_nb.data.prompts import reply_text

SIZES = {"items": 60, "single": 6, "single_cot": 12}
NONE = dict.fromkeys(SIZES, 0)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("stage1")


def test_chains_are_the_teachers_and_pass_the_checks(out):
    images = out / "data"
    path = stage1.build_data(out / "mixture", images, "mixture", SIZES)
    rows = files.read(path, image_root=images)
    made = io.read_json(out / "mixture" / "mixture.json")
    with_chain = [row for row in rows if row.cot]
    assert len(rows) - len(with_chain) == 6
    assert len(with_chain) + made["refused"] == 60 + 12
    assert sum(row["chains"] for row in made["chains"]) == len(with_chain)
    assert not any(check_chain(row, reply_text(row)) for row in with_chain)
    glances = [row.task for row in with_chain if name_style(row.chain) == "glance"]
    assert sum(task in HABITS["task_styles"] for task in glances) > len(glances) / 2
    alone = [row.chain for row in with_chain if len(row.images) == 1]
    assert alone and not any("image 2" in chain.lower() for chain in alone)
    text = path.read_bytes()
    again = stage1.build_data(out / "mixture", images, "mixture", NONE | {"items": 1})
    assert again.read_bytes() == text  # kept


def test_the_reference_arm_always_reasons(out):
    images = out / "data"
    path = stage1.build_data(out / "thorough", images, "thorough", NONE | {"items": 20})
    rows = files.read(path, image_root=images)
    assert {name_style(row.chain) for row in rows} == {"thorough"}


def test_the_training_resumes_and_its_model_loads(out, monkeypatch):
    short = ("sft.per_device_train_batch_size=8", "sft.disable_tqdm=true")
    monkeypatch.setattr(stage1, "SETTINGS", short)
    monkeypatch.chdir(out)
    stage1.main(["--out", str(out), "--arm", "thorough"])
    assert io.read_json(out / "thorough" / "summary.json")["adapter"] == "none"
    shipped = out / "thorough" / "shipped"
    AutoModelForImageTextToText.from_pretrained(shipped)
    assert io.read_json(shipped / "config.json")["use_cache"]
    assert {"config.yaml", "mixture.json", "training_log.jsonl"} < {
        path.name for path in shipped.iterdir()
    }

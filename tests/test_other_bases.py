"""Qwen2.5-VL and Qwen3-VL through every command, on MiniMIG.

With random weights a command can be seen to end, and a resumed training to be exact.
Whether boxes are right needs a model that points: a tiny Qwen3-VL learns 64 items by
heart, in thousandths and in pixels of the resized picture.
"""

import re
from dataclasses import replace

import pytest
from grpo_builders import Interrupt, what_was_learned
from PIL import Image
from tiny_models import save_base

from univg_nb import io, models
from univg_nb.__main__ import main as run_command
from univg_nb.base_model import architecture
from univg_nb.config import dump, load_scale
from univg_nb.data import files, prompts
from univg_nb.data.boxes import iou
from univg_nb.minimig import build, make, save_images
from univg_nb.train import grpo

pytestmark = pytest.mark.slow

# Nine tokens of 32 x 32 pixels at most: (96, 96), (128, 64) and (64, 128) when resized.
SHAPES = [(256, 256), (384, 192), (192, 384)]
RESIZED = [(96, 96), (128, 64), (64, 128)]
SFT = {
    "adapter": "none",
    "learning_rate": 4e-3,
    "adam_beta2": 0.99,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 36,
    "logging_steps": 20,
    "save_strategy": "no",
    "seed": 0,
}
GRPO = {
    "weight": "exp",
    "num_generations": 4,
    "per_device_train_batch_size": 16,
    "max_completion_length": 24,
    "learning_rate": 1e-4,
    "max_steps": 3,
    "save_strategy": "no",
    "seed": 0,
}


def run(command, *arguments):
    assert run_command([command, *map(str, arguments)]) == 0


def write_scale(folder, base, sft=(), grpo=()):
    """A scale file for the base model in a folder."""
    sections = {"model": {"name_or_path": str(base)}, "data": {"source": "minimig"}}
    sections |= {"sft": SFT | dict(sft), "grpo": GRPO | dict(grpo)}
    sections["evaluate"] = {"max_new_tokens": 24, "batch_size": 64}
    io.write_text(folder / "scale.yaml", dump(sections))
    return folder / "scale.yaml"


def generate(scale, records, out, *arguments, model=None):
    """Replies of the scale's model, and scores.json; (rows, scores)."""
    bench = ["--records", records, "--image-root", records.parent]
    model = model or load_scale(scale)["model"]["name_or_path"]
    shown = ["--model", model, "--scale", scale, "--out", out / "predictions.jsonl"]
    run("generate", *bench, *shown, *arguments)
    made = ["--predictions", out / "predictions.jsonl", "--out", out / "scores.json"]
    run("score", *bench, *made)
    return list(io.read_jsonl(out / "predictions.jsonl")), io.read_json(
        out / "scores.json"
    )


def assert_resume_is_exact(scale, data, start, whole):
    """A training that was cut off after its second update ends as `whole` did."""
    config, cut = load_scale(scale), whole.with_name("cut")
    config["grpo"] |= {"save_strategy": "steps", "save_steps": 1}
    rows = files.read(data, image_root=data.parent, training=True)
    with pytest.raises(KeyboardInterrupt):
        grpo.train(config, cut, rows, sft_adapter=start, callbacks=[Interrupt(2)])
    assert not (cut / "adapter").exists()
    grpo.train(config, cut, rows, sft_adapter=start)
    assert what_was_learned(cut) == what_was_learned(whole)


# ---------------------------------------------------------------- a model that points


@pytest.fixture(scope="module")
def items(folder):
    """64 single-image items of MiniMIG, their pictures stretched to three shapes."""
    samples = []
    for index in range(64):
        item = make("single", 0, "train", index)
        pictures = tuple(one.resize(SHAPES[index % 3]) for one in item.images)
        save_images(replace(item, images=pictures), folder)
        samples.append(item.sample)
    files.write(samples, folder / "items.json", "stage2_rl")
    return samples


@pytest.fixture(scope="module")
def tokenizer(items):
    """Of the words of these items and the digits."""
    texts = [prompts.user_text(item) for item in items]
    return architecture.train_tokenizer([*texts, "You are a helpful assistant 0"])


@pytest.fixture(scope="module", params=["thousandths", "pixels"])
def pointing(request, folder, items, tokenizer):
    """(unit, scale file, folder of the trained model): 450 thousand weights."""
    out = folder / request.param
    sizes = {"hidden_size": 96, "intermediate_size": 192, "initializer_range": 0.06}
    save_base(out / "base", "qwen3", tokenizer, **sizes)
    scale = write_scale(out, out / "base")
    unit = ["--set", f"model.boxes={request.param}"]
    data = ["--data", folder / "items.json"]
    run("sft", scale, *unit, *data, "--out", out / "sft")
    return request.param, scale, out / "sft" / "adapter"


def share_that_hits(boxes, items):
    pairs = zip(boxes, items, strict=True)
    return sum(iou(box, item.answer) >= 0.5 for box, item in pairs) / len(items)


def test_a_trained_model_points_and_writes_its_unit(pointing, folder, items, tmp_path):
    unit, scale, trained = pointing
    records = folder / "items.json"
    rows, scores = generate(scale, records, tmp_path, "--adapter", trained)
    assert scores["pooled"]["n"] == 64 and scores["pooled"]["acc_05"] >= 0.9
    # What the model itself wrote, read here without the package's conversion.
    rows = sorted(rows, key=lambda row: row["index"])
    written = [row.get("written", row["response"]) for row in rows]
    raw = [[int(v) for v in re.findall(r"\d+", text)] for text in written]
    raw = [box if len(box) == 4 else [0, 0, 0, 0] for box in raw]
    units = [RESIZED[i % 3] if unit == "pixels" else (1000, 1000) for i in range(64)]
    scaled = [
        [1000 * v / size[k % 2] for k, v in enumerate(box)]
        for box, size in zip(raw, units, strict=True)
    ]
    assert share_that_hits(scaled, items) >= 0.9
    # Scored as it stands, the reply of a pixel model finds nothing.
    io.write_text(tmp_path / "raw.jsonl", "")
    for row, text in zip(rows, written, strict=True):
        io.append_jsonl(
            tmp_path / "raw.jsonl", {"index": row["index"], "response": text}
        )
    made = ["--predictions", tmp_path / "raw.jsonl", "--out", tmp_path / "raw.json"]
    run("score", "--records", records, "--image-root", folder, *made)
    accuracy = io.read_json(tmp_path / "raw.json")["pooled"]["acc_05"]
    assert (accuracy >= 0.9) if unit == "thousandths" else (accuracy <= 0.1)


def test_the_processor_resizes_as_this_file_says(pointing, folder, items):
    _, scale, _ = pointing
    processor = models.load_processor(load_scale(scale)["model"])
    for item, size in zip(items[:3], RESIZED, strict=True):
        with Image.open(folder / item.images[0]) as picture:
            made = processor.image_processor(images=[picture], return_tensors="pt")
        _, height, width = made["image_grid_thw"][0].tolist()
        assert (16 * width, 16 * height) == size


def test_rewards_of_stage_2_read_the_models_unit(pointing, folder, items, tmp_path):
    """Its log too; and a training from these rewards resumes exactly."""
    unit, scale, trained = pointing
    data, out = folder / "items.json", tmp_path / "whole"
    config = load_scale(scale)
    rows = files.read(data, image_root=folder, training=True)
    summary = grpo.train(config, out, rows, sft_adapter=trained)
    groups = list(io.read_jsonl(out / "rollouts.jsonl"))
    assert len(groups) == 3 * 4
    answers = {item.id: item.answer for item in items}
    for group in groups:
        found = [
            iou(box, answers[group["sample_id"]]) if box else 0
            for box in group["boxes"]
        ]
        assert group["iou"] == pytest.approx(found, abs=1e-3)
    assert summary["mean_iou_first"] > 0.6
    assert max(row["grad_norm"] for row in io.read_jsonl(out / "metrics.jsonl")) > 0
    if unit == "pixels":
        assert_resume_is_exact(scale, data, trained, out)


# ---------------------------------------------------------------- every command


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
def test_every_command_takes_the_family(family, tokenizer, tmp_path):
    save_base(tmp_path / "base", family, tokenizer)
    sizes = {"stage1": 10, "stage2": 10, "single": 2, "test_per_task": 1}
    data = build(tmp_path, sizes | {"zero_shot": 1, "single_test": 1})
    sft = {"max_steps": 2, "lora": {"r": 4, "lora_alpha": 8}, "logging_steps": 1}
    sft |= {"per_device_train_batch_size": 4}
    # No reply has a box: the decay is what changes the weights.
    stage2 = {"weight_decay": 100.0, "per_device_train_batch_size": 8}
    stage2 |= {"max_completion_length": 8}
    scale = write_scale(tmp_path, tmp_path / "base", sft, stage2)
    for adapter in ("lora", "qlora", "none"):
        rows = ["--data", data["stage1"], "--out", tmp_path / adapter]
        run("sft", scale, "--set", f"sft.adapter={adapter}", *rows)
        is_lora = models.is_adapter(tmp_path / adapter / "adapter")
        assert is_lora == (adapter != "none")

    start, out = tmp_path / "lora" / "adapter", tmp_path / "whole"
    rows = ["--data", data["stage2"], "--out", out]
    run("grpo", scale, "--sft-adapter", start, *rows)
    before, after = (
        (folder / "adapter_model.safetensors").read_bytes()
        for folder in (start, out / "adapter")
    )
    assert before != after
    assert_resume_is_exact(scale, data["stage2"], start, out)

    merged, short = tmp_path / "merged", ["--max-new-tokens", 4]
    base = ["--model", tmp_path / "base", "--scale", scale]
    run("merge", *base, "--adapter", out / "adapter", "--out", merged)
    bench = data["mig_bench"]
    adapted = ["--adapter", out / "adapter", *short]
    made = [
        generate(scale, bench, tmp_path / "a", *adapted),
        generate(scale, bench, tmp_path / "m", *short, model=merged),
    ]
    assert made[0][0] == made[1][0]  # the same replies
    assert made[0][1]["pooled"]["n"] == made[1][1]["pooled"]["n"] == 10
    four = ["--adapter", tmp_path / "qlora" / "adapter", "--quantize", "nf4", *short]
    _, scores = generate(scale, bench, tmp_path / "q", *four)
    assert scores["pooled"]["n"] == 10 and not scores["pooled"]["missing"]

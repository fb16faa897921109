"""Stage 1: labels, batches, guards, exact resume."""

import dataclasses
import json
import os
import shutil
import signal as signals
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interrupted import held_by_another_process, killed
from PIL import Image, ImageDraw
from transformers import TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from univg_nb import io, models
from univg_nb.__main__ import main as run_command
from univg_nb.data import files, prompts
from univg_nb.data.sample import GroundingSample
from univg_nb.fast.vision_features import vision_features
from univg_nb.train import checkpoints, sft
from univg_nb.train.checkpoints import (
    COMPLETE,
    find_checkpoint,
    read_training_set,
)
from univg_nb.train.collator import (
    IGNORE,
    LengthGroupedBatches,
    VisionCollator,
    tokenize,
)
from univg_nb.train.merge import merge_check


@pytest.fixture(scope="module")
def data(folder):
    """12 samples with 1 to 6 images from 8 pictures; the last asks for no chain."""
    paths = []
    for i in range(8):
        image = Image.new("RGB", (128, 96 if i % 2 else 128), (30 * i, 200, 90))
        ImageDraw.Draw(image).ellipse((10 * i, 20, 10 * i + 40, 60), fill="red")
        paths.append(str(folder / f"{i}.png"))
        image.save(paths[-1])
    made = []
    for i in range(12):
        count = 1 + i % 6
        images = tuple(paths[(i + k) % 8] for k in range(count))
        box = (10 * i, 100, 10 * i + 400, 700)
        chain = "In image 1 there is a cup." * (1 + i % 3)
        made.append(
            GroundingSample(f"s{i}", "toy", images, f"Find cup {i}.", box, chain=chain)
        )
    bare = GroundingSample("bare", "toy", (paths[0],), "Cup?", (1, 2, 3, 4), cot=False)
    return [*made[:11], bare]


def scale(model_cfg, **options):
    section = {
        "adapter": "lora",
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return {"model": model_cfg, "data": {}, "sft": {**section, **options}}


def losses(out):
    return [row["loss"] for row in io.read_jsonl(out / "metrics.jsonl")]


def adapter_bytes(out):
    return io.config_hash((out / "adapter" / "adapter_model.safetensors").read_bytes())


# ---------------------------------------------------------------- labels


@pytest.fixture(scope="module")
def processor(model_cfg):
    return models.load_processor(model_cfg)


@pytest.mark.parametrize("picks", [[0], [1], [5], [0, 1, 5, 11]])
def test_exactly_the_reply_and_its_end_carry_loss(data, processor, picks):
    rows = tokenize(data, processor)
    batch = VisionCollator(processor)([rows[i] for i in picks])
    assert batch["image_grid_thw"].shape[0] == sum(len(data[i].images) for i in picks)
    for i, ids, labels, mask in zip(
        picks, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        carried = labels[labels != IGNORE]
        assert torch.equal(ids[labels != IGNORE], carried)
        text = processor.tokenizer.decode(carried)
        assert text == prompts.reply_text(data[i]) + "<|im_end|>"
        where = torch.nonzero(labels != IGNORE).flatten()
        assert where[-1] - where[0] + 1 == len(where)  # one run, up to the end
        assert where[-1] == torch.nonzero(mask).flatten()[-1]
        assert int(mask.sum()) == rows[i]["length"]


@pytest.mark.parametrize("chains", [True, False])
def test_same_batch_as_the_processor_and_trl_make(data, processor, chains):
    """TRL's completion has the template's line break too; ours ends at <|im_end|>."""
    picks = [data[i] for i in (0, 2, 5)]
    style = "univg" if chains else "plain"
    opened = [[Image.open(path) for path in sample.images] for sample in picks]
    trl = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    theirs = trl(
        [
            {
                "images": images,
                "prompt": prompts.messages(sample, style),
                "completion": [
                    {"role": "assistant", "content": prompts.reply_text(sample, chains)}
                ],
            }
            for sample, images in zip(picks, opened, strict=True)
        ]
    )
    ours = VisionCollator(processor)(list(tokenize(picks, processor, chains)))
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    for row in range(3):
        n = int(ours["attention_mask"][row].sum())
        assert int(theirs["attention_mask"][row].sum()) == n + 1
        for key in ("input_ids", "labels", "mm_token_type_ids"):
            assert torch.equal(ours[key][row, :n], theirs[key][row, :n])


def test_stored_features_and_a_dropped_mask_do_not_change_the_loss(
    data, processor, model_cfg, tmp_path
):
    model, _ = models.load_for_inference(model_cfg)
    rows = [tokenize(data, processor)[i] for i in (0, 4, 5)]
    paths = [path for row in rows for path in row["images"]]
    features = vision_features(model, processor, paths, tmp_path, progress=False)
    assert len(features) == len(set(paths))
    batch = VisionCollator(processor, features)(rows)
    batch.pop("sample_index")
    image = SimpleNamespace(pooler_output=(batch.pop("image_features"),))
    with torch.no_grad():
        stored = model(**batch, mm_encoder_outputs={"image": image}).loss.item()
    batch = VisionCollator(processor)(rows)
    batch.pop("sample_index")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        masked = model(**batch).loss.item()
        model.model.register_forward_pre_hook(sft._drop_mask, with_kwargs=True)
        unmasked = model.train()(**batch).loss.item()
    assert [stored, unmasked] == pytest.approx([masked] * 2, abs=1e-5)


def test_features_kept_on_disk_are_the_same_and_follow_the_images(
    data, processor, model_cfg, tmp_path
):
    model, _ = models.load_for_inference(model_cfg)
    paths = []
    for number, path in enumerate(data[4].images):  # of different sizes
        paths.append(str(tmp_path / f"{number}.png"))
        shutil.copy(path, paths[-1])
    keep = tmp_path / "features"
    first = vision_features(model, processor, paths, keep, progress=False)
    assert len(list(keep.glob("*.pt"))) == 1
    again = vision_features(model, processor, paths, keep, progress=False)
    assert list(first) == list(again) == list(dict.fromkeys(paths))
    for path in first:
        assert all(map(torch.equal, first[path], again[path]))
    Image.new("RGB", (64, 64), "red").save(paths[0])
    changed = vision_features(model, processor, paths, keep, progress=False)
    assert len(list(keep.glob("*.pt"))) == 2
    assert not torch.equal(changed[paths[0]][0], first[paths[0]][0])


def test_control_without_chains(data, processor):
    (row,) = tokenize(data[:1], processor, chains=False)
    text = processor.tokenizer.decode(row["prompt_ids"] + row["completion_ids"])
    assert "think" not in text and text.endswith("</answer><|im_end|>")


# ---------------------------------------------------------------- order and padding


def test_length_groups():
    lengths = torch.randint(100, 400, (203,)).tolist()
    sampler = LengthGroupedBatches(lengths, 8, seed=1)
    first = list(sampler)
    assert first == list(sampler) and sorted(first) == list(range(203))
    sampler.set_epoch(1)
    assert list(sampler) != first

    def padding(order):
        cut = [order[i : i + 8] for i in range(0, len(order), 8)]
        padded = sum(max(lengths[i] for i in b) * len(b) for b in cut)
        return 1 - sum(lengths) / padded

    assert padding(first) < 0.15 < padding(list(range(203)))
    means = [sum(lengths[i] for i in first[k : k + 8]) for k in range(0, 64, 8)]
    assert means != sorted(means) and means != sorted(means, reverse=True)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained(model_cfg, data, folder):
    out = folder / "trained"
    return out, sft.train(scale(model_cfg), out, data)


def test_training_learns_and_leaves_the_base_alone(trained, model_cfg, data):
    out, summary = trained
    assert summary["steps"] == 6 and summary["loss_last"] < summary["loss_first"]
    assert summary["parameters"]["vision"]["trainable"] == 0
    assert 0 <= summary["padding_share"] < 0.3
    assert {"step", "loss", "grad_norm", "learning_rate", "mean_token_accuracy"} <= set(
        io.read_jsonl(out / "metrics.jsonl")[0]
    )
    base, _ = models.load_for_inference(model_cfg)
    model, _ = models.load_for_training(model_cfg, out / "adapter")
    assert models.hash_weights(model) == models.hash_weights(base)
    for name, value in model.state_dict().items():
        assert "lora_B" not in name or value.abs().sum() > 0
    assert not list(out.glob("checkpoints/checkpoint-*"))


def test_same_seed_same_curve_and_same_bytes(trained, model_cfg, data, tmp_path):
    out, _ = trained
    sft.train(scale(model_cfg), tmp_path, data)
    assert losses(tmp_path) == losses(out)
    assert adapter_bytes(tmp_path) == adapter_bytes(out)


class Kill(TrainerCallback):
    """Ends the process as kill -9 would, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [2, 5])  # in the first and in the second epoch
def test_resume_is_exact(trained, model_cfg, data, tmp_path, monkeypatch, stop):
    out, _ = trained
    config = scale(model_cfg, save_strategy="steps", save_steps=2)
    build = sft.build_trainer

    def interrupted(*args):
        trainer = build(*args)
        trainer.add_callback(Kill(stop + 1))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(sft, "build_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sft.train(config, tmp_path, data)
    # a checkpoint whose writing was cut off, newer than the whole one
    last = sorted((tmp_path / "checkpoints").glob("checkpoint-*"))[-1]
    half = tmp_path / "checkpoints" / "checkpoint-6"
    if not half.exists():
        shutil.copytree(last, half)
        (half / COMPLETE).unlink()
        (half / "optimizer.pt").write_bytes(b"half")
    summary = sft.train(config, tmp_path, data)
    assert losses(tmp_path) == losses(out)
    assert adapter_bytes(tmp_path) == adapter_bytes(out)
    # Speeds are of the updates that this call made.
    batch = config["sft"]["per_device_train_batch_size"]
    made = summary["samples_per_second"] * summary["seconds_per_update"]
    assert made == pytest.approx(batch, rel=0.1)


def test_a_whole_model_resumes_from_its_own_weights(
    model_cfg, data, tmp_path, monkeypatch
):
    """transformers writes other names into the file than its Trainer looks for."""
    config = scale(model_cfg, adapter="none", save_strategy="steps", save_steps=2)
    sft.train(config, tmp_path / "whole", data)
    build = sft.build_trainer

    def interrupted(*args):
        trainer = build(*args)
        trainer.add_callback(Kill(3))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(sft, "build_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sft.train(config, tmp_path / "cut", data)
    sft.train(config, tmp_path / "cut", data)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal", "method", "at"),
    [
        ("SIGKILL", "_get_grad_norm", 4),  # in update 4, its gradient computed
        ("SIGTERM", "_get_grad_norm", 4),  # ends after that update, saved
        ("SIGKILL", "_save_optimizer_and_scheduler", 2),  # checkpoint-4 half written
    ],
)
def test_a_killed_process_resumes_exactly(
    trained, model_cfg, data, tmp_path, signal, method, at
):
    out, _ = trained
    config = scale(model_cfg, save_strategy="steps", save_steps=2)
    where = {"signal": signal, "method": method, "at": at}
    code = killed(tmp_path, "sft", config, data, tmp_path / "a", options={}, **where)
    number = getattr(signals, signal)
    assert code == (128 + number if signal == "SIGTERM" else -number)
    saved = tmp_path / "a" / "checkpoints"
    whole = {path.parent.name for path in saved.glob(f"*/{COMPLETE}")}
    last = {"checkpoint-4"} if signal == "SIGTERM" else set()
    assert whole == {"checkpoint-2"} | last
    half = method == "_save_optimizer_and_scheduler"
    assert (saved / "checkpoint-4").exists() == (half or bool(last))
    sft.train(config, tmp_path / "a", data)
    assert losses(tmp_path / "a") == losses(out)
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(out)


def test_killed_after_the_last_update_trains_no_further(
    trained, model_cfg, data, tmp_path
):
    """The Trainer would make one update more from a checkpoint of the last."""
    out, _ = trained
    config = scale(model_cfg, save_strategy="steps", save_steps=3)
    for _ in range(2):
        sft.train(config, tmp_path, data)
        (tmp_path / "summary.json").unlink()  # written last
        assert losses(tmp_path) == losses(out)
        assert adapter_bytes(tmp_path) == adapter_bytes(out)


def test_checkpoints_of_another_configuration_are_not_used(tmp_path):
    for step, fingerprint in ((9, "a"), (10, "a"), (20, "b"), (40, "a")):
        path = tmp_path / f"checkpoint-{step}"
        io.write_json(path / COMPLETE, {"fingerprint": fingerprint})
        state = {"global_step": step, "max_steps": 40}
        io.write_json(path / "trainer_state.json", state)
    (tmp_path / "checkpoint-30").mkdir()
    assert find_checkpoint(tmp_path, "a").name == "checkpoint-10"
    assert find_checkpoint(tmp_path, "c") is None


def test_no_whole_checkpoint_is_deleted_before_the_next_is_marked(
    model_cfg, data, tmp_path, monkeypatch
):
    """Whenever a process is killed, there is one to go on from."""
    seen = []

    def look(folder, **_):
        seen.append([mark.parent.name for mark in folder.parent.glob(f"*/{COMPLETE}")])
        shutil.rmtree(folder)

    half = tmp_path / "checkpoints" / "checkpoint-1"  # of a killed process
    half.mkdir(parents=True)
    monkeypatch.setattr(checkpoints, "shutil", SimpleNamespace(rmtree=look))
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    sft.train(scale(model_cfg, max_steps=4, **saving), tmp_path, data)
    assert seen == [["checkpoint-2"], ["checkpoint-4"]]
    assert [path.name for path in half.parent.glob("c*")] == ["checkpoint-4"]


# ---------------------------------------------------------------- one folder, one job


def test_a_training_is_never_replaced_unless_asked(model_cfg, data, tmp_path, capsys):
    out, config = tmp_path / "sft", scale(model_cfg, max_steps=2)
    summary = sft.train(config, out, data)
    made = adapter_bytes(out)
    assert sft.train(config, out, data) == summary
    assert "finished before; train it again with --fresh" in capsys.readouterr().out
    slower = scale(model_cfg, max_steps=2, learning_rate=1e-3)
    said = r"sft holds a finished training of other settings \(there learning_rate: "
    with pytest.raises(ValueError, match=said + r"0.005, now learning_rate: 0.001\)"):
        sft.train(slower, out, data)
    with pytest.raises(ValueError, match="its samples, or what it starts from"):
        sft.train(config, out, data[1:])
    assert adapter_bytes(out) == made
    sft.train(slower, out, data, fresh=True)
    assert adapter_bytes(out) != made
    assert adapter_bytes(tmp_path / "replaced" / "sft") == made
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("replaced", "sft", "vision_features")
    ]


def test_an_interrupted_training_of_other_settings_is_not_lost(
    model_cfg, data, tmp_path
):
    saving = {"save_strategy": "steps", "save_steps": 1}
    config = scale(model_cfg, max_steps=2, **saving)
    sft.train(config, tmp_path, data)
    (tmp_path / "summary.json").unlink()
    longer = scale(model_cfg, max_steps=3, **saving)
    with pytest.raises(ValueError, match=r"an interrupted training .*max_steps: 3"):
        sft.train(longer, tmp_path, data)


def test_a_second_training_in_a_folder_is_refused_before_the_model_is_loaded(
    model_cfg, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "load_for_training", None)
    with (
        held_by_another_process(tmp_path / "sft") as pid,
        pytest.raises(ValueError, match=rf"sft: .*, process {pid}, since .* works on"),
    ):
        sft.train(scale(model_cfg), tmp_path / "sft", data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "sft: no update in max_steps = 0"),
        ({"num_train_epochs": 0}, "no update in max_steps = -1, num_train_epochs = 0"),
        ({"output_dir": "x"}, "--out names the folder"),
    ],
)
def test_a_training_without_updates_is_refused_before_it_starts(
    model_cfg, data, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(models, "load_for_training", None)
    with pytest.raises(ValueError, match=message):
        sft.train(scale(model_cfg, **options), tmp_path / "sft", data)
    assert not list(tmp_path.iterdir())


def test_qlora_trains_an_adapter_of_full_precision(model_cfg, data, tmp_path):
    config = scale(model_cfg, max_steps=4)
    account = sft.train(config, tmp_path, data, adapter="qlora")["parameters"]
    assert account["language"]["trainable"] == account["vision"]["trainable"] == 0
    assert account["adapter"]["bytes"] == 4 * account["adapter"]["parameters"]
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_full_fine_tuning_saves_a_model_that_plain_transformers_loads(
    model_cfg, data, tmp_path
):
    config = scale(model_cfg, max_steps=2, learning_rate=1e-3)
    summary = sft.train(config, tmp_path, data, adapter="none", chains=False)
    account = summary["parameters"]
    assert account["adapter"]["parameters"] == account["vision"]["trainable"] == 0
    base, _ = models.load_for_inference(model_cfg)
    model, _ = models.load_for_inference(model_cfg, tmp_path / "adapter")
    changed = {
        name
        for (name, a), b in zip(
            base.named_parameters(), model.parameters(), strict=True
        )
        if not torch.equal(a, b)
    }
    assert changed and not any("visual" in name for name in changed)


def test_merged_models_answer_as_the_trained_ones(trained, model_cfg, data):
    """LoRA: the same but for rounding. On NF4: merged into the unrounded base."""
    out, _ = trained
    job = (model_cfg, out / "adapter", data, 8)
    lora, qlora = merge_check(*job), merge_check(*job, quantize="nf4")
    assert lora["samples"] == lora["same_replies"] == len(data) == 12
    assert 0 < lora["max_logit_difference"] < 1e-3 * lora["logit_std"]
    assert 100 * lora["mean_logit_difference"] < qlora["mean_logit_difference"]
    assert qlora["mean_logit_difference"] < qlora["logit_std"]


# ---------------------------------------------------------------- guards


def test_a_loss_that_is_not_finite_stops_before_the_update(
    model_cfg, data, tmp_path, monkeypatch
):
    build = sft.build_trainer

    def broken(*args):
        trainer = build(*args)
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight[5:].fill_(float("nan"))
        return trainer

    monkeypatch.setattr(sft, "build_trainer", broken)
    with pytest.raises(
        FloatingPointError, match=r"loss is nan at step 1.*samples (bare|s\d)"
    ):
        sft.train(scale(model_cfg), tmp_path, data)


def test_users_mistakes_are_named(model_cfg, data, tmp_path):
    with pytest.raises(ValueError, match=r"s\d+: \d+ tokens, more than sft.max_length"):
        sft.train(scale(model_cfg, max_length=100), tmp_path, data)
    gone = GroundingSample("gone", "toy", ("no.png",), "Cup?", (1, 2, 3, 4), cot=False)
    with pytest.raises(ValueError, match=r"gone.*no\.png"):
        sft.train(scale(model_cfg), tmp_path, [*data, gone])
    (tmp_path / "cut.png").write_bytes(Path(data[0].images[0]).read_bytes()[:-40])
    cut = dataclasses.replace(data[0], id="cut", images=(str(tmp_path / "cut.png"),))
    with pytest.raises(ValueError, match=r"sample cut: image .*cut\.png is .* damaged"):
        sft.train(scale(model_cfg), tmp_path, [*data, cut])
    with pytest.raises(ValueError, match="no training samples"):
        sft.train(scale(model_cfg), tmp_path, [])
    with pytest.raises(ValueError, match="freeze_vision"):
        sft.train(scale(model_cfg, freeze_vision=False), tmp_path, data)
    assert not (tmp_path / "metrics.jsonl").exists()


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("stage", "form"), [("stage1", "stage1_cotsft"), ("stage2", "stage2_rl")]
)
def test_images_are_looked_for_beside_the_file_and_rows_are_limited(
    data, folder, stage, form
):
    file = folder / f"{form}.json"
    files.write(data[:3], file, form, folder)
    options = SimpleNamespace(data=None, scale="smoke")
    section = {f"{stage}_file": str(file), stage: 2}
    found = read_training_set(options, {"data": section}, stage)
    assert [sample.images for sample in found] == [s.images for s in data[:2]]
    options.data = file
    assert len(read_training_set(options, {"data": {}}, stage)) == 3


def test_the_command_trains(data, folder, tmp_path):
    file = folder / "stage1_cotsft.json"
    files.write(data, file, "stage1_cotsft", folder)
    words = ["sft", "smoke", "--data", str(file), "--out", str(tmp_path / "out")]
    words += ["--set", "sft.max_steps=1", "--no-chains"]
    assert run_command(words) == 0
    summary = io.read_json(tmp_path / "out" / "summary.json")
    assert (summary["steps"], summary["chains"]) == (1, False)


@pytest.mark.slow
def test_the_module_answers_mistakes_as_the_command_does():
    """`accelerate launch -m` runs the module and not the command."""
    words = ["-m", "univg_nb.train.sft", "smoke", "--data", "no.json"]
    made = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert made.returncode == 2
    assert "error: " in made.stderr and "no.json" in made.stderr
    assert "Traceback" not in made.stderr


# ---------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(trained, model_cfg, data, tmp_path):
    """Same global batch on two gloo processes: same losses within 1e-5."""
    script = tmp_path / "two.py"
    config = scale(model_cfg, per_device_train_batch_size=2, lora={"r": 4})
    one = scale(model_cfg, per_device_train_batch_size=4, lora={"r": 4})
    rows = [dataclasses.asdict(sample) for sample in data]
    script.write_text(
        "import json, sys\n"
        "from univg_nb.train import sft\n"
        "from univg_nb.data.sample import GroundingSample\n"
        "config, rows, out = json.loads(open(sys.argv[1]).read())\n"
        "for row in rows:\n"
        "    row |= {k: tuple(row[k]) for k in ('images', 'answer', 'boxes')}\n"
        "sft.train(config, out, [GroundingSample(**row) for row in rows])\n"
    )
    job = tmp_path / "job.json"
    job.write_text(json.dumps([config, rows, str(tmp_path / "two")]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*torchrun, "--nproc_per_node", "2", str(script), str(job)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(sft.__file__).parents[2])},
    )
    sft.train(one, tmp_path / "one", data)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)

"""The memory account against counts by hand, public anchors and a real training."""

import socket
import subprocess
import warnings

import pytest
import torch
from PIL import Image

from univg_nb import io, models, runs
from univg_nb.data.sample import GroundingSample
from univg_nb.launch import cost
from univg_nb.launch import plan as planning
from univg_nb.launch.cost import Layout
from univg_nb.train import grpo, sft

# Qwen2-VL-7B-Instruct, counted by hand from its published sizes.
H, KV, MLP, LAYERS, VOCAB, V = 3584, 512, 18944, 28, 152064, 1280
LAYER = 2 * H * H + 2 * H * KV + 3 * H * MLP + H + 2 * KV + 2 * H
LANGUAGE = 2 * VOCAB * H + LAYERS * LAYER + H
BLOCK = 4 * V * V + 8 * V * V + 4 * V + 4 * V + V + 4 * V
MERGER = 2 * V + (4 * V) ** 2 + 4 * V + 4 * V * H + H
VISION = 3 * 2 * 14 * 14 * V + 32 * BLOCK + MERGER
LINEARS = LAYERS * (2 * H * H + 2 * H * KV + 3 * H * MLP)


@pytest.fixture(scope="module")
def full():
    return runs.load_scale("full")


def changed(config, **sections):
    made = dict(config)
    for name, values in sections.items():
        made[name] = {**made[name], **values}
    return made


def layout(strategy="zero3", processes=8, tokens=6000):
    return Layout(strategy, processes, tokens, 256, 2048, 1500)


def plan(config, stage="sft", card="H100-80G", rows=90_000, **where):
    gpu = cost.find_gpu(card)
    return cost.Plan(config, stage, layout(**where), gpu, rows)


def test_7b_parameters_and_sharded_bytes_equal_the_count_by_hand(full):
    assert (LANGUAGE, VISION) == (7_615_616_512, 675_759_104)
    made = plan(full)
    assert made.parameters["language"]["parameters"] == LANGUAGE
    assert made.parameters["vision"]["parameters"] == VISION
    assert made.parameters["total"]["trainable"] == LANGUAGE  # the tower is frozen
    assert made.memory["weights"] == 2 * (LANGUAGE + VISION) / 8
    assert made.memory["gradients"] == 2 * LANGUAGE / 8
    assert made.memory["optimizer"] == 12 * LANGUAGE / 8  # fp32 weight and two moments
    assert made.memory["reference"] == 0
    grpo = plan(full, "grpo", rows=10_000, tokens=2500)
    assert grpo.memory["reference"] == made.memory["weights"]
    assert (grpo.batch["prompts"], grpo.updates) == (
        16,
        625,
    )  # docs/paper_facts.md#training-configuration
    assert (made.batch["rows"], made.updates) == (24, 3750)


# Numbers of parameters as their publishers give them.
NEWER = {
    "full_qwen2_5_vl": (8_292_166_656, 28),
    "full_qwen3_vl": (8_767_123_696, 32),
    "small_qwen3_vl": (4_437_815_808, 32),
}


@pytest.mark.parametrize("scale", NEWER)
def test_a_newer_base_is_planned_from_its_shipped_sizes(scale):
    """No network: the model exists on the meta device, its pictures as 512 tokens."""
    config = runs.load_scale(scale)
    count, side = NEWER[scale]
    where = planning.choose_layout(config, "grpo")
    made = cost.Plan(config, "grpo", where, cost.find_gpu("H100-80G"), 10_000)
    parts = made.parameters
    assert parts["total"]["parameters"] - parts["adapter"]["parameters"] == count
    assert made.vision.patch_size * made.vision.spatial_merge_size == side
    assert where.images == planning.IMAGES * 512
    rows = made.section["gradient_accumulation_steps"]  # of 8 replies, a prompt each
    tokens = rows * (where.tokens + 7 * where.reply)
    text = made.text
    keys = text.num_hidden_layers * text.num_key_value_heads * 128  # width of a head
    assert made.memory["KV cache"] == 2 * 2 * keys * tokens
    thinking = config["model"]["name_or_path"].replace("Instruct", "Thinking")
    assert cost.load_architecture(thinking).get_text_config().hidden_size == (
        text.hidden_size
    )


def test_each_reply_has_its_prompt_in_a_cache_of_trls_own(full):
    shared = plan(full, "grpo", tokens=2500).memory
    alone = plan(changed(full, grpo={"shared_prefix": False}), "grpo", tokens=2500)
    assert (
        plan(full, "grpo", strategy="fsdp2", tokens=2500).memory["KV cache"]
        == (alone.memory["KV cache"])
    )
    ratio = 8 * 2500 / (2500 + 7 * 256)
    assert alone.memory["KV cache"] == pytest.approx(ratio * shared["KV cache"])
    assert alone.memory["activations"] > 4 * shared["activations"]


def test_what_a_strategy_shards(full):
    one = 2 * (LANGUAGE + VISION)
    ddp, zero2, fsdp = (plan(full, strategy=s) for s in ("ddp", "zero2", "fsdp2"))
    assert ddp.memory["weights"] == zero2.memory["weights"] == one
    assert ddp.memory["gradients"] == ddp.memory["buffers"] == 2 * LANGUAGE
    assert zero2.memory["gradients"] == 2 * LANGUAGE / 8
    total = sum(fsdp.memory[k] for k in ("weights", "gradients", "optimizer"))
    assert total == pytest.approx((2 * VISION + 16 * LANGUAGE) / 8)


def test_a_gpu_that_samples_under_zero3_holds_the_whole_model(full):
    whole, made = 2 * (LANGUAGE + VISION), plan(full, "grpo", tokens=2500)
    parts = made.memory
    assert parts["weights"] + parts["gathered"] == pytest.approx(whole)
    sampling = ("KV cache", "vision", "gathered")
    training = ("activations", "logits")
    always = sum(parts[k] for k in parts.keys() - {*sampling, *training})
    assert made.peak == pytest.approx(always + sum(parts[k] for k in sampling))
    spread = {"ds3_gather_for_generation": False}
    for other in ({"use_vllm": True, "vllm_mode": "server"}, spread):
        assert not plan(changed(full, grpo=other), "grpo").memory["gathered"]
    for stage, strategy in (("sft", "zero3"), ("grpo", "fsdp2"), ("grpo", "ddp")):
        assert not plan(full, stage, strategy=strategy).memory["gathered"]


def test_full_fine_tuning_in_pure_bf16_and_in_mixed_precision(full):
    table = planning.account_by_precision(full, cost.find_gpu("H100-80G"))
    pure, ddp, mixed, zero2, zero3 = table.values()
    states = ("weights", "gradients", "optimizer")
    frozen = 2 * VISION / 1e9

    def add(row):
        return sum(row[k] for k in states)

    assert add(pure) == add(ddp) == pytest.approx(frozen + 8 * LANGUAGE / 1e9)
    assert (pure["buffers"], ddp["buffers"]) == (0, 2 * LANGUAGE / 1e9)
    assert ddp["peak"] - pure["peak"] == pytest.approx(2 * LANGUAGE / 1e9)
    assert add(mixed) == pytest.approx(frozen + 16 * LANGUAGE / 1e9)
    assert add(zero2) == pytest.approx(frozen + (2 + 14 / 8) * LANGUAGE / 1e9)
    assert add(zero3) == pytest.approx(add(mixed) / 8)
    assert zero3["peak"] == plan(full).peak / 1e9


def test_nf4_packs_the_linear_layers_of_the_language_model(full):
    config = changed(full, sft={"adapter": "qlora", "lora": {"r": 16}})
    made = plan(config, strategy="single", processes=1)
    adapter = made.parameters["adapter"]["parameters"]
    # r numbers per input and per output of q, k, v, o, gate, up, down
    ends = 2 * (H + H) + 2 * (H + KV) + 2 * (H + MLP) + (MLP + H)
    assert adapter == 16 * LAYERS * ends
    rest = 2 * (LANGUAGE + VISION - LINEARS) + 4 * adapter
    packed = LINEARS * (0.5 + 1 / 64 + 1 / 4096)
    assert made.memory["weights"] == pytest.approx(rest + packed, rel=1e-9)
    assert made.memory["optimizer"] == 8 * adapter


def test_public_anchors_in_kind(full):
    """EasyR1's table for GRPO of a 7B: LoRA on 2 x 32 GB, all weights in pure bf16 on
    4 x 40 GB, with mixed precision on 8 x 40 GB."""
    pure = changed(full, grpo={"bf16": False})
    lora = changed(full, sft={"adapter": "lora", "lora": {"r": 64}})

    def fits(config, card, **where):
        made = plan(config, "grpo", card, 10_000, tokens=2500, **where)
        return made.fits

    assert fits(pure, "A100-40G", strategy="fsdp2", processes=4)
    assert not fits(pure, "A100-40G", strategy="fsdp2", processes=2)
    assert fits(full, "A100-40G", processes=8)
    assert not fits(full, "A100-40G", processes=4)
    assert fits(lora, "RTX5090-32G", processes=2)
    assert not fits(full, "RTX5090-32G", processes=2)


def test_knobs_are_ranked_by_what_they_save(full):
    made = plan(full, "grpo", card="A100-40G", processes=2, tokens=2500)
    assert not made.fits
    gpu_rows = cost.rank_variants(made)
    kept = [not name.startswith(cost.OTHER_RECIPE) for name, _ in gpu_rows]
    assert kept == sorted(kept, reverse=True) and 0 < sum(kept) < len(kept)
    for kind in (True, False):
        peaks = [p.peak for k, (_, p) in zip(kept, gpu_rows, strict=True) if k is kind]
        assert peaks == sorted(peaks) and peaks[-1] < made.peak
    text = planning.format_plan(made, "A100-40G", 2.0)
    assert "DOES NOT FIT" in text and "at 2 a GPU hour" in text
    told = planning.format_variants(made, gpu_rows)
    first, second = (kept.index(kind) for kind in (True, False))
    for place, kind in ((first, "same recipe"), (second, "another recipe")):
        name, other = gpu_rows[place]
        line = next(line for line in told.splitlines() if line.strip().startswith(name))
        assert f"needs {other.peak / 1e9:.3g} GB" in line and line.endswith(kind)
    assert "sft.adapter=" in told


def test_tight_is_what_leaves_little_of_a_card_free():
    card, most = cost.find_gpu("RTX4090-24G"), (1 - cost.SPARE) * 24e9
    said = [card.judge(peak) for peak in (0.99 * most, 1.01 * most, 24e9, 24.1e9)]
    assert said == ["fits", "tight", "tight", "does not fit"]


# ---------------------------------------------------------------- against a training


def peak_of(call):
    """Largest sum of the tensors alive at once during `call`, bytes."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        alive += size
        most = max(most, alive)
    return most


def four_images(folder):
    """Eight samples of four images."""
    path = folder / "a.png"
    Image.new("RGB", (128, 128), "red").save(path)
    images, box = (str(path),) * 4, (1, 2, 300, 400)
    return [
        GroundingSample(f"s{i}", "toy", images, "Find it.", box, chain="It.")
        for i in range(8)
    ]


def check_peak(measured, config, stage, layout, there):
    """Plan and measurement of a training within a quarter of each other. there: parts
    of the plan that lay in memory before the measurement."""
    made = cost.Plan(config, stage, layout, cost.CPU, 8)
    measured += sum(made.memory[part] for part in there)
    print(f"predicted {made.peak / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    assert made.peak == pytest.approx(measured, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tiny_peak_of_sft_is_predicted_within_a_quarter(tmp_path, checkpointing):
    options = {"max_steps": 2, "activation_checkpointing": checkpointing}
    options |= {"per_device_train_batch_size": 8, "disable_tqdm": True}
    config = changed(runs.load_scale("tiny"), sft=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        made = sft.build_trainer(config, tmp_path, four_images(tmp_path))
        tokens = max(made.train_dataset["length"])
        where = Layout("single", 1, tokens, 20, 256, tokens)
        check_peak(peak_of(made.train), config, "sft", where, ["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tiny_peak_of_grpo_is_predicted_within_a_quarter(tmp_path, checkpointing):
    """Replies as long as they may be, which is what a plan has to reckon with."""
    model, processor = models.load_for_inference({"name_or_path": "tiny"})
    models.add_lora(model, {"r": 32}).save_pretrained(tmp_path / "adapter")
    never = {"suppress_tokens": [processor.tokenizer.eos_token_id]}
    options = {"max_steps": 2, "activation_checkpointing": checkpointing}
    options |= {"per_device_train_batch_size": 32, "disable_tqdm": True}
    options |= {"max_completion_length": 48, "generation_kwargs": never}
    config = changed(runs.load_scale("tiny"), grpo=options)
    start, train = tmp_path / "adapter", four_images(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        made = grpo.build_trainer(config, tmp_path / "out", train, start)
        measured = peak_of(made.train)
    tokens = len(made.prompts[0].ids) + 48
    where = Layout("single", 1, tokens, 48, 256, tokens)
    check_peak(measured, config, "grpo", where, ["weights", "reference"])


# ---------------------------------------------------------------- checks


def test_missing_packages_are_named_with_a_way_out(full):
    config = changed(full, grpo={"use_vllm": True})
    checks = {c.name: c for c in planning.check_packages(config, "zero3")}
    for name, remedy in (
        ("flash_attn", "model.attn_implementation=sdpa"),
        ("vllm", "grpo.use_vllm=false"),
        ("deepspeed", "launch.strategy=fsdp2"),
    ):
        check = checks[f"package {name}"]
        assert check.ok or remedy in check.detail
    tiny = planning.check_packages(runs.load_scale("tiny"), "single")
    assert tiny == []


def test_a_full_disk_is_seen_before_the_run(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        assert planning.check_disk(disk / "runs" / "x", 900_000).ok
        check = planning.check_disk(disk / "runs" / "x", 2_000_000)
        assert not check.ok and "set RUN_DIR" in check.detail
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_taken_port_is_seen():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not planning.check_port(port, "port").ok
        assert planning.check_port(port, "vLLM server", taken=True).ok
    assert planning.check_port(port, "port").ok
    assert "start the server" in planning.check_port(port, "v", taken=True).detail


def test_exit_code_tells(capsys):
    def code(*arguments):
        return planning.main(arguments)

    assert code("full", "--account-only") == 0
    assert "hours are a model, not a measurement" in capsys.readouterr().out
    assert code("full", "--account-only", "--gpus", "2", "--gpu", "L4-24G") == 1
    assert "what lowers the peak, changes of the recipe last" in capsys.readouterr().out
    assert code("full", "--stage", "sft") == 1  # no data, no eight GPUs
    out = capsys.readouterr().out
    assert "stage1_cotsft.json is missing; make data" in out and "NO  GPUs" in out
    with pytest.raises(ValueError, match="did you mean 'H100-80G'"):
        code("full", "--gpu", "H100-80")


def test_layouts_that_cannot_be():
    with pytest.raises(ValueError, match="unknown strategy 'zero4'"):
        layout("zero4")
    assert cost.choose_strategy(1, "zero3") == "single"
    assert cost.choose_strategy(2, "single") == "ddp"


def test_predicted_beside_measured(full):
    made = plan(full)
    text = planning.compare(made, {"peak_bytes": 40e9, "seconds_per_update": 7.0})
    assert "40.000" in text and f"{made.peak / 1e9:.3f}" in text


def test_launch_options_and_the_constant_weight_are_checked(full):
    tiny = runs.load_scale("tiny")
    assert "launch" not in tiny
    assert runs.override(tiny, "launch.processes=2")["launch"] == {"processes": 2}
    with pytest.raises(ValueError, match="did you mean 'processes'"):
        runs.override(tiny, "launch.proceses=2")
    made = runs.override(runs.override(full, "grpo.weight=constant"), "grpo.constant=2")
    assert (made["grpo"]["weight"], made["grpo"]["constant"]) == ("constant", 2)


def test_what_a_training_took_is_read_from_its_folder(tmp_path):
    with pytest.raises(ValueError, match="no launched training was finished"):
        planning.read_measured(tmp_path)
    for rank, peak in enumerate((10, 30)):
        io.write_json(tmp_path / "launch" / f"rank-{rank}.json", {"peak_bytes": peak})
    summary = {"seconds": 20.0, "steps": 4}
    io.write_json(tmp_path / "summary.json", summary)
    expected = {"peak_bytes": 30, "seconds_per_update": 5.0, "longest_row": None}
    assert planning.read_measured(tmp_path) == expected

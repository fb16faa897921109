"""Loading, adapters, quantization and the count of parameters."""

import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from univg_nb import families, io, models
from univg_nb.__main__ import main as run_command
from univg_nb.base_model import architecture
from univg_nb.train.merge import write_merged

SENTENCES = [
    "Find the red cup in image 2. <think>In image 1 there is a lamp.</think>",
    "<answer>(10,20),(300,400)</answer> You are a helpful assistant.",
    "First output the thinking process in <think> </think> tags and then output.",
]
LORA = {"r": 4, "lora_alpha": 8}


def make_tiny(folder: Path) -> Path:
    """The shipped model's architecture with random weights and a small vocabulary."""
    tokenizer = architecture.train_tokenizer(SENTENCES)
    architecture.build_model(tokenizer, seed=0).save_pretrained(folder)
    architecture.build_processor(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return {"name_or_path": str(make_tiny(tmp_path_factory.mktemp("tiny")))}


@pytest.fixture(scope="module")
def batch():
    return {"input_ids": torch.arange(40).view(2, 20) + 20}


def test_resolve():
    assert models.resolve_model_path("tiny") == str(models.ASSETS)
    assert (
        models.resolve_model_path("Qwen/Qwen2-VL-7B-Instruct")
        == "Qwen/Qwen2-VL-7B-Instruct"
    )


def test_released_defect_T4_pixel_limits_take_effect(tiny):
    """Set on the processor they had no effect (docs/paper_facts.md#t4)."""
    picture = torch.zeros(3, 256, 256, dtype=torch.uint8)
    for max_pixels, tokens in ((4096, 16), (1024, 4)):
        processor = models.load_processor({**tiny, "max_pixels": max_pixels})
        out = processor.image_processor(images=[picture], return_tensors="pt")
        assert out["image_grid_thw"].prod() // 4 == tokens
        assert processor.image_processor.size["shortest_edge"] == 256
    with warnings.catch_warnings():  # a reader would see one in every cell
        warnings.simplefilter("error")
        processor(images=[Image.new("RGB", (64, 64))], text=["<|image_pad|>"])
    with pytest.raises(ValueError, match="min_pixels = 9000"):
        models.load_processor({**tiny, "min_pixels": 9000})


def test_inference_has_no_gradient_and_training_has(tiny):
    model, _ = models.load_for_inference(tiny)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    model, _ = models.load_for_training(tiny)
    frozen = models.freeze_vision(model)
    account = models.count_parameters(model)
    assert account["vision"] == {
        "parameters": frozen,
        "trainable": 0,
        "bytes": 4 * frozen,
    }
    assert account["total"]["trainable"] == account["language"]["parameters"]


def test_lora_is_on_every_language_linear_and_nowhere_else(tiny):
    model, _ = models.load_for_training(tiny)
    linears = set(models.find_language_linears(model))
    assert len(linears) == 4 * 7
    model = models.add_lora(model, LORA)
    adapted = {
        name.removeprefix("base_model.model.").split(".lora_A")[0]
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }
    assert adapted == linears
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_old_names_inside_the_libraries_give_no_warning(tiny, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = models.add_lora(models.load_for_inference(tiny)[0], LORA)
        model.save_pretrained(tmp_path)
        models.load_for_inference(tiny, tmp_path)


def test_weights_hash_survives_lora_and_sees_a_change(tiny):
    model, _ = models.load_for_inference(tiny)
    before = models.hash_weights(model)
    model = models.add_lora(model, LORA)
    assert models.hash_weights(model) == before
    adapter = models.hash_weights(model, adapter=True)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(1.0)
    assert models.hash_weights(model) == before
    assert models.hash_weights(model, adapter=True) != adapter
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lm_head" in n or "embed" in n)[
            0, 0
        ] += 1.0
    assert models.hash_weights(model) != before


def saved_adapter(tiny, folder: Path) -> Path:
    model = models.add_lora(models.load_for_inference(tiny)[0], LORA)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


def test_merged_adapter_gives_the_same_logits(tiny, batch, tmp_path):
    folder = saved_adapter(tiny, tmp_path)
    base, _ = models.load_for_inference(tiny)
    model = models.load_for_training(tiny, folder)[0].eval()
    merged, _ = models.load_for_inference(tiny, folder)
    assert isinstance(model, PeftModel)
    assert type(merged) is Qwen2VLForConditionalGeneration
    assert not merged.training
    assert not any(p.requires_grad for p in merged.parameters())
    with torch.no_grad():
        a, b, c = (m(**batch).logits for m in (base, model, merged))
    assert (a - b).abs().max() > 0.1
    assert (b - c).abs().max() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    plain = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(plain.eval()(**batch).logits, c)


def test_loading_mistakes_are_named(tiny, tmp_path):
    with pytest.raises(ValueError, match="neither adapter_config"):
        models.load_for_inference(tiny, tmp_path)
    folder = saved_adapter(tiny, tmp_path)
    with pytest.raises(ValueError, match="4-bit weights take one adapter"):
        models.load_for_inference(tiny, [folder, folder], quantize="nf4")


def trained_on(section: dict, folder: Path, adapters=()) -> Path:
    """Say in an adapter's folder what it was trained on, as a training does."""
    model, _ = models.load_for_inference(section, adapters)
    io.write_json(folder / models.BASE_FILE, models.sample_base(model))
    return folder


def test_adapters_are_merged_in_order_and_onto_a_whole_model(tiny, batch, tmp_path):
    first = trained_on(tiny, saved_adapter(tiny, tmp_path / "first"))
    second = saved_adapter(tiny, tmp_path / "second")
    trained_on(tiny, second, first)
    once, _ = models.load_for_inference(tiny, first)
    once.save_pretrained(tmp_path / "whole")
    twice, _ = models.load_for_inference(tiny, [first, second])
    on_whole, _ = models.load_for_inference(tiny, [tmp_path / "whole", second])
    with torch.no_grad():
        a, b, c = (m(**batch).logits for m in (once, twice, on_whole))
    assert torch.equal(b, c)
    assert (a - b).abs().max() > 0.1
    with pytest.raises(ValueError, match="is a whole model, which replaces"):
        models.load_for_inference(tiny, [first, tmp_path / "whole"])


def test_an_adapter_that_contains_the_one_before_is_refused(tiny, tmp_path):
    """Stage 2 trains the adapter of stage 1 further: both are of the same base."""
    sft = saved_adapter(tiny, tmp_path / "sft")
    grpo = shutil.copytree(sft, tmp_path / "grpo")
    with pytest.raises(ValueError, match=r"grpo: nothing says .* give the last one"):
        models.load_for_inference(tiny, [sft, grpo])
    for folder in (sft, grpo):
        trained_on(tiny, folder)
    for order in ([sft, grpo], [grpo, sft]):
        found = rf"{order[1].name}: was trained on other weights .* give the last one"
        with pytest.raises(ValueError, match=found):
            models.load_for_inference(tiny, order)
    models.load_for_inference(tiny, grpo)


def test_an_adapter_goes_on_its_own_base_only(tiny, tmp_path):
    """Whatever the dtype; the name of the base may differ, as when folders move."""
    folder = trained_on(tiny, saved_adapter(tiny, tmp_path / "adapter"))
    moved = shutil.copytree(tiny["name_or_path"], tmp_path / "moved")
    for options in ({}, {"dtype": "bfloat16"}, {"dtype": "float16"}):
        models.load_for_inference({"name_or_path": str(moved), **options}, folder)
    models.load_for_inference(tiny, folder, quantize="nf4")
    tokenizer = models.load_processor(tiny).tokenizer
    other = architecture.build_model(tokenizer, seed=1)
    other.save_pretrained(moved)
    for load in (models.load_for_inference, models.load_for_training):
        for quantize in (None, "nf4"):
            with pytest.raises(ValueError, match=r"other weights .*Give its own base"):
                load({"name_or_path": str(moved)}, folder, quantize)


ADAPTER_FILE = "adapter_model.safetensors"
BROKEN_ADAPTERS = {
    # huggingface/peft warns of the one and says nothing of the other
    "all renamed": (lambda k, v: (k.replace("layers", "blocks"), v), "56 weights of"),
    "one too many": (lambda k, v: (k.replace("layers.3", "layers.4"), v), "14 weights"),
    "rank": (lambda k, v: (k, torch.cat([v, v], int("lora_B" in k))), "size mismatch"),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(tiny, tmp_path, name):
    change, message = BROKEN_ADAPTERS[name]
    folder = saved_adapter(tiny, tmp_path)
    weights = load_file(folder / ADAPTER_FILE)
    weights = dict(change(key, value) for key, value in weights.items())
    save_file(weights, folder / ADAPTER_FILE)
    for load in (models.load_for_inference, models.load_for_training):
        with pytest.raises(ValueError, match=message) as caught:
            load(tiny, folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_of_more_layers_or_with_gaps_is_refused(tiny, tmp_path):
    folder = saved_adapter(tiny, tmp_path)
    weights = load_file(folder / ADAPTER_FILE)
    kept = {key: value for key, value in weights.items() if "layers.2" not in key}
    save_file(kept, folder / ADAPTER_FILE)
    with pytest.raises(ValueError, match=r"14 weights missing in the adapter of .*lay"):
        models.load_for_inference(tiny, folder)
    more = {k.replace("layers.2", "layers.7"): v.clone() for k, v in weights.items()}
    save_file(weights | more, folder / ADAPTER_FILE)
    base = re.escape(tiny["name_or_path"])
    with pytest.raises(ValueError, match=rf"14 weights .* fit none of {base}.*\.7\."):
        models.load_for_inference(tiny, folder)
    data = (folder / ADAPTER_FILE).read_bytes()
    (folder / ADAPTER_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cannot be loaded .*whole"):
        models.load_for_inference(tiny, folder)
    config = io.read_json(folder / "adapter_config.json")
    io.write_json(folder / "adapter_config.json", config | {"peft_type": "IA3"})
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="a IA3 adapter"):
        models.load_for_inference(tiny, folder)
    (folder / ADAPTER_FILE).unlink()
    with pytest.raises(ValueError, match=f"no {ADAPTER_FILE} in it"):
        models.load_for_inference(tiny, folder)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "qkv", "fc1"], r".*(qkv|o_proj)"]
)
def test_lora_leaves_out_the_frozen_tower(tiny, targets):
    model, _ = models.load_for_training(tiny)
    language = set(models.find_language_linears(model))
    models.freeze_vision(model)
    model = models.add_lora(model, {**LORA, "target_modules": targets})
    names = {n.split(".lora_")[0] for n, _ in model.named_parameters() if "lora_" in n}
    found = {name.removeprefix("base_model.model.") for name in names}
    assert found and found <= language
    assert targets != "all-linear" or found == language


def test_nothing_else_is_trained_in_the_frozen_tower(tiny):
    for lora in (
        {"target_modules": ["qkv", "q_proj"], "exclude_modules": ["k_proj"]},
        {"modules_to_save": ["merger"]},
    ):
        model, _ = models.load_for_training(tiny)
        models.freeze_vision(model)
        with pytest.raises(ValueError, match=r"sft\.lora: \d+ weights .* frozen"):
            models.add_lora(model, {**LORA, **lora})


# ---------------------------------------------------------------- folders


def copy_of(tiny: dict, folder: Path, **changes) -> Path:
    """The folder of `tiny`, with values of its config.json changed."""
    shutil.copytree(tiny["name_or_path"], folder)
    config = io.read_json(folder / "config.json")
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        config[section] = config[section] | {inner: value} if inner else value
    io.write_json(folder / "config.json", config)
    return folder


def depth(layers: int) -> dict:
    kinds = {"text_config__layer_types": ["full_attention"] * layers}
    return kinds | {"text_config__num_hidden_layers": layers}


WRONG_MODELS = {
    "deeper": (depth(5), "12 weights .* are missing"),
    "cut": (depth(3), "12 weights .* not in its archit"),
    "wider": ({"text_config__intermediate_size": 640}, "12 weights have other shapes"),
    "vocabulary": ({"text_config__vocab_size": 1100}, "other shapes .*embed_tokens"),
    "image token": ({"image_token_id": 3}, "image token .* in the processor, 3 in the"),
    "patches": (
        {"vision_config__spatial_merge_size": 4},
        "shapes|merged patch",
    ),
    "text only": ({"model_type": "qwen2"}, r"cannot be loaded \("),
    "unknown": ({"model_type": "no_such_model"}, r"cannot be loaded \("),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_a_model_that_is_not_what_its_folder_says_is_refused(tiny, tmp_path, name):
    changes, message = WRONG_MODELS[name]
    folder = copy_of(tiny, tmp_path / "model", **changes)
    if name == "text only":  # as saved by a training of the language model alone
        for path in folder.glob("*processor*"):
            path.unlink()
    for load in (models.load_for_inference, models.load_for_training):
        with pytest.raises(ValueError, match=message) as caught:
            load({"name_or_path": str(folder)})
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_broken_files_of_a_model_are_named(tiny, tmp_path):
    section = {"name_or_path": str(copy_of(tiny, tmp_path / "model"))}
    folder = tmp_path / "model"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match="model: cannot be loaded") as caught:
            models.load_for_inference(section)
        assert "\n" not in str(caught.value)
        (folder / name).write_bytes(data)
        models.load_for_inference(section)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model: cannot be loaded"):
        models.load_for_inference(section)


def test_a_processor_of_another_model_is_refused(tiny, tmp_path):
    folder = copy_of(tiny, tmp_path / "model")
    tokenizer = architecture.train_tokenizer([*SENTENCES, "xylophone zebra quartz" * 9])
    processor = architecture.build_processor(tokenizer)
    processor.image_processor.patch_size = 14
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match="patch size 14 in the processor, 8 in the"):
        models.load_for_inference({"name_or_path": str(folder)})
    shutil.rmtree(folder)
    copy_of(tiny, folder)
    for path in folder.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("<|vision_start|>", "<|picture|>"), "utf-8")
    with pytest.raises(ValueError, match=r"model: its .*no token <\|vision_start\|>"):
        models.load_for_inference({"name_or_path": str(folder)})


def test_a_model_without_this_vision_tower_is_refused(tiny, tmp_path):
    folder = copy_of(tiny, tmp_path / "model")
    text = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 32}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 1024}
    text |= {"num_key_value_heads": 2}
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_index=5)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"'llava' does not work: .* take a Qwen2-VL"):
        models.load_for_inference({"name_or_path": str(folder)})


def test_weights_that_are_stored_in_four_bits_are_refused(tiny, tmp_path):
    folder = copy_of(tiny, tmp_path / "model")
    models.load_for_inference(tiny, quantize="nf4")[0].save_pretrained(folder)
    with pytest.raises(ValueError, match="stored quantized"):
        models.load_for_inference({"name_or_path": str(folder)})


@pytest.mark.parametrize(
    "name", ["nowhere", "./no/where", "no/where/at/all", "a/b", "./README.md"]
)
def test_a_folder_that_is_not_there_is_named(tiny, tmp_path, name, capsys):
    """The hub's library would speak of alphanumeric characters in a Repo id."""
    section = {"name_or_path": name}
    for load in (models.load_processor, models.load_for_inference):
        with pytest.raises(
            ValueError, match=rf"^{name}: .*no (such )?folder"
        ) as caught:
            load(section)
        assert "alphanumeric" not in str(caught.value)
    adapter = saved_adapter(tiny, tmp_path / "sft_lora" / "adapter")
    for adapters in ([name], [adapter, name]):
        with pytest.raises(ValueError, match=f"^{name}: no such folder; give"):
            models.load_for_inference(tiny, adapters)
    with pytest.raises(ValueError, match=f"here {adapter}$"):
        models.load_for_training(tiny, adapter.parent)
    with pytest.raises(ValueError, match="is an adapter; give its base"):
        models.load_for_inference({"name_or_path": str(adapter)})
    given = ["--scale", "tiny", "--adapter", str(adapter), "--out", str(tmp_path / "m")]
    assert run_command(["merge", "--model", name, *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {name}: ") and not (tmp_path / "m").exists()
    assert run_command(["plan", "tiny", "--set", f"model.name_or_path={name}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {name}: ")


# ---------------------------------------------------------------- how boxes are written


def test_the_family_says_how_boxes_are_written():
    assert families.box_convention(Qwen2_5_VLConfig()) == "pixels"
    assert families.box_convention(Qwen3VLConfig()) == "thousandths"
    own = Qwen2_5_VLConfig(boxes="thousandths")
    assert families.box_convention(own) == "thousandths"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen3_5Config, "recurrent, and no mask"),
        (Qwen3VLMoeConfig, "treat experts in ways"),
        (LlavaConfig, "images and boxes are not known"),
    ],
)
def test_other_families_are_refused_with_the_reason(tmp_path, config, reason):
    """By config.json alone, before weights are looked for."""
    config().save_pretrained(tmp_path)
    section = {"name_or_path": str(tmp_path)}
    with pytest.raises(ValueError, match=f"{reason}.*dense Qwen3-VL"):
        models.load_config(section)
    shutil.copytree(models.ASSETS, tmp_path, dirs_exist_ok=True)
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        models.load_for_training(section)


@pytest.fixture(scope="module")
def qwen2_5(tiny, tmp_path_factory):
    """A small Qwen2.5-VL; its family answers in pixels of the resized image."""
    folder = copy_of(tiny, tmp_path_factory.mktemp("qwen2_5") / "model")
    own = io.read_json(folder / "config.json")
    tower = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    tower |= {"patch_size": 8, "window_size": 32, "fullatt_block_indexes": [0]}
    tower |= {"out_hidden_size": own["text_config"]["hidden_size"]}
    text = own["text_config"] | {"model_type": "qwen2_5_vl_text"}
    tokens = {key: value for key, value in own.items() if key.endswith("_token_id")}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=tower, **tokens)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return {"name_or_path": str(folder)}


def units(section, adapters=()) -> tuple[str, str]:
    """The units that a model is evaluated and trained in."""
    loaded = models.load_for_inference(section, adapters)[0]
    trained = models.load_for_training(section, adapters or None)[0]
    configs = loaded.config, models.get_base_model(trained).config
    return tuple(map(families.box_convention, configs))


def test_an_adapter_tells_how_boxes_are_written(qwen2_5, tmp_path):
    """What was trained to another unit than its family's is read in that one."""
    pixels, thousandths = ("pixels",) * 2, ("thousandths",) * 2
    assert units(qwen2_5) == pixels
    assert units({**qwen2_5, "boxes": "thousandths"}) == thousandths
    assert units({"name_or_path": "tiny", "boxes": "pixels"}) == pixels
    adapter = saved_adapter(qwen2_5, tmp_path / "adapter")
    assert units(qwen2_5, adapter) == pixels  # of another tool, which says nothing
    for section, expected in (
        (qwen2_5, pixels),
        ({**qwen2_5, "boxes": "thousandths"}, thousandths),
    ):
        model, _ = models.load_for_training(section)
        io.write_json(adapter / models.BASE_FILE, models.sample_base(model))
        assert units(qwen2_5, adapter) == units(section, adapter) == expected
    with pytest.raises(ValueError, match=r"boxes = pixels, but .* write thousandths"):
        models.load_for_inference({**qwen2_5, "boxes": "pixels"}, adapter)
    merged = write_merged(qwen2_5, [adapter], tmp_path / "merged")
    assert units({"name_or_path": str(merged)}) == thousandths
    with pytest.raises(ValueError, match=r"merged was trained to write thousandths"):
        models.load_config({"name_or_path": str(merged), "boxes": "pixels"})
    assert families.box_convention(models.load_config(qwen2_5)) == "pixels"
    plain, _ = models.load_for_inference({"name_or_path": "tiny"})
    assert not hasattr(plain.config, "boxes")  # saved as it always was
    assert "boxes" not in models.sample_base(plain)


def test_pixel_limits_keep_their_meaning_in_tokens(tiny, tmp_path):
    folder = copy_of(tiny, tmp_path / "model")
    section = {"name_or_path": str(folder), "min_pixels": 3136, "max_pixels": 401_408}
    for patch, tokens in ((14, 512), (16, 512), (8, 1568)):
        processor = models.load_processor({"name_or_path": str(folder)})
        processor.image_processor.patch_size = patch
        processor.save_pretrained(folder)
        size = models.load_processor(section).image_processor.size
        assert size["longest_edge"] == tokens * (2 * patch) ** 2
        assert size["shortest_edge"] >= 3136


def test_an_adapter_stays_on_four_bit_weights(tiny, tmp_path):
    model, _ = models.load_for_inference(
        tiny, saved_adapter(tiny, tmp_path), quantize="nf4"
    )
    assert isinstance(model, PeftModel) and not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_nf4_on_cpu_quantizes_the_language_model_only(tiny, batch):
    full, _ = models.load_for_inference(tiny)
    model, _ = models.load_for_inference(tiny, quantize="nf4")
    quantized = {
        name for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"
    }
    assert quantized == set(models.find_language_linears(full))
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.quant_state.quant_type == "nf4" and weight.quant_state.nested
    assert model.lm_head.weight.dtype == torch.float32
    a, b = models.count_parameters(full), models.count_parameters(model)
    for part in ("vision", "language", "total"):
        assert a[part]["parameters"] == b[part]["parameters"]
    assert b["vision"]["bytes"] == a["vision"]["bytes"]
    linear = sum(m.weight.numel() for m in models_linears(full))
    saved = a["language"]["bytes"] - b["language"]["bytes"]
    assert saved == pytest.approx(linear * 3.5, rel=0.02)  # 4 bytes become about half
    with torch.no_grad():
        gap = (full(**batch).logits - model(**batch).logits).abs()
    assert 0 < gap.mean() < full(**batch).logits.std()


def models_linears(model):
    return [model.get_submodule(name) for name in models.find_language_linears(model)]


def test_a_qlora_adapter_merges_into_the_weights_before_quantization(
    tiny, batch, tmp_path
):
    folder = saved_adapter(tiny, tmp_path)
    model, _ = models.load_for_training(tiny, folder, quantize="nf4")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    merged, _ = models.load_for_inference(tiny, folder)
    assert merged.dtype == torch.float32
    with torch.no_grad():
        gap = (model.eval()(**batch).logits - merged(**batch).logits).abs().mean()
    assert gap < merged(**batch).logits.std()


def test_parameters_are_counted_on_the_meta_device(tiny):
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(tiny["name_or_path"])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    real, _ = models.load_for_training(tiny)
    assert models.count_parameters(model) == models.count_parameters(real)


def test_a_weight_sharded_by_zero3_counts_whole():
    """ZeRO-3 leaves an empty parameter that knows its size; see also test_deepspeed."""
    parameter = torch.nn.Parameter(torch.empty(0))
    assert models.count_entries(parameter) == 0
    parameter.ds_numel = 12
    assert models.count_entries(parameter) == 12

"""Loading, adapters, quantization and the count of parameters."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from univg_nb import models
from univg_nb.base_model import architecture

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


def test_adapters_are_merged_in_order_and_onto_a_whole_model(tiny, batch, tmp_path):
    folder = saved_adapter(tiny, tmp_path / "adapter")
    once, _ = models.load_for_inference(tiny, folder)
    once.save_pretrained(tmp_path / "whole")
    twice, _ = models.load_for_inference(tiny, [folder, folder])
    on_whole, _ = models.load_for_inference(tiny, [tmp_path / "whole", folder])
    with torch.no_grad():
        a, b, c = (m(**batch).logits for m in (once, twice, on_whole))
    assert torch.equal(b, c)
    assert (a - b).abs().max() > 0.1


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

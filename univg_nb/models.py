"""Models: loading for training and for inference, adapters, and what is trained.

A model is a plain `Qwen2VLForConditionalGeneration`: `model.visual` (vision tower and
merger, frozen in both stages of the paper), `model.language_model` and `lm_head`. The
name "tiny" stands for the model that ships with this package.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled

ASSETS = Path(__file__).parent / "assets" / "tiny-qwen2-vl"

# Every linear layer of the language model, and none of the vision tower, whose layers
# have other names but would be matched by the short form "all-linear".
LANGUAGE_LINEARS = (
    r".*\blanguage_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)
# bitsandbytes takes prefixes of the full module name; "visual" alone matches nothing.
NOT_QUANTIZED = ["model.visual", "lm_head"]

Quantization = Literal["nf4"]


def resolve_model_path(name_or_path: str) -> str:
    """Return the folder of the shipped model for "tiny", any other name unchanged."""
    return str(ASSETS) if name_or_path == "tiny" else name_or_path


def get_device() -> torch.device:
    """Return this process's GPU, else the CPU (bitsandbytes has no NF4 for MPS)."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def ignore_rename_warnings() -> Iterator[None]:
    """Ignore warnings that PEFT and TRL use an old name of activation checkpointing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        yield


# ---------------------------------------------------------------- loading


def load_processor(model_section: Mapping[str, Any]) -> ProcessorMixin:
    """Load the processor, with the pixel limits of a scale's `model` section.

    They bound the pixels of an image after resizing, both inclusive. On the processor
    itself they have no effect (docs/paper_facts.md#t4). Raises ValueError if min_pixels
    is above max_pixels.
    """
    name = resolve_model_path(model_section["name_or_path"])
    processor = AutoProcessor.from_pretrained(name)
    images = processor.image_processor
    size = dict(images.size)
    for edge, key in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        size[edge] = model_section.get(key) or size[edge]
    if size["shortest_edge"] > size["longest_edge"]:
        raise ValueError(
            f"model.min_pixels = {size['shortest_edge']} is larger than "
            f"model.max_pixels = {size['longest_edge']}; swap or widen them"
        )
    images.size = type(images.size)(**size)
    return processor


def is_adapter(folder: str | Path) -> bool:
    """Return True for a LoRA adapter, False for a whole model, or raise ValueError."""
    found = (Path(folder) / "adapter_config.json").is_file()
    if not found and not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{folder}: neither adapter_config.json nor config.json in it; "
            "give the adapter folder of a finished training"
        )
    return found


def load_for_training(
    model_section: Mapping[str, Any],
    adapter: str | Path | None = None,
    quantize: Quantization | None = None,
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """Load a model whose weights, or whose adapter, will be trained.

    The trainer moves it to its device. Without `adapter` and `quantize`, every weight
    requires a gradient.

    Args:
        model_section: the `model` section of a scale.
        adapter: folder of a LoRA adapter to train further, or of a fully fine-tuned
            model, which replaces the base weights.
        quantize: "nf4" stores the language model's linear layers in 4 bits, frozen.
    """
    lora = adapter is not None and is_adapter(adapter)
    model = _load_weights(model_section, None if lora else adapter, quantize)
    model.requires_grad_(quantize is None)
    if lora:
        with ignore_rename_warnings():
            model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    return model.train(), load_processor(model_section)


def load_for_inference(
    model_section: Mapping[str, Any],
    adapters: str | Path | Sequence[str | Path] = (),
    quantize: Quantization | None = None,
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """Load a model to generate with, on `get_device()` and in evaluation mode.

    Adapters are merged into the weights, which makes generation faster; those of QLoRA
    into the weights before quantization. On 4-bit weights the adapter stays separate.

    Args:
        model_section: the `model` section of a scale.
        adapters: folders of LoRA adapters, each trained on top of the one before it.
            The first may be a fully fine-tuned model, which replaces the base weights.
        quantize: "nf4" stores the language model's linear layers in 4 bits. They take
            one adapter; several raise ValueError.
    """
    paths = [adapters] if isinstance(adapters, (str, Path)) else list(adapters)
    whole = paths.pop(0) if paths and not is_adapter(paths[0]) else None
    if quantize and len(paths) > 1:
        raise ValueError("4-bit weights take one adapter: they cannot be merged")
    model = _load_weights(model_section, whole, quantize)
    if quantize is None:
        model.to(get_device())
    for path in paths:
        with ignore_rename_warnings():
            model = PeftModel.from_pretrained(model, str(path))
        if quantize is None:
            model = model.merge_and_unload()
    return model.requires_grad_(False).eval(), load_processor(model_section)


def _load_weights(
    model_section: Mapping[str, Any],
    folder: str | Path | None,
    quantize: Quantization | None,
) -> PreTrainedModel:
    """Load the base weights, or the fully fine-tuned ones in `folder`."""
    source = resolve_model_path(model_section["name_or_path"])
    # The shipped and small models train in fp32; only a GPU makes bf16 worth it.
    dtype = getattr(torch, model_section.get("dtype", "float32"))
    options: dict[str, Any] = {}
    if quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # The tower feeds every layer above; lm_head is tied to the embedding.
            llm_int8_skip_modules=NOT_QUANTIZED,
        )
        options["device_map"] = {"": get_device()}
    if get_device().type == "cpu":
        # Otherwise SDPA copies keys and values for every query head.
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    return AutoModelForImageTextToText.from_pretrained(
        source if folder is None else str(folder),
        dtype=dtype,
        attn_implementation=model_section.get("attn_implementation", "sdpa"),
        **options,
    )


# ---------------------------------------------------------------- adapters, parameters


def add_lora(
    model: PreTrainedModel, lora: Mapping[str, Any] | None = None
) -> PeftModel:
    """Add new LoRA matrices to every linear layer of the language model.

    They are drawn from torch's global generator: seed it first. `lora` holds options of
    PEFT's LoraConfig (r, lora_alpha, lora_dropout, ...).
    """
    options = {"target_modules": LANGUAGE_LINEARS, "task_type": "CAUSAL_LM"}
    with ignore_rename_warnings():
        return get_peft_model(model, LoraConfig(**{**options, **(lora or {})}))


def find_language_linears(model: torch.nn.Module) -> list[str]:
    """Return the names of the language model's linear layers, which LoRA adapts."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model." in name
    ]


def freeze_vision(model: torch.nn.Module) -> int:
    """Freeze vision tower and merger; return the number of parameters frozen."""
    visual = get_base_model(model).model.visual.requires_grad_(False)
    return sum(map(count_entries, visual.parameters()))


def get_base_model(model: torch.nn.Module) -> PreTrainedModel:
    """Return the transformers model below an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _of_adapter(name: str) -> bool:
    return "lora_" in name or ".modules_to_save." in name


def count_parameters(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Count parameters, trainable parameters and stored bytes of each part of a model.

    A 4-bit weight counts with its true number of parameters and its packed bytes with
    scales; a weight sharded by ZeRO-3 counts whole.

    Returns:
        {part: {"parameters", "trainable", "bytes"}} for the parts vision, language
        (embedding, layers and lm_head), adapter and total.
    """
    parts = ("vision", "language", "adapter", "total")
    table = {part: {"parameters": 0, "trainable": 0, "bytes": 0} for part in parts}
    for name, parameter in model.named_parameters():
        count = count_entries(parameter)
        size = count * parameter.element_size()
        state = getattr(parameter, "quant_state", None)  # bitsandbytes' Params4bit
        if state is not None:
            count = state.shape.numel()
            scales = state.as_dict(packed=True).values()
            size += sum(v.nbytes for v in scales if isinstance(v, torch.Tensor))
        part = "vision" if "visual." in name else "language"
        part = "adapter" if _of_adapter(name) else part
        for row in (table[part], table["total"]):
            row["parameters"] += count
            row["trainable"] += count if parameter.requires_grad else 0
            row["bytes"] += size
    return table


def hash_weights(model: torch.nn.Module, adapter: bool = False) -> str:
    """Return 16 hex digits over the base weights, or over those that PEFT added.

    Names are those of the base model, so adding LoRA does not change its hash.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if _of_adapter(name) != adapter:
            continue
        name = name.removeprefix("base_model.model.")
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- sharded by ZeRO-3
# Each process holds a slice of every parameter, and the parameter itself is an empty
# tensor, except inside the trainer's forward pass, where DeepSpeed gathers them.


def count_entries(parameter: torch.nn.Parameter) -> int:
    """Return the number of entries of a parameter, on all processes together."""
    return getattr(parameter, "ds_numel", parameter.numel())


def gather_weights(module: torch.nn.Module) -> AbstractContextManager[Any]:
    """Give every process all weights of `module` inside the `with` block, to read.

    All processes must enter together. Without ZeRO-3 nothing happens.
    """
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    from deepspeed import zero  # optional, installed when ZeRO-3 is in use

    return zero.GatheredParameters(list(module.parameters()))

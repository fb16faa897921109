"""Models at any scale: base or checkpoint, NF4, LoRA, merging, and what is trained.

A model is a plain `Qwen2VLForConditionalGeneration`: `model.visual` (vision tower and
merger, frozen in both stages of the paper, PF sec. 3), `model.language_model`,
`lm_head`. "tiny" names the model shipped with this package.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

from univg_nb.train.final_norm import load_adapter_with_norm

# DOC of zero3:
# """Weights that DeepSpeed's ZeRO-3 has cut over the processes.

# Between the loading of a model and the first update every process holds a slice of each
# parameter, and the parameter itself is an empty tensor. Inside the trainer's forward
# pass DeepSpeed puts them together, module by module; before it, nobody does.
# """

ASSETS = Path(__file__).parent / "assets" / "tiny-qwen2-vl"

# Every linear layer of the language model, and none of the vision tower, whose layers
# have other names but would be matched by the short form "all-linear".
LANGUAGE_LINEARS = (
    r".*\blanguage_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)
# bitsandbytes takes prefixes of the full module name; "visual" alone matches nothing.
NOT_QUANTIZED = ["model.visual", "lm_head"]


def resolve(name_or_path: str) -> str:
    """ "tiny" -> the shipped model's folder; a path or a hub name unchanged."""
    return str(ASSETS) if name_or_path == "tiny" else name_or_path


def device() -> torch.device:
    """This process's GPU (its LOCAL_RANK under torchrun or accelerate), else the CPU.

    Apple's MPS is left out: bitsandbytes has no NF4 there, and the tiny model gains
    nothing from it.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def renamed_options() -> Iterator[None]:
    """Inside, no warning that PEFT and TRL still ask for gradient checkpointing by the
    name it had before transformers called it activation checkpointing."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`(is_)?gradient_checkpointing", FutureWarning
        )
        yield


def load_processor(model_cfg: Mapping[str, Any]) -> ProcessorMixin:
    """The processor, with min_pixels and max_pixels set where they take effect.

    They are pixels of one image after resizing, both bounds inclusive. They belong on
    the image processor: on the processor itself they do nothing (PF sec. 9, T4).
    """
    processor = AutoProcessor.from_pretrained(resolve(model_cfg["name_or_path"]))
    image_processor = processor.image_processor
    bounds = {
        "shortest_edge": model_cfg.get("min_pixels"),
        "longest_edge": model_cfg.get("max_pixels"),
    }
    size = dict(image_processor.size)
    size.update({key: value for key, value in bounds.items() if value is not None})
    if size["shortest_edge"] > size["longest_edge"]:
        raise ValueError(
            f"model.min_pixels = {size['shortest_edge']} is larger than "
            f"model.max_pixels = {size['longest_edge']}; swap or widen them"
        )
    image_processor.size = type(image_processor.size)(**size)
    return processor


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's storage: 4-bit NormalFloat with double quantisation, computing in dtype.

    Vision tower and lm_head keep their precision: the first feeds every layer above,
    the second is tied to the embedding.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=NOT_QUANTIZED,
    )


def load(
    model_cfg: Mapping[str, Any],
    adapter_path: str | Path | None = None,
    trainable: bool = False,
    quantize: Literal["nf4"] | None = None,
    merge: bool = False,
    train_norm: bool = False,
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """Load (model, processor) as the scale's `model` section says.

    adapter_path: a PEFT adapter folder put on top, or a whole model saved by full
        fine-tuning, which then takes the place of the base weights.
    trainable: the adapter goes on training (otherwise nothing requires a gradient).
    quantize: "nf4" stores the language model's linear layers in 4 bits.
    merge: fold the adapter into the weights: a plain model, faster to generate with.
        After QLoRA, load without `quantize` and merge: into the unrounded base.
    train_norm: with `trainable`, a LoRA adapter also holds a trained copy of the last
        norm (final_norm); a whole model has it among its weights.
    """
    if merge and (quantize or trainable):
        raise ValueError(
            "merge=True folds the adapter into unrounded weights for inference; "
            "call load() without quantize and trainable"
        )
    if train_norm and not trainable:
        raise ValueError(
            "train_norm=True is for training; a saved adapter brings its norm along: "
            "call load() without train_norm, or with trainable=True"
        )
    source = resolve(model_cfg["name_or_path"])
    is_adapter = False
    if adapter_path is not None:
        is_adapter = (Path(adapter_path) / "adapter_config.json").is_file()
        if not is_adapter and not (Path(adapter_path) / "config.json").is_file():
            raise ValueError(
                f"{adapter_path}: neither adapter_config.json nor config.json in it; "
                "give the adapter folder of a finished training"
            )
        source = source if is_adapter else str(adapter_path)
    # The shipped and small models train in fp32; only a GPU makes bf16 worth it.
    dtype = getattr(torch, model_cfg.get("dtype", "float32"))
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": model_cfg.get("attn_implementation", "sdpa"),
    }
    if quantize == "nf4":
        options["quantization_config"] = nf4_config(dtype)
        options["device_map"] = {"": device()}
    if device().type == "cpu":  # else each query head gets its own copy of keys, values
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    model = AutoModelForImageTextToText.from_pretrained(source, **options)
    if quantize is None and not trainable:
        model.to(device())  # in training, the trainer (DDP, ZeRO, FSDP) places it
    model.requires_grad_(trainable and quantize is None)
    if is_adapter:
        with renamed_options():
            if train_norm:
                model = load_adapter_with_norm(model, adapter_path)
            else:
                model = PeftModel.from_pretrained(
                    model, adapter_path, is_trainable=trainable
                )
        if merge:
            model = model.merge_and_unload()
    return model.train(trainable), load_processor(model_cfg)


def add_lora(
    model: PreTrainedModel, lora: Mapping[str, Any] | None = None
) -> PeftModel:
    """Put new LoRA matrices on every linear layer of the language model.

    lora: options of PEFT's LoraConfig (r, lora_alpha, lora_dropout, ...). The random
    numbers come from torch's global generator: seed it first.
    """
    options = {"target_modules": LANGUAGE_LINEARS, "task_type": "CAUSAL_LM"}
    with renamed_options():
        return get_peft_model(model, LoraConfig(**{**options, **(lora or {})}))


def language_linears(model: torch.nn.Module) -> list[str]:
    """Full names of the linear layers LoRA adapts: those of the language model."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model." in name
    ]


def freeze_vision(model: torch.nn.Module) -> int:
    """Freeze vision tower and merger; the number of parameters frozen."""
    frozen = 0
    for name, parameter in model.named_parameters():
        if "visual." in name:
            parameter.requires_grad_(False)
            frozen += entries(parameter)
    assert frozen, "no parameter has 'visual.' in its name: not a Qwen2-VL"
    return frozen


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model below an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _of_adapter(name: str) -> bool:
    """Whether a parameter is PEFT's: a LoRA matrix, or a module's trained copy."""
    return "lora_" in name or ".modules_to_save." in name


def parameter_account(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Parameters, trainable parameters and stored bytes of each part of a model.

    Parts: vision, language (embedding, layers and lm_head), adapter, total. A 4-bit
    weight counts with its true number of parameters and its packed bytes, its scales
    included; a weight cut over processes (ZeRO-3) counts whole. Works on the meta
    device too.
    """
    parts = ("vision", "language", "adapter", "total")
    account = {part: {"parameters": 0, "trainable": 0, "bytes": 0} for part in parts}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)  # bitsandbytes' Params4bit
        count = entries(parameter) if state is None else state.shape.numel()
        size = entries(parameter) * parameter.element_size()
        if state is not None:
            size += sum(
                value.numel() * value.element_size()
                for value in state.as_dict(packed=True).values()
                if isinstance(value, torch.Tensor)
            )
        part = "language"
        if _of_adapter(name):
            part = "adapter"
        elif "visual." in name:
            part = "vision"
        for row in (account[part], account["total"]):
            row["parameters"] += count
            row["trainable"] += count if parameter.requires_grad else 0
            row["bytes"] += size
    return account


def weights_hash(model: torch.nn.Module, adapter: bool = False) -> str:
    """16 hex digits over the base weights (or, with `adapter`, those PEFT added).

    Names are those of the base model, so that a hash survives putting LoRA on top:
    what training claims to leave alone can be shown to be untouched.
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


def entries(parameter: torch.nn.Parameter) -> int:
    """Number of entries of a parameter, wherever they lie; cut ones know it."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def whole(module: torch.nn.Module) -> Iterator[None]:
    """Inside, every process has all weights of the module, to be read only.

    All processes have to come here together. Without ZeRO-3 nothing is done.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed import zero  # it is there, or ZeRO-3 were not on

    with zero.GatheredParameters(list(module.parameters())):
        yield

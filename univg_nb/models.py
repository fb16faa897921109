"""Models: loading for training and for inference, adapters, and what is trained.

A model is a plain `Qwen2VLForConditionalGeneration`: `model.visual` (vision tower and
merger, frozen in both stages of the paper), `model.language_model` and `lm_head`. The
names "tiny" and "tiny-stage1" stand for the models that ship with this package.
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
from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from univg_nb import io
from univg_nb.families import box_convention, check_family, get_side, scale_limit
from univg_nb.loading import (
    check_fit,
    explain_loading,
    leave_tag_to_reply,
    refuse_names,
)

ASSETS = Path(__file__).parent / "assets" / "tiny-qwen2-vl"
STAGE1 = ASSETS.with_name("tiny-stage1")  # the same model after stage 1
SHIPPED = {"tiny": ASSETS, "tiny-stage1": STAGE1}

# Every linear layer of the language model, and none of the vision tower, whose layers
# have other names but would be matched by the short form "all-linear".
LANGUAGE_LINEARS = (
    r".*\blanguage_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)
IN_TOWER = r".*\bvisual\..*"
# bitsandbytes takes prefixes of the full module name; "visual" alone matches nothing.
NOT_QUANTIZED = ["model.visual", "lm_head"]

Quantization = Literal["nf4"]
BASE_FILE = "base.json"  # in an adapter's folder: `sample_base` of what it trained on


def resolve_model_path(name_or_path: str) -> str:
    """Return the folder of a shipped model for its name, any other name unchanged."""
    return str(SHIPPED.get(name_or_path, name_or_path))


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

    They bound the pixels of an image after resizing, both inclusive, and are larger
    where tokens are (`families.scale_limit`). On the processor itself they have no
    effect (docs/paper_facts.md#t4). Raises ValueError if min_pixels is above
    max_pixels, or for a processor of another kind of model.
    """
    name = resolve_model_path(model_section["name_or_path"])
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(
            f"{name}: is an adapter; give its base as the model and it as --adapter"
        )
    with explain_loading(name):
        processor = AutoProcessor.from_pretrained(name)
    images = getattr(processor, "image_processor", None)
    if images is None or "longest_edge" not in (images.size or {}):
        raise ValueError(
            f"{name}: holds a {type(processor).__name__}, which does not bound the "
            "pixels of images; give the folder of a Qwen-VL model and its processor"
        )
    size = dict(images.size)
    for edge, key in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if pixels := model_section.get(key):
            size[edge] = scale_limit(pixels, get_side(processor))
    if size["shortest_edge"] > size["longest_edge"]:
        raise ValueError(
            f"model.min_pixels = {size['shortest_edge']} is larger than "
            f"model.max_pixels = {size['longest_edge']}; swap or widen them"
        )
    images.size = type(images.size)(**size)
    leave_tag_to_reply(processor)
    return processor


def is_adapter(folder: str | Path) -> bool:
    """Return True for a LoRA adapter, False for a whole model, or raise ValueError."""
    path = Path(folder)
    found = (path / "adapter_config.json").is_file()
    weights = [path / f"adapter_model.{end}" for end in ("safetensors", "bin")]
    problem = ""
    if not path.is_dir():
        problem = "no such folder"
    elif found and not any(map(Path.is_file, weights)):
        problem = f"no {weights[0].name} in it"
    elif not found and not (path / "config.json").is_file():
        problem = "neither adapter_config.json nor config.json in it"
    if problem:
        below = f", here {path / 'adapter'}" if (path / "adapter").is_dir() else ""
        raise ValueError(
            f"{folder}: {problem}; give the adapter folder of a finished "
            f"training{below}"
        )
    return found


def load_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    trainable: bool = False,
    stacked: bool = False,
) -> PeftModel:
    """Put a LoRA adapter on a model; every weight of its file must find its place.

    `stacked` says that `model` is not what `--model` names, because other adapters were
    merged into it: this one must then tell that it was trained on such weights.

    Raises:
        ValueError: for an adapter of other weights, or one that is broken.
    """
    name = str(folder)
    with explain_loading(name):
        config = PeftConfig.from_pretrained(name)
    if config.peft_type != "LORA":
        raise ValueError(
            f"{folder}: a {config.peft_type.value} adapter; LoRA is expected"
        )
    _check_base(model, folder, config.base_model_name_or_path, stacked)
    config.inference_mode = not trainable
    # As PeftModel.from_pretrained does, which only warns of weights without a place.
    wrap = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    with explain_loading(name), ignore_rename_warnings():
        adapted = wrap(model, config)
        found = adapted.load_adapter(name, "default", is_trainable=trainable)
    base = f"of {model.name_or_path}; the adapter names as its base"
    base = f"{base} {config.base_model_name_or_path}, give that as the model"
    refuse_names(folder, f"of the adapter fit none {base}", found.unexpected_keys)
    refuse_names(folder, f"missing in the adapter {base}", found.missing_keys)
    return adapted


def sample_base(model: torch.nn.Module) -> dict[str, Any]:
    """Return first entries of embedding and layer 0, to know a base model by.

    Adapters do not change them until they are merged. 4-bit weights are left out. Where
    boxes are written in pixels, "boxes" says it.
    """
    base = get_base_model(model)
    found: dict[str, Any] = {}
    if box_convention(base.config) == "pixels":
        found["boxes"] = "pixels"
    for part in (base.get_input_embeddings(), base.model.language_model.layers[0]):
        with gather_weights(part):
            found |= {
                name.replace(".base_layer.", "."): weight.flatten()[:8].tolist()
                for name, weight in part.named_parameters()
                if weight.is_floating_point() and not _of_adapter(name)
            }
    return found


def _check_base(
    model: PreTrainedModel, folder: str | Path, origin: str | None, stacked: bool
) -> None:
    """Raise ValueError if an adapter was trained on other weights than the model's."""
    path, now = Path(folder) / BASE_FILE, sample_base(model)
    if int(os.environ.get("LOCAL_RANK", "0")):
        return  # under FSDP only the first process has loaded the weights
    remedy = (
        "An adapter of stage 2 contains stage 1: give the last one alone. Otherwise "
        "merge what it was trained on (python -m univg_nb merge) and give that as model"
    )
    if not path.is_file():
        if stacked:
            raise ValueError(
                f"{folder}: nothing says that it was trained on top of the one before "
                f"it (no {BASE_FILE}; its base is {origin}). {remedy}"
            )
        return
    before = io.read_json(path)
    # Rounding to bf16 changes a number by less than 2^-8 of it.
    same = [
        torch.allclose(torch.tensor(before[name]), torch.tensor(now[name]), 2**-7, 1e-6)
        for name in before.keys() & now.keys() - {"boxes"}
    ]
    if not same or not all(same):
        below = "the adapter before it is merged into" if stacked else "it is put on"
        raise ValueError(
            f"{folder}: was trained on other weights ({origin}) than those that {below}"
            f" ({model.name_or_path}). {remedy if stacked else 'Give its own base'}"
        )


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
    processor = load_processor(model_section)
    model = _load_weights(model_section, None if lora else adapter, quantize)
    check_fit(model, processor)
    _set_boxes(model.config, model_section, adapter if lora else None)
    model.requires_grad_(quantize is None)
    if lora:
        model = load_adapter(model, str(adapter), trainable=True)
    return model.train(), processor


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
    whole = None
    kinds = [is_adapter(path) for path in paths]
    if not all(kinds[1:]):
        raise ValueError(
            f"{paths[kinds.index(False, 1)]}: is a whole model, which replaces what "
            "stands before it; give it first or alone"
        )
    if kinds and not kinds[0]:
        whole = paths.pop(0)
    if quantize and len(paths) > 1:
        raise ValueError("4-bit weights take one adapter: they cannot be merged")
    processor = load_processor(model_section)
    model = _load_weights(model_section, whole, quantize)
    check_fit(model, processor)
    _set_boxes(model.config, model_section, paths[-1] if paths else None)
    if quantize is None:
        model.to(get_device())
    for position, path in enumerate(paths):
        stacked = whole is not None or position > 0
        model = load_adapter(model, path, stacked=stacked)
        if quantize is None:
            model = model.merge_and_unload()
    return model.requires_grad_(False).eval(), processor


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
    source = source if folder is None else str(folder)
    with explain_loading(source):
        config = AutoConfig.from_pretrained(source)
    check_family(config, source)
    with explain_loading(source):
        model, found = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=model_section.get("attn_implementation", "sdpa"),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused here, by name
            **options,
        )
    shapes = [name for name, *_ in found["mismatched_keys"]]
    refuse_names(source, "have other shapes than config.json says", shapes)
    refuse_names(source, "of its architecture are missing", found["missing_keys"])
    refuse_names(source, "are not in its architecture", found["unexpected_keys"])
    if getattr(model, "is_quantized", False) and quantize is None:
        raise ValueError(
            f"{source}: its weights are stored quantized; give those at full precision "
            "(4 bits are made of them by --quantize nf4 or sft.adapter=qlora)"
        )
    return model


# ---------------------------------------------------------------- how boxes are written


def load_config(model_section: Mapping[str, Any]) -> Any:
    """Load the configuration of a model that another process holds."""
    name = resolve_model_path(model_section["name_or_path"])
    with explain_loading(name):
        config = AutoConfig.from_pretrained(name)
    check_family(config, name)
    _set_boxes(config, model_section)
    return config


def _set_boxes(
    config: Any, model_section: Mapping[str, Any], adapter: str | Path | None = None
) -> None:
    """Note in the configuration if boxes are written otherwise than by the family.

    That is as `model.boxes` says; with "auto" (default) as the adapter was trained,
    which a file beside it tells, else as the weights say.
    """
    boxes, trained = model_section.get("boxes", "auto"), getattr(config, "boxes", None)
    path = Path(adapter) / BASE_FILE if adapter else None
    if path and path.is_file():
        trained = io.read_json(path).get("boxes", "thousandths")
    if trained and boxes not in ("auto", trained):
        source = adapter or model_section["name_or_path"]
        raise ValueError(
            f"model.boxes = {boxes}, but {source} was trained to write {trained}; set "
            "model.boxes to auto or to that"
        )
    boxes = trained or boxes
    if boxes not in ("auto", box_convention(config)):
        config.boxes = boxes


# ---------------------------------------------------------------- adapters, parameters


def add_lora(
    model: PreTrainedModel, lora: Mapping[str, Any] | None = None
) -> PeftModel:
    """Add new LoRA matrices to every linear layer of the language model.

    They are drawn from torch's global generator: seed it first. `lora` holds options of
    PEFT's LoraConfig (r, lora_alpha, lora_dropout, ...). Other `target_modules` than
    the default leave out the vision tower, whose features are computed once. Raises
    ValueError if they say nothing else, or if something else would be trained there.
    """
    options = {"target_modules": LANGUAGE_LINEARS, "task_type": "CAUSAL_LM"}
    if lora and "target_modules" in lora:
        options["exclude_modules"] = IN_TOWER
    with ignore_rename_warnings():
        model = get_peft_model(model, LoraConfig(**{**options, **(lora or {})}))
    weights = model.named_parameters()
    inside = [name for name, p in weights if p.requires_grad and "visual." in name]
    refuse_names("sft.lora", "would be trained in the frozen vision tower", inside)
    return model


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

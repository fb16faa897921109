"""Memory of a training before it runs, by component.

The model is built from its configuration on torch's meta device (shapes, no numbers),
so that a 7B model is counted in a second on any machine. What autograd keeps for the
backward pass is counted by sending meta tensors through one decoder layer. Bytes are
those of one process, which has one GPU.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from univg_nb import models
from univg_nb.config import SCALES, suggestion

Stage = Literal["sft", "grpo"]
STRATEGIES = ("single", "ddp", "zero2", "zero3", "fsdp2")
PHASES = ("activations", "logits", "KV cache", "vision")  # not all at the same time
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # code, 8-bit scale, and its fp32 scale
TILE = 32_768  # TRL scores this many words of the vocabulary at a time
TILE_COPIES = 7  # fp32 temporaries of a tile where there is no Triton kernel (a CPU)


@dataclass(frozen=True)
class Layout:
    """How a training is spread, and what a row holds.

    Attributes:
        strategy: one of STRATEGIES.
        processes: in all.
        tokens: of the longest row, prompt and reply; decides the memory.
        reply: tokens of the reply among them (GRPO keeps logits for these only).
        images: image tokens among them; four patches of the vision tower each.
        typical: tokens of a usual row, reply included; decides the time.
    """

    strategy: str
    processes: int
    tokens: int
    reply: int
    images: int
    typical: int

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            hint = suggestion(self.strategy, STRATEGIES)
            raise ValueError(f"unknown strategy {self.strategy!r}{hint}")
        if (self.strategy == "single") != (self.processes == 1):
            raise ValueError(
                f"launch.strategy = {self.strategy} with {self.processes} processes; "
                "one process is single, several are ddp, zero2, zero3 or fsdp2"
            )

    @property
    def weight_shards(self) -> int:
        """Number of parts into which frozen and trained weights are cut."""
        return self.processes if self.strategy in ("zero3", "fsdp2") else 1

    @property
    def state_shards(self) -> int:
        """Number of parts into which gradients and optimizer are cut."""
        return 1 if self.strategy in ("single", "ddp") else self.processes


# ---------------------------------------------------------------- the model, in shapes


def load_architecture(name_or_path: str) -> Any:
    """Load a model's configuration: "tiny", a folder, a shipped one, or the hub's."""
    path = Path(models.resolve_model_path(name_or_path))
    shipped = SCALES / "models" / f"{path.name}.json"
    if (path / "config.json").is_file() or not shipped.is_file():
        return AutoConfig.from_pretrained(path if path.is_dir() else name_or_path)
    fields = json.loads(shipped.read_text(encoding="utf-8"))
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)


def build_shapes(config: Mapping[str, Any], stage: Stage) -> torch.nn.Module:
    """Build the scale's model on the meta device, with what `stage` trains marked."""
    section, sft = config[stage], config["sft"]
    dtype = getattr(torch, config["model"].get("dtype", "float32"))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            load_architecture(config["model"]["name_or_path"]), dtype=dtype
        )
        if section.get("freeze_vision", True):
            models.freeze_vision(model)
        if sft.get("adapter", "lora") != "none":
            model = models.add_lora(model, sft.get("lora"))
    return model


class _Attention(torch.autograd.Function):
    """What flash and memory-efficient attention keep: no T x T scores."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        out = torch.empty_like(q)  # and one number per row and head
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float))
        return out


def _account(module: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
    return _Attention.apply(q, k, v).transpose(1, 2), None


AttentionInterface.register("account", _account)


def _count_bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _kept_per_layer(base: Any, rows: int, tokens: int) -> int:
    """Return the bytes that autograd keeps for the backward pass of a decoder layer."""
    layer = base.model.language_model.layers[0]
    text = base.config.get_text_config()
    width = text.hidden_size // text.num_attention_heads
    weights = {p.untyped_storage()._cdata for p in layer.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor
        return tensor

    shape = (rows, tokens, text.hidden_size)
    options = {"dtype": layer.input_layernorm.weight.dtype, "device": "meta"}
    hidden = torch.empty(shape, requires_grad=True, **options)
    rotary = torch.empty((rows, tokens, width), **options)
    before, text._attn_implementation = text._attn_implementation, "account"
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(hidden, attention_mask=None, position_embeddings=(rotary, rotary))
    finally:
        text._attn_implementation = before
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# ---------------------------------------------------------------- memory


def compute_static_memory(
    model: torch.nn.Module, config: Mapping[str, Any], stage: Stage, layout: Layout
) -> dict[str, float]:
    """Return what lies in memory all the time, in bytes per process by component.

    AdamW holds two numbers per trained one, in the dtype of the parameter; under bf16
    mixed precision ZeRO and FSDP train fp32 weights and hold all three in fp32. `model`
    comes from `build_shapes`.
    """
    adapter = config["sft"].get("adapter", "lora")
    base = models.get_base_model(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    count, size = sum(p.numel() for p in trained), _count_bytes(trained)
    frozen = float(_count_bytes(model.parameters()) - size)
    if adapter == "qlora":
        linears = set(models.find_language_linears(base))
        for name, weight in base.named_parameters():
            if name.removesuffix(".weight") in linears and "lora_" not in name:
                frozen += weight.numel() * (NF4_BYTES - weight.element_size())
    gradients, states, master = size, 2 * size, 0
    mixed = config[stage].get("bf16", False)
    if layout.strategy in ("zero2", "zero3") and mixed:
        states, master = 8 * count, 4 * count
    elif layout.strategy == "fsdp2" and mixed:  # the trained weights become fp32
        gradients, states, master = 4 * count, 8 * count, 4 * count - size
    reference = 0.0
    if stage == "grpo" and config["grpo"].get("beta", 0.04):
        whole = (size + frozen) / layout.weight_shards
        reference = size if adapter != "none" else whole
    account = {
        "weights": (frozen + size) / layout.weight_shards,
        "gradients": gradients / layout.state_shards,
        "optimiser": (states + master) / layout.state_shards,
        "reference": reference,
        "buffers": _count_buffers(base, layout, size),
    }
    return {name: float(number) for name, number in account.items()}


def _count_buffers(base: Any, layout: Layout, size: int) -> float:
    """Return the bytes of communication buffers.

    DDP: a bucketed copy of the gradients. ZeRO-2: two buckets of 2e8 numbers. ZeRO-3,
    FSDP: two decoder layers (one at work, one fetched ahead), or the embedding and the
    head, gathered whole.
    """
    if layout.strategy == "ddp":
        return size
    if layout.strategy == "zero2":
        return 2 * 2e8 * 2
    if layout.weight_shards == 1:
        return 0.0
    layer = base.model.language_model.layers[0]
    ends = {base.lm_head.weight, base.get_input_embeddings().weight}
    return max(2 * _count_bytes(layer.parameters()), _count_bytes(ends))


def compute_training_memory(
    model: torch.nn.Module,
    config: Mapping[str, Any],
    stage: Stage,
    layout: Layout,
    on_gpu: bool,
) -> dict[str, float]:
    """Return what comes and goes, at its largest, in bytes per process by component.

    `model` comes from `build_shapes`; on a GPU TRL's Triton kernel scores the tokens.
    """
    section = config[stage]
    base = models.get_base_model(model)
    text, vision = base.config.get_text_config(), base.config.vision_config
    size = base.lm_head.weight.element_size()
    rows = section.get("per_device_train_batch_size", 8)
    group = section.get("num_generations", 8) if stage == "grpo" else 1
    tokens, packed = layout.tokens, rows
    if stage == "grpo":  # prompt once, replies behind it: one packed row per group
        tokens = layout.tokens + (group - 1) * layout.reply
        packed = max(1, rows // group)
    layers = text.num_hidden_layers
    one = _kept_per_layer(base, packed, tokens)
    carried = packed * tokens * text.hidden_size * size
    checkpointing = section.get(
        "activation_checkpointing", section.get("gradient_checkpointing", True)
    )
    kept = layers * carried + one if checkpointing else layers * one
    width = text.hidden_size // text.num_attention_heads
    per_token = 2 * layers * text.num_key_value_heads * width * size
    generated = rows * section.get("gradient_accumulation_steps", 1)
    cached = stage == "grpo" and not section.get("use_vllm")
    patches = (rows // group) * layout.images * vision.spatial_merge_size**2
    return {
        "activations": float(kept),
        "logits": _count_logits(base, stage, rows, layout, on_gpu),
        "KV cache": float(cached * generated * layout.tokens * per_token),
        "vision": float(patches * vision.embed_dim * 10 * size),
    }


def _count_logits(
    base: Any, stage: Stage, rows: int, layout: Layout, on_gpu: bool
) -> float:
    """Return the bytes from the last hidden states to the loss and back.

    TRL goes over tiles of tokens and words (its ChunkedLogProbFunction), whose buffer
    is TILE words wide whatever the vocabulary, and sums the gradients of hidden states
    and of a trained head in fp32. On a GPU a Triton kernel does it without temporaries.
    GRPO, and SFT on a GPU, score the replies alone.
    """
    head = base.lm_head.weight
    words, hidden = head.shape
    replies_only = on_gpu or stage == "grpo"
    tokens = rows * (layout.reply if replies_only else layout.tokens)
    part = min(tokens, TOKEN_CHUNK_SIZE)
    tile = part * TILE * head.element_size()
    tile += (0 if on_gpu else TILE_COPIES) * part * min(words, TILE) * 4
    return float(tile + 4 * tokens * hidden + 4 * head.numel() * head.requires_grad)

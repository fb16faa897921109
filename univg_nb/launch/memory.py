"""Memory of a training before it runs, by component.

The model is built from its configuration on torch's meta device (shapes, no numbers),
so that a 7B model is counted in a second on any machine. What autograd keeps for the
backward pass is counted by sending meta tensors through one decoder layer. Bytes are
those of one process, which has one GPU.
"""

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
from univg_nb.io import read_json

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

    @property
    def weight_shards(self) -> int:
        """Number of parts into which frozen and trained weights are cut."""
        return self.processes if self.strategy in ("zero3", "fsdp2") else 1

    @property
    def state_shards(self) -> int:
        """Number of parts into which gradients and optimizer are cut."""
        return 1 if self.strategy in ("single", "ddp") else self.processes


def choose_strategy(processes: int, strategy: str | None) -> str:
    """Return "single" for one process, "ddp" for several where nothing else is said."""
    if processes == 1:
        return "single"
    return "ddp" if strategy in (None, "single") else strategy


def load_architecture(name_or_path: str) -> Any:
    """Load a model's configuration: "tiny", a folder, a shipped one, or the hub's."""
    path = Path(models.resolve_model_path(name_or_path))
    shipped = SCALES / "models" / f"{path.name}.json"
    if (path / "config.json").is_file() or not shipped.is_file():
        return AutoConfig.from_pretrained(path if path.is_dir() else name_or_path)
    fields = read_json(shipped)
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)


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


class Training:
    """A stage of a scale, with its model in shapes.

    Attributes:
        model: on the meta device, with what the stage trains marked; `base` is it
            without adapters.
        rows: of a pass of one process; for GRPO these are replies.
        steps: passes of an update.
        group: replies to a prompt; 1 in stage 1.
    """

    def __init__(self, config: Mapping[str, Any], stage: Stage, layout: Layout) -> None:
        self.config, self.stage, self.layout = config, stage, layout
        self.section = section = config[stage]
        self.rows = section.get("per_device_train_batch_size", 8)
        self.steps = section.get("gradient_accumulation_steps", 1)
        self.group = section.get("num_generations", 8) if stage == "grpo" else 1
        self.adapter = config["sft"].get("adapter", "lora")
        with torch.device("meta"):
            self.model = AutoModelForImageTextToText.from_config(
                load_architecture(config["model"]["name_or_path"]),
                dtype=getattr(torch, config["model"].get("dtype", "float32")),
                attn_implementation="account",
            )
            if section.get("freeze_vision", True):
                models.freeze_vision(self.model)
            if self.adapter != "none":
                self.model = models.add_lora(self.model, config["sft"].get("lora"))
        self.base = models.get_base_model(self.model)
        self.text = self.base.config.get_text_config()
        self.vision = self.base.config.vision_config

    def compute_static_memory(self) -> dict[str, float]:
        """Return what lies in memory all the time, in bytes per process by component.

        AdamW holds two numbers per trained one, in the dtype of the parameter; under
        bf16 mixed precision ZeRO and FSDP train fp32 weights and hold all three in
        fp32.
        """
        layout, parameters = self.layout, list(self.model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        count, size = sum(p.numel() for p in trained), _count_bytes(trained)
        frozen = float(_count_bytes(parameters) - size)
        if self.adapter == "qlora":
            linears = set(models.find_language_linears(self.base))
            for name, weight in self.base.named_parameters():
                if name.removesuffix(".weight") in linears and "lora_" not in name:
                    frozen += weight.numel() * (NF4_BYTES - weight.element_size())
        gradients, optimizer = size, 2 * size
        if self.section.get("bf16", False):
            if layout.strategy in ("zero2", "zero3"):
                optimizer = 12 * count
            elif layout.strategy == "fsdp2":  # the trained weights become fp32
                gradients, optimizer = 4 * count, 12 * count - size
        weights, reference = (frozen + size) / layout.weight_shards, 0.0
        if self.stage == "grpo" and self.section.get("beta", 0.04):
            reference = weights if self.adapter == "none" else size
        return {
            "weights": weights,
            "gradients": gradients / layout.state_shards,
            "optimiser": optimizer / layout.state_shards,
            "reference": float(reference),
            "buffers": float(self._count_buffers(size)),
        }

    def _count_buffers(self, size: int) -> float:
        """Return the bytes of communication buffers.

        DDP: a bucketed copy of the gradients. ZeRO-2: two buckets of 2e8 numbers.
        ZeRO-3, FSDP: two decoder layers (one at work, one fetched ahead), or the
        embedding and the head, gathered whole.
        """
        if self.layout.strategy == "ddp":
            return size
        if self.layout.strategy == "zero2":
            return 2 * 2e8 * 2
        if self.layout.weight_shards == 1:
            return 0.0
        layer = self.base.model.language_model.layers[0]
        ends = {self.base.lm_head.weight, self.base.get_input_embeddings().weight}
        return max(2 * _count_bytes(layer.parameters()), _count_bytes(ends))

    def compute_training_memory(self, on_gpu: bool) -> dict[str, float]:
        """Return what comes and goes, at its largest, in bytes per process.

        `on_gpu`: TRL's Triton kernel scores the tokens.
        """
        layout, section, text = self.layout, self.section, self.text
        tokens, packed, prompts = layout.tokens, self.rows, self.rows // self.group
        if self.stage == "grpo":  # prompt once, replies behind it: one row per group
            tokens += (self.group - 1) * layout.reply
            packed = max(1, prompts)
        size, layers = self.base.lm_head.weight.element_size(), text.num_hidden_layers
        kept = self._count_kept(packed, tokens)
        if section.get(
            "activation_checkpointing", section.get("gradient_checkpointing", True)
        ):
            kept += layers * packed * tokens * text.hidden_size * size
        else:
            kept *= layers
        width = text.hidden_size // text.num_attention_heads
        per_token = 2 * layers * text.num_key_value_heads * width * size
        cached = self.stage == "grpo" and not section.get("use_vllm")
        patches = prompts * layout.images * self.vision.spatial_merge_size**2
        return {
            "activations": float(kept),
            "logits": self._count_logits(on_gpu),
            "KV cache": float(
                cached * self.rows * self.steps * layout.tokens * per_token
            ),
            "vision": float(patches * self.vision.embed_dim * 10 * size),
        }

    def _count_kept(self, rows: int, tokens: int) -> int:
        """Return the bytes that autograd keeps of a decoder layer's forward pass."""
        layer = self.base.model.language_model.layers[0]
        weights = {p.untyped_storage()._cdata for p in layer.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = tensor
            return tensor

        width = self.text.hidden_size
        options = {"dtype": layer.input_layernorm.weight.dtype, "device": "meta"}
        hidden = torch.empty((rows, tokens, width), requires_grad=True, **options)
        width //= self.text.num_attention_heads
        rotary = torch.empty((rows, tokens, width), **options)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(hidden, attention_mask=None, position_embeddings=(rotary, rotary))
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def _count_logits(self, on_gpu: bool) -> float:
        """Return the bytes from the last hidden states to the loss and back.

        TRL goes over tiles of tokens and words (its ChunkedLogProbFunction), whose
        buffer is TILE words wide whatever the vocabulary, and sums the gradients of
        hidden states and of a trained head in fp32. On a GPU a Triton kernel does it
        without temporaries. GRPO, and SFT on a GPU, score the replies alone.
        """
        head = self.base.lm_head.weight
        words, hidden = head.shape
        replies_only = on_gpu or self.stage == "grpo"
        tokens = self.rows * (self.layout.reply if replies_only else self.layout.tokens)
        part = min(tokens, TOKEN_CHUNK_SIZE)
        tile = part * TILE * head.element_size()
        tile += (0 if on_gpu else TILE_COPIES) * part * min(words, TILE) * 4
        return float(tile + 4 * tokens * hidden + 4 * head.numel() * head.requires_grad)

"""What a training takes before it runs: memory, FLOPs, hours, and what would help.

The model is built from its configuration on torch's meta device (shapes, no numbers),
so that a 7B model is counted in a second on any machine. What autograd keeps for the
backward pass is counted by sending meta tensors through one decoder layer. Bytes are
those of one process, which has one GPU.

Times are a model, not a measurement: FLOPs over the card's peak times a stated share
of it (MFU), plus generation: the weights are read once per token, at READING.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from univg_nb import models
from univg_nb.config import SCALES, override, suggestion
from univg_nb.io import read_asset, read_json
from univg_nb.loading import explain_loading

Stage = Literal["sft", "grpo"]
STRATEGIES = ("single", "ddp", "zero2", "zero3", "fsdp2")
# Not all at the same time: the last three while replies are sampled.
PHASES = ("activations", "logits", "KV cache", "vision", "gathered")
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # code, 8-bit scale, and its fp32 scale
TILE = 32_768  # TRL scores this many words of the vocabulary at a time
TILE_COPIES = 7  # fp32 temporaries of a tile where there is no Triton kernel (a CPU)
RUNTIME = 1.5e9  # bytes of CUDA context, libraries, fragmentation: an assumption
READING = 0.5  # share of the memory bandwidth that generation reaches: an assumption
SPARE = 0.15  # share of a card that should stay free, as a plan may be too low
OTHER_RECIPE = ("sft.adapter", "model.")  # options that change what is trained


@dataclass(frozen=True)
class Gpu:
    """A card, by its maker's data sheet: GB (10^9 bytes), bf16 FLOP/s, bytes/s."""

    memory_gb: float
    flops: float  # dense
    bandwidth: float

    def judge(self, peak: float) -> str:
        """Return "fits", "tight" (less than SPARE of it is free) or "does not fit"."""
        free = 1 - peak / (self.memory_gb * 1e9)
        return "fits" if free >= SPARE else "tight" if free >= 0 else "does not fit"


GPUS = {name: Gpu(*sheet) for name, sheet in read_asset("gpus.yaml").items()}
CPU = Gpu(16, 5e10, 2e10)  # two laptop cores: an assumption


def find_gpu(name: str) -> Gpu:
    """Return the card of that name; raise ValueError with a suggestion otherwise."""
    if name == "cpu":
        return CPU
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}{suggestion(name, GPUS)}")
    return GPUS[name]


@dataclass(frozen=True)
class Layout:
    """How a training is spread, and what a row holds."""

    strategy: str  # one of STRATEGIES
    processes: int  # in all
    tokens: int  # of the longest row, prompt and reply; decides the memory
    reply: int  # tokens of the reply among them (GRPO keeps logits for these only)
    images: int  # image tokens among them; four patches of the vision tower each
    typical: int  # tokens of a usual row, reply included; decides the time

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
    path = Path(name := models.resolve_model_path(name_or_path))
    edition = path.name.replace("-Thinking", "-Instruct")  # of the same sizes
    shipped = SCALES / "models" / f"{edition}.json"
    if (path / "config.json").is_file() or not shipped.is_file():
        with explain_loading(name):
            return AutoConfig.from_pretrained(name)
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


class Plan:
    """The account of one stage on a card.

    Attributes:
        model: on the meta device, with what the stage trains marked; `base` is it
            without adapters, `head` the width of an attention head, `tower` that of
            the vision tower.
        parameters: from `models.count_parameters`.
        memory: bytes per process, by component.
        batch: rows (for GRPO replies), prompts and tokens of one update, in all.
        updates: of the whole training.
        flops: of one update by part, all processes together.
        seconds: of one update by part.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        stage: Stage,
        layout: Layout,
        gpu: Gpu,
        samples: int,
        mfu: float = 0.35,
    ) -> None:
        """Compute the account.

        Args:
            config: a whole scale.
            stage: "sft" or "grpo".
            layout: how the training is spread, and what a row holds.
            gpu: the card of each process.
            samples: number of training samples.
            mfu: share of the card's peak that is reached, 0..1.
        """
        self.config, self.stage, self.layout = config, stage, layout
        self.gpu, self.samples, self.mfu = gpu, samples, mfu
        self.section = section = config[stage]
        self.rows = section.get("per_device_train_batch_size", 8)  # of a pass
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
        self.vision = vision = self.base.config.vision_config
        heads = self.text.num_attention_heads  # Qwen3's have a width of their own
        self.head = getattr(self.text, "head_dim", self.text.hidden_size // heads)
        # In Qwen2-VL, hidden_size is the width behind the merger.
        self.tower = getattr(vision, "embed_dim", vision.hidden_size)
        self.parameters = models.count_parameters(self.model)
        self.memory = self._count_static_memory()
        self.memory |= self._count_passing_memory()
        rows = self.rows * self.steps * layout.processes
        prompts = rows // self.group
        tokens = prompts * (layout.typical - layout.reply) + rows * layout.reply
        self.batch = {"rows": rows, "prompts": prompts, "tokens": tokens}
        epochs, limit = section.get("num_train_epochs", 3), section.get("max_steps", 0)
        self.updates = limit if limit > 0 else math.ceil(epochs * samples / prompts)
        self.flops = self._count_flops()
        speed = layout.processes * gpu.flops * mfu
        self.seconds = {name: number / speed for name, number in self.flops.items()}
        if stage == "grpo":  # every token reads the weights once for all rows together
            weights = self.memory["weights"] * layout.weight_shards
            reading = layout.reply * weights / (gpu.bandwidth * READING)
            self.seconds["generation"] += reading

    @property
    def peak(self) -> float:
        """Bytes at the worst moment, which is in training or in generating."""
        parts = self.memory
        always = sum(size for name, size in parts.items() if name not in PHASES)
        training = parts["activations"] + parts["logits"]
        sampling = parts["KV cache"] + parts["vision"] + parts["gathered"]
        return always + max(training, sampling)

    @property
    def fits(self) -> bool:
        """Whether the peak fits into the card."""
        return self.peak <= self.gpu.memory_gb * 1e9

    @property
    def hours(self) -> float:
        """Hours of the whole training."""
        return sum(self.seconds.values()) * self.updates / 3600

    def _count_static_memory(self) -> dict[str, float]:
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
            "optimizer": optimizer / layout.state_shards,
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

    def _count_passing_memory(self) -> dict[str, float]:
        """Return what comes and goes, at its largest, and what is not the model's."""
        layout, section, text = self.layout, self.section, self.text
        tokens, packed, prompts = layout.tokens, self.rows, self.rows // self.group
        vllm, generated = section.get("use_vllm", False), self.rows * self.steps
        shared = section.get("shared_prefix", True) and layout.strategy != "fsdp2"
        if self.stage == "grpo" and shared:  # a row: a prompt, its replies behind it
            tokens += (self.group - 1) * layout.reply
            packed, generated = max(1, prompts), max(1, generated // self.group)
        size, layers = self.base.lm_head.weight.element_size(), text.num_hidden_layers
        kept = self._count_kept(packed, tokens)
        checkpointing = section.get("gradient_checkpointing", True)
        if section.get("activation_checkpointing", checkpointing):
            kept += layers * packed * tokens * text.hidden_size * size
        else:
            kept *= layers
        per_token = 2 * layers * text.num_key_value_heads * self.head * size
        cached = self.stage == "grpo" and not vllm
        patches = prompts * layout.images * self.vision.spatial_merge_size**2
        # Under ZeRO-3 TRL gathers the whole model on every GPU to sample with it.
        gathers = cached and layout.strategy == "zero3"
        gathers = gathers and section.get("ds3_gather_for_generation", True)
        memory = {
            "activations": float(kept),
            "logits": self._count_logits(),
            "KV cache": float(cached * generated * tokens * per_token),
            "vision": float(patches * self.tower * 10 * size),
            "gathered": gathers * (layout.weight_shards - 1) * self.memory["weights"],
            "runtime": 0.0 if self.gpu is CPU else RUNTIME,
        }
        if vllm and section.get("vllm_mode", "colocate") == "colocate":
            share = section.get("vllm_gpu_memory_utilization", 0.3)
            memory["vLLM"] = share * self.gpu.memory_gb * 1e9
        return memory

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

        size = (rows, tokens, self.text.hidden_size)
        options = {"dtype": layer.input_layernorm.weight.dtype, "device": "meta"}
        hidden = torch.empty(size, requires_grad=True, **options)
        rotary = torch.empty((rows, tokens, self.head), **options)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(hidden, attention_mask=None, position_embeddings=(rotary, rotary))
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def _count_logits(self) -> float:
        """Return the bytes from the last hidden states to the loss and back.

        TRL goes over tiles of tokens and words (its ChunkedLogProbFunction), whose
        buffer is TILE words wide whatever the vocabulary, and sums the gradients of
        hidden states and of a trained head in fp32. On a GPU a Triton kernel does it
        without temporaries. GRPO, and SFT on a GPU, score the replies alone.
        """
        head = self.base.lm_head.weight
        words, hidden = head.shape
        on_gpu = self.gpu is not CPU
        replies_only = on_gpu or self.stage == "grpo"
        tokens = self.rows * (self.layout.reply if replies_only else self.layout.tokens)
        part = min(tokens, TOKEN_CHUNK_SIZE)
        tile = part * TILE * head.element_size()
        tile += (0 if on_gpu else TILE_COPIES) * part * min(words, TILE) * 4
        return float(tile + 4 * tokens * hidden + 4 * head.numel() * head.requires_grad)

    def _count_flops(self) -> dict[str, float]:
        """Return the FLOPs of one update by part.

        A weight costs 2 per token forward, 2 for the gradient of its input, 2 more if
        it is trained; attention costs 4 T^2 d a layer and row, half of it masked;
        checkpointing runs the forward pass twice.
        """
        text, tokens, parts = self.text, self.batch["tokens"], self.parameters
        language = parts["language"]["parameters"] + parts["adapter"]["parameters"]
        if not self.base.config.tie_word_embeddings:
            language -= text.vocab_size * text.hidden_size
        trained = parts["total"]["trainable"]
        passes = 1 + bool(self.section.get("activation_checkpointing", False))
        wide = text.num_attention_heads * self.head
        attention = 2 * self.layout.typical * wide * text.num_hidden_layers
        forward = (2 * language + attention) * tokens
        backward = (2 * language + 2 * attention + 2 * trained) * tokens
        merge = self.vision.spatial_merge_size**2
        seen = self.batch["prompts"] * self.layout.images * merge
        flops = {
            "vision": 2.0 * parts["vision"]["parameters"] * seen,
            "training": float(passes * forward + backward),
        }
        if self.stage == "grpo":
            reference = self.section.get("beta", 0.04)
            flops["reference"] = float(forward) if reference else 0.0
            flops["generation"] = float(forward)
        return flops


def rank_variants(plan: Plan) -> list[tuple[str, Plan]]:
    """Return the single changes that lower the peak, by the option to set, and plans.

    Those that keep the recipe come first, then by the peak.
    """
    stage, layout, section = plan.stage, plan.layout, plan.section
    found: dict[str, Plan] = {}

    def add(*assignments: str, note: str = "", layout: Layout = layout) -> None:
        config = functools.reduce(override, assignments, dict(plan.config))
        variant = Plan(config, stage, layout, plan.gpu, plan.samples, plan.mfu)
        found[f"{assignments[0]}{note}"] = variant

    for adapter in ("lora", "qlora"):
        if plan.adapter not in (adapter, "qlora"):
            add(f"sft.adapter={adapter}")
    if not section.get("activation_checkpointing", False):
        add(f"{stage}.activation_checkpointing=true")
    half, odd = divmod(plan.rows, 2)
    if not odd and half >= plan.group:
        accumulation = f"{stage}.gradient_accumulation_steps={2 * plan.steps}"
        size = f"{stage}.per_device_train_batch_size={half}"
        add(size, accumulation, note=f" (accumulation {2 * plan.steps})")
    for strategy in ("zero2", "zero3"):
        if layout.strategy not in ("single", strategy, "zero3", "fsdp2"):
            other = replace(layout, strategy=strategy)
            add(f"launch.strategy={strategy}", layout=other)
    if plan.steps % 2 == 0 and (layout.state_shards > 1 or layout.processes == 1):
        strategy = "zero3" if layout.strategy == "single" else layout.strategy
        wider = replace(layout, strategy=strategy, processes=2 * layout.processes)
        accumulation = f"{stage}.gradient_accumulation_steps={plan.steps // 2}"
        processes = f"launch.processes={wider.processes}"
        add(processes, accumulation, note=f" ({strategy})", layout=wider)
    if pixels := plan.config["model"].get("max_pixels"):
        fewer, tokens = layout.images // 2, layout.tokens - layout.images // 2
        usual = max(layout.typical - fewer, (layout.typical + layout.reply) // 2)
        other = replace(layout, images=fewer, tokens=tokens, typical=usual)
        add(f"model.max_pixels={pixels // 2}", layout=other)
    better = [item for item in found.items() if item[1].peak < plan.peak]
    return sorted(better, key=lambda x: (x[0].startswith(OTHER_RECIPE), x[1].peak))

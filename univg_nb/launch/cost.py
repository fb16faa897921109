"""What a training costs: FLOPs, hours, price, whether it fits, and what would help.

Times are a model, not a measurement: FLOPs over the card's peak times a stated share
of it (MFU), plus generation, which is bound by reading the weights once per token.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from univg_nb import models
from univg_nb.config import suggestion
from univg_nb.io import read_asset
from univg_nb.launch import memory
from univg_nb.launch.memory import PHASES, Layout, Stage

RUNTIME = 1.5e9  # bytes of CUDA context, libraries, fragmentation: an assumption
READING = 0.5  # share of the memory bandwidth that generation reaches: an assumption


@dataclass(frozen=True)
class Gpu:
    """A card, by its maker's data sheet: GB (10^9 bytes), bf16 FLOP/s, bytes/s."""

    memory_gb: float
    flops: float  # dense
    bandwidth: float


GPUS = {name: Gpu(*sheet) for name, sheet in read_asset("gpus.yaml").items()}
CPU = Gpu(16, 5e10, 2e10)  # two laptop cores: an assumption


def find_gpu(name: str) -> Gpu:
    """Return the card of that name; raise ValueError with a suggestion otherwise."""
    if name == "cpu":
        return CPU
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}{suggestion(name, GPUS)}")
    return GPUS[name]


@dataclass
class Plan:
    """The account of one stage."""

    stage: Stage
    layout: Layout
    gpu: Gpu
    memory: dict[str, float]  # bytes per process, by component
    parameters: dict[str, dict[str, int]]  # from `models.count_parameters`
    batch: dict[str, int]  # rows (or completions), prompts, tokens of one update
    updates: int
    flops: dict[str, float]  # of one update by part, all processes together
    seconds: dict[str, float]  # of one update by part

    @property
    def peak(self) -> float:
        """Bytes at the worst moment, which is in training or in generating."""
        parts = self.memory
        always = sum(size for name, size in parts.items() if name not in PHASES)
        training = parts["activations"] + parts["logits"]
        return always + max(training, parts["KV cache"] + parts["vision"])

    @property
    def fits(self) -> bool:
        """Whether the peak fits into the card."""
        return self.peak <= self.gpu.memory_gb * 1e9

    @property
    def hours(self) -> float:
        """Hours of the whole training."""
        return sum(self.seconds.values()) * self.updates / 3600


def _count_batch(
    section: Mapping[str, Any], stage: Stage, layout: Layout
) -> dict[str, int]:
    """Return rows, prompts and tokens of one update over all processes."""
    size = section.get("per_device_train_batch_size", 8)
    rows = size * section.get("gradient_accumulation_steps", 1) * layout.processes
    group = section.get("num_generations", 8) if stage == "grpo" else 1
    prompts = rows // group
    tokens = prompts * (layout.typical - layout.reply) + rows * layout.reply
    return {"rows": rows, "prompts": prompts, "tokens": tokens}


def _count_flops(
    parameters: Mapping[str, Mapping[str, int]],
    base: Any,
    section: Mapping[str, Any],
    stage: Stage,
    layout: Layout,
    batch: Mapping[str, int],
) -> dict[str, float]:
    """Return the FLOPs of one update by part.

    A weight costs 2 per token forward, 2 for the gradient of its input, 2 more if it is
    trained; attention costs 4 T^2 d a layer and row, half of it masked; checkpointing
    runs the forward pass twice.
    """
    text = base.config.get_text_config()
    language = sum(parameters[part]["parameters"] for part in ("language", "adapter"))
    if not base.config.tie_word_embeddings:
        language -= text.vocab_size * text.hidden_size
    trained = parameters["total"]["trainable"]
    passes = 1 + bool(section.get("activation_checkpointing", False))
    attention = 2 * layout.typical * text.hidden_size * text.num_hidden_layers
    forward = (2 * language + attention) * batch["tokens"]
    backward = (2 * language + 2 * attention + 2 * trained) * batch["tokens"]
    merge = base.config.vision_config.spatial_merge_size**2
    seen = batch["prompts"] * layout.images * merge
    flops = {
        "vision": 2.0 * parameters["vision"]["parameters"] * seen,
        "training": float(passes * forward + backward),
    }
    if stage == "grpo":
        flops["reference"] = float(forward) if section.get("beta", 0.04) else 0.0
        flops["generation"] = float(forward)
    return flops


def compute_plan(
    config: Mapping[str, Any],
    stage: Stage,
    layout: Layout,
    gpu: Gpu,
    rows: int,
    mfu: float = 0.35,
) -> Plan:
    """Compute the whole account of a stage.

    Args:
        config: a whole scale.
        stage: "sft" or "grpo".
        layout: how the training is spread, and what a row holds.
        gpu: the card of each process.
        rows: number of training samples.
        mfu: share of the card's peak that is reached, 0..1.
    """
    section = config[stage]
    model = memory.build_shapes(config, stage)
    parts = memory.compute_static_memory(model, config, stage, layout)
    on_gpu = gpu is not CPU
    parts |= memory.compute_training_memory(model, config, stage, layout, on_gpu)
    parts["runtime"] = RUNTIME if on_gpu else 0.0
    if section.get("use_vllm") and section.get("vllm_mode", "colocate") == "colocate":
        share = section.get("vllm_gpu_memory_utilization", 0.3)
        parts["vLLM"] = share * gpu.memory_gb * 1e9
    parameters, base = models.count_parameters(model), models.get_base_model(model)
    batch = _count_batch(section, stage, layout)
    flops = _count_flops(parameters, base, section, stage, layout, batch)
    speed = layout.processes * gpu.flops * mfu
    seconds = {name: number / speed for name, number in flops.items()}
    if stage == "grpo":  # every token reads the weights once for all rows together
        weights = parts["weights"] * layout.weight_shards
        seconds["generation"] += layout.reply * weights / (gpu.bandwidth * READING)
    limit, epochs = section.get("max_steps") or 0, section.get("num_train_epochs", 3)
    updates = limit if limit > 0 else math.ceil(epochs * rows / batch["prompts"])
    return Plan(stage, layout, gpu, parts, parameters, batch, updates, flops, seconds)


# ---------------------------------------------------------------- what would help


def _list_variants(
    config: Mapping[str, Any], stage: Stage, layout: Layout
) -> dict[str, tuple[Mapping[str, Any], Layout]]:
    """Return settings next to this one, by the option to change: (config, layout)."""
    section = config[stage]
    found: dict[str, tuple[Mapping[str, Any], Layout]] = {}

    def changed(where: str, **values: Any) -> dict[str, Any]:
        return {**config, where: {**config[where], **values}}

    for adapter in ("lora", "qlora"):
        if config["sft"].get("adapter", "lora") not in (adapter, "qlora"):
            found[f"sft.adapter={adapter}"] = changed("sft", adapter=adapter), layout
    if not section.get("activation_checkpointing", False):
        made = changed(stage, activation_checkpointing=True)
        found[f"{stage}.activation_checkpointing=true"] = made, layout
    size = section.get("per_device_train_batch_size", 8)
    steps = section.get("gradient_accumulation_steps", 1)
    least = section.get("num_generations", 8) if stage == "grpo" else 1
    if size % 2 == 0 and size // 2 >= least:
        half = {"per_device_train_batch_size": size // 2}
        made = changed(stage, **half, gradient_accumulation_steps=2 * steps)
        name = f"{stage}.per_device_train_batch_size={size // 2}"
        found[f"{name} (accumulation {2 * steps})"] = made, layout
    for strategy in ("zero2", "zero3"):
        if layout.strategy not in ("single", strategy, "zero3", "fsdp2"):
            other = dataclasses.replace(layout, strategy=strategy)
            found[f"launch.strategy={strategy}"] = config, other
    if steps % 2 == 0 and (layout.state_shards > 1 or layout.processes == 1):
        twice = 2 * layout.processes
        strategy = "zero3" if layout.strategy == "single" else layout.strategy
        wider = dataclasses.replace(layout, strategy=strategy, processes=twice)
        made = changed(stage, gradient_accumulation_steps=steps // 2)
        found[f"launch.processes={twice} ({strategy})"] = made, wider
    if pixels := config["model"].get("max_pixels"):
        fewer = layout.images // 2
        shorter = dataclasses.replace(
            layout,
            images=fewer,
            tokens=layout.tokens - fewer,
            typical=max(layout.reply + 1, layout.typical - fewer),
        )
        made = changed("model", max_pixels=pixels // 2)
        found[f"model.max_pixels={pixels // 2}"] = made, shorter
    return found


def rank_variants(
    config: Mapping[str, Any], plan: Plan, rows: int, mfu: float, count: int = 3
) -> list[tuple[str, Plan]]:
    """Return the `count` single changes that lower the peak most, with their plans."""
    variants = _list_variants(config, plan.stage, plan.layout)
    options = [
        (name, compute_plan(other, plan.stage, layout, plan.gpu, rows, mfu))
        for name, (other, layout) in variants.items()
    ]
    options = [(name, other) for name, other in options if other.peak < plan.peak]
    return sorted(options, key=lambda option: option[1].peak)[:count]

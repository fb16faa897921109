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
from univg_nb.launch.memory import (
    PHASES,
    Layout,
    Stage,
    architecture,
    build,
    static_memory,
    training_memory,
)

RUNTIME = 1.5e9  # bytes of CUDA context, libraries, fragmentation: an assumption
READING = 0.5  # share of the memory bandwidth that generation reaches: an assumption


@dataclass(frozen=True)
class Gpu:
    """A card: memory in GB (10^9 bytes), dense bf16 FLOP/s, memory bytes/s.

    Figures are those of the makers' data sheets.
    """

    memory_gb: float
    flops: float
    bandwidth: float


GPUS = {
    "H200-141G": Gpu(141, 989e12, 4.8e12),
    "H100-80G": Gpu(80, 989e12, 3.35e12),
    "H20-96G": Gpu(96, 148e12, 4.0e12),
    "A100-80G": Gpu(80, 312e12, 2.04e12),
    "A100-40G": Gpu(40, 312e12, 1.56e12),
    "L40S-48G": Gpu(48, 362e12, 0.86e12),
    "L4-24G": Gpu(24, 121e12, 0.3e12),
    "RTX4090-24G": Gpu(24, 165e12, 1.01e12),
    "RTX5090-32G": Gpu(32, 209e12, 1.79e12),
}
CPU = Gpu(16, 5e10, 2e10)  # two laptop cores: an assumption


def find_gpu(name: str) -> Gpu:
    """The card of that name; ValueError with a suggestion otherwise."""
    if name == "cpu":
        return CPU
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}{suggestion(name, GPUS)}")
    return GPUS[name]


@dataclass
class Plan:
    """The account of one stage. memory: bytes per process, by component."""

    stage: Stage
    layout: Layout
    gpu: Gpu
    memory: dict[str, float]
    parameters: dict[str, dict[str, int]]
    batch: dict[str, int]  # rows (or completions), prompts, tokens of one update
    updates: int
    flops: dict[str, float]  # of one update, all processes together
    seconds: dict[str, float]  # of one update, by part

    @property
    def peak(self) -> float:
        """Bytes at the worst moment: what always lies there, and the larger of what
        training and generating add."""
        parts = self.memory
        always = sum(size for name, size in parts.items() if name not in PHASES)
        training = parts["activations"] + parts["logits"]
        return always + max(training, parts["KV cache"] + parts["vision"])

    @property
    def fits(self) -> bool:
        return self.peak <= self.gpu.memory_gb * 1e9

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) * self.updates / 3600


def batch_of(config: Mapping[str, Any], stage: Stage, layout: Layout) -> dict[str, int]:
    """Rows, prompts and tokens of one update over all processes."""
    section = config[stage]
    rows = (
        section.get("per_device_train_batch_size", 8)
        * section.get("gradient_accumulation_steps", 1)
        * layout.processes
    )
    group = section.get("num_generations", 8) if stage == "grpo" else 1
    prompts = rows // group
    prompt = layout.typical - layout.reply
    tokens = prompts * prompt + rows * layout.reply
    return {"rows": rows, "prompts": prompts, "tokens": tokens}


def flops_of(
    parameters: Mapping[str, Mapping[str, int]],
    model: Any,
    config: Mapping[str, Any],
    stage: Stage,
    layout: Layout,
) -> dict[str, float]:
    """FLOPs of one update by part. A weight costs 2 per token forward, 2 for the
    gradient of its input, 2 more if it is trained; attention 4 T^2 d a layer and row,
    half of it masked; checkpointing runs the forward pass twice."""
    base = models.get_base_model(model)
    text = base.config.get_text_config()
    merge = base.config.vision_config.spatial_merge_size**2
    batch, section = batch_of(config, stage, layout), config[stage]
    embedding = (
        0 if base.config.tie_word_embeddings else (text.vocab_size * text.hidden_size)
    )
    language = parameters["language"]["parameters"] - embedding
    language += parameters["adapter"]["parameters"]
    trained = parameters["total"]["trainable"]
    passes = 1 + bool(section.get("activation_checkpointing", False))
    attention = 2 * layout.typical * text.hidden_size * text.num_hidden_layers
    forward = (2 * language + attention) * batch["tokens"]
    backward = (2 * language + 2 * attention + 2 * trained) * batch["tokens"]
    seen = batch["prompts"] * layout.images * merge
    made = {
        "vision": 2.0 * parameters["vision"]["parameters"] * seen,
        "training": float(passes * forward + backward),
    }
    if stage == "grpo":
        made["reference"] = float(forward) if section.get("beta", 0.04) else 0.0
        made["generation"] = float(forward)
    return made


def seconds_of(
    flops: Mapping[str, float],
    memory: Mapping[str, float],
    config: Mapping[str, Any],
    layout: Layout,
    gpu: Gpu,
    mfu: float,
) -> dict[str, float]:
    """Seconds of one update: computing at `mfu`, and generation token by token, each
    of which reads the weights once for all rows that are generated together."""
    speed = layout.processes * gpu.flops * mfu
    seconds = {name: number / speed for name, number in flops.items()}
    if "generation" in flops:
        weights = memory["weights"] * layout.weight_shards
        reading = layout.reply * weights / (gpu.bandwidth * READING)
        seconds["generation"] += reading
    return seconds


def plan(
    config: Mapping[str, Any],
    stage: Stage,
    layout: Layout,
    gpu: Gpu,
    rows: int,
    mfu: float = 0.35,
) -> Plan:
    """The whole account of a stage over `rows` training samples."""
    section = config[stage]
    model = build(config, stage)
    memory = static_memory(model, config, stage, layout)
    on_gpu = gpu is not CPU
    memory |= training_memory(model, config, stage, layout, on_gpu)
    memory["runtime"] = RUNTIME if on_gpu else 0.0
    colocated = section.get("vllm_mode", "colocate") == "colocate"
    if section.get("use_vllm") and colocated:
        share = section.get("vllm_gpu_memory_utilization", 0.3)
        memory["vLLM"] = share * gpu.memory_gb * 1e9
    parameters = models.count_parameters(model)
    batch = batch_of(config, stage, layout)
    flops = flops_of(parameters, model, config, stage, layout)
    limit = section.get("max_steps") or 0
    epochs = section.get("num_train_epochs", 3)
    updates = limit if limit > 0 else math.ceil(epochs * rows / batch["prompts"])
    seconds = seconds_of(flops, memory, config, layout, gpu, mfu)
    return Plan(stage, layout, gpu, memory, parameters, batch, updates, flops, seconds)


def vision_config(name_or_path: str) -> Any:
    """The vision part of a model's configuration."""
    return architecture(name_or_path).vision_config


# ---------------------------------------------------------------- what would help


def variants(
    config: Mapping[str, Any], stage: Stage, layout: Layout
) -> dict[str, tuple[dict[str, Any], Layout]]:
    """Settings next to this one, by the option to change: (config, layout)."""
    section, found = config[stage], {}

    def changed(where: str, **values: Any) -> dict[str, Any]:
        return {**config, where: {**config[where], **values}}

    for adapter in ("lora", "qlora"):
        if config["sft"].get("adapter", "lora") not in (adapter, "qlora"):
            found[f"sft.adapter={adapter}"] = changed("sft", adapter=adapter), layout
    if not section.get("activation_checkpointing", False):
        made = changed(stage, activation_checkpointing=True)
        found[f"{stage}.activation_checkpointing=true"] = made, layout
    size = section.get("per_device_train_batch_size", 8)
    least = section.get("num_generations", 8) if stage == "grpo" else 1
    if size % 2 == 0 and size // 2 >= least:
        more = 2 * section.get("gradient_accumulation_steps", 1)
        made = changed(
            stage,
            per_device_train_batch_size=size // 2,
            gradient_accumulation_steps=more,
        )
        name = f"{stage}.per_device_train_batch_size={size // 2} (accumulation {more})"
        found[name] = made, layout
    for strategy in ("zero2", "zero3"):
        if layout.strategy not in ("single", strategy, "zero3", "fsdp2"):
            other = dataclasses.replace(layout, strategy=strategy)
            found[f"launch.strategy={strategy}"] = config, other
    twice = 2 * layout.processes
    strategy = "zero3" if layout.strategy == "single" else layout.strategy
    steps = section.get("gradient_accumulation_steps", 1)
    if steps % 2 == 0 and (layout.state_shards > 1 or layout.processes == 1):
        wider = dataclasses.replace(layout, strategy=strategy, processes=twice)
        made = changed(stage, gradient_accumulation_steps=steps // 2)
        found[f"launch.processes={twice} ({strategy})"] = made, wider
    pixels = config["model"].get("max_pixels")
    if pixels:
        fewer = layout.images // 2
        shorter = dataclasses.replace(
            layout,
            images=fewer,
            tokens=layout.tokens - fewer,
            typical=max(layout.reply + 1, layout.typical - fewer),
        )
        name = f"model.max_pixels={pixels // 2}"
        found[name] = changed("model", max_pixels=pixels // 2), shorter
    return found


def knobs(
    config: Mapping[str, Any], made: Plan, rows: int, mfu: float, count: int = 3
) -> list[tuple[str, Plan]]:
    """The `count` single changes that lower the peak most, with their plans."""
    options = [
        (name, plan(other, made.stage, layout, made.gpu, rows, mfu))
        for name, (other, layout) in variants(config, made.stage, made.layout).items()
    ]
    options = [(name, other) for name, other in options if other.peak < made.peak]
    return sorted(options, key=lambda option: option[1].peak)[:count]

"""What a training costs: FLOPs, hours, price, whether it fits, and what would help.

Times are a model, not a measurement: FLOPs over the card's peak times a stated share
of it (MFU), plus generation, which is bound by reading the weights once per token.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from univg_nb import models
from univg_nb.config import override, suggestion
from univg_nb.io import read_asset
from univg_nb.launch.memory import PHASES, Layout, Stage, Training

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


class Plan(Training):
    """The account of one stage on a card.

    Attributes:
        memory: bytes per process, by component.
        parameters: from `models.count_parameters`.
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
        super().__init__(config, stage, layout)
        self.gpu, self.samples, self.mfu = gpu, samples, mfu
        section, on_gpu = self.section, gpu is not CPU
        self.memory = self.compute_static_memory()
        self.memory |= self.compute_training_memory(on_gpu)
        self.memory["runtime"] = RUNTIME if on_gpu else 0.0
        if (
            section.get("use_vllm")
            and section.get("vllm_mode", "colocate") == "colocate"
        ):
            share = section.get("vllm_gpu_memory_utilization", 0.3)
            self.memory["vLLM"] = share * gpu.memory_gb * 1e9
        self.parameters = models.count_parameters(self.model)
        rows = self.rows * self.steps * layout.processes
        prompts = rows // self.group
        tokens = prompts * (layout.typical - layout.reply) + rows * layout.reply
        self.batch = {"rows": rows, "prompts": prompts, "tokens": tokens}
        limit, epochs = (
            section.get("max_steps") or 0,
            section.get("num_train_epochs", 3),
        )
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
        return always + max(training, parts["KV cache"] + parts["vision"])

    @property
    def fits(self) -> bool:
        """Whether the peak fits into the card."""
        return self.peak <= self.gpu.memory_gb * 1e9

    @property
    def hours(self) -> float:
        """Hours of the whole training."""
        return sum(self.seconds.values()) * self.updates / 3600

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
        attention = 2 * self.layout.typical * text.hidden_size * text.num_hidden_layers
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


def rank_variants(plan: Plan, count: int = 3) -> list[tuple[str, Plan]]:
    """Return the `count` single changes that lower the peak most, with their plans.

    Each is named by the option to set.
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
        fewer = layout.images // 2
        shorter = replace(
            layout,
            images=fewer,
            tokens=layout.tokens - fewer,
            typical=max(layout.reply + 1, layout.typical - fewer),
        )
        add(f"model.max_pixels={pixels // 2}", layout=shorter)
    better = [item for item in found.items() if item[1].peak < plan.peak]
    return sorted(better, key=lambda item: item[1].peak)[:count]

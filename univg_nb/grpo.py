"""Stage 2: GRPO with difficulty-aware weights, on TRL's GRPOTrainer.

    python -m univg_nb.grpo CONFIG.yaml --sft-adapter runs/NAME/sft_lora/adapter

TRL does the method. What the paper adds is the weight phi of a group's mean IoU. It is
put on the advantages, which equals putting it on the clipped surrogate and leaves the
KL alone. The mean is taken over the gathered group, so that no layout of batches and
processes changes it (PF sec. 9, T2).

The policy goes on training the SFT adapter. The KL reference is the SFT model: TRL
keeps a frozen copy of the adapter as "ref", so no second copy of the base weights.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig

from univg_nb import models, rollouts, runs, samples
from univg_nb.difficulty import difficulty_weight, group_mean_iou
from univg_nb.prompts import user_text
from univg_nb.rewards import format_reward, iou_reward
from univg_nb.samples import GroundingSample
from univg_nb.shared_trainer import SharedPrefixGRPOTrainer

IOU, FORMAT = 0, 1  # columns of the reward matrix
OWN_OPTIONS = ("weight", "power", "unit_mean", "freeze_vision")  # the rest are TRL's


class DifficultyGRPOTrainer(SharedPrefixGRPOTrainer):
    """GRPO whose groups are weighted by their difficulty.

    weight, power, unit_mean, constant: as in `difficulty.difficulty_weight`.
    rollout_log: rollouts.jsonl, or None. Rows of `train_dataset`: see `to_rows`.
    """

    def __init__(
        self,
        model: Any,
        args: GRPOConfig,
        *,
        weight: str = "exp",
        power: float = 1.0,
        unit_mean: bool = False,
        constant: float = 1.0,
        rollout_log: Path | None = None,
        **others: Any,
    ) -> None:
        self.weight_options = {
            "form": weight,
            "power": power,
            "unit_mean": unit_mean,
            "constant": constant,
        }
        # A wrong form fails here and not after the first rollout.
        difficulty_weight(torch.zeros(1), **self.weight_options)
        super().__init__(
            model, args, reward_funcs=[iou_reward, format_reward], **others
        )
        self.rollout_log = rollout_log

    def _calculate_rewards(
        self, inputs: list, prompts: list, completions: list, completion_ids_list: list
    ) -> Tensor:
        """TRL's; keeps the gathered rewards and this process's replies."""
        began = time.perf_counter()
        self.gathered_rewards = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )  # (N, 2) of all processes, groups adjacent
        self.local_replies = [
            rollouts.Reply(
                row["sample_id"],
                row["task"],
                completion[-1]["content"],
                len(ids),
                ids[-1] not in self.eos_token_ids,
            )
            for row, completion, ids in zip(
                inputs, completions, completion_ids_list, strict=True
            )
        ]
        self._record_seconds("reward", began)
        return self.gathered_rewards

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        """TRL's; then this process's advantages times its groups' weights."""
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            weights = self._group_weights()
            self._log_groups(output["advantages"], weights)
            rank, rows = self.accelerator.process_index, len(inputs)
            mine = weights.repeat_interleave(self.num_generations)
            mine = mine[rank * rows : (rank + 1) * rows]
            output["advantages"] = output["advantages"] * mine
        return output

    def _group_weights(self) -> Tensor:
        """phi of every group of all processes, (groups,)."""
        self.mean_iou = group_mean_iou(
            self.gathered_rewards[:, IOU], self.num_generations
        )
        return difficulty_weight(self.mean_iou, **self.weight_options)

    def _log_groups(self, advantages: Tensor, weights: Tensor) -> None:
        totals = (self.gathered_rewards * self.reward_weights.to(weights.device)).sum(1)
        summary = rollouts.group_summary(
            self.mean_iou, weights, totals.view(-1, self.num_generations)
        )
        for name, value in summary.items():
            self._metrics["train"][name].append(value)
        if self.rollout_log is None:
            return
        advantages = self.accelerator.gather(advantages)
        replies = gather_object(self.local_replies)
        if self.accelerator.is_main_process:
            for row in rollouts.group_rows(
                self.state.global_step + 1,
                replies,
                self.gathered_rewards[:, IOU],
                self.gathered_rewards[:, FORMAT],
                totals,
                advantages,
                weights,
            ):
                runs.append_jsonl(self.rollout_log, row)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"GRPO loss is {loss.item()} at update {self.state.global_step + 1}: "
                "lower grpo.learning_rate or grpo.max_grad_norm, or raise grpo.beta; "
                "the last rows of rollouts.jsonl show the replies it came from"
            )
        return loss


class MetricsWriter(TrainerCallback):
    """metrics.jsonl: one row per update, `step` from 1, `seconds` since the start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = time.perf_counter()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and logs and "reward" in logs:
            seconds = round(time.perf_counter() - self.began, 3)
            row = {"step": state.global_step, **logs, "seconds": seconds}
            runs.append_jsonl(self.path, row)


def to_rows(train: Sequence[GroundingSample], style: str = "univg") -> Dataset:
    """Rows for TRL. Images stay paths and are opened when their turn comes.

    TRL puts the images in front of the text. `cot` False is the single-image mode,
    whose prompt asks for no chain and whose format reward for a bare box.
    """
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": user_text(sample, style)}],
                "images": list(sample.images),
                "answer": [float(v) for v in sample.answer],
                "cot": sample.cot,
                "sample_id": sample.id,
                "task": sample.task,
            }
            for sample in train
        ]
    )


def grpo_config(section: Mapping[str, Any], out: Path, num_samples: int) -> GRPOConfig:
    """The `grpo` section as GRPOConfig; ValueError for a layout that cannot be."""
    gpu = torch.cuda.is_available()
    options = {
        "output_dir": str(out / "checkpoints"),
        "loss_type": "grpo",
        "beta": 0.04,
        # TRL's own default multiplies the KL by the policy ratio; the paper's does not.
        "use_bias_correction_kl": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_total_limit": 2,
        "bf16": gpu,
        "gradient_checkpointing": gpu,
        "dataloader_pin_memory": gpu,
        **{key: value for key, value in section.items() if key not in OWN_OPTIONS},
        "remove_unused_columns": False,
        "log_multimodal": False,  # images are on disk; rollouts.jsonl has the rest
    }
    size = options.get("num_generations", 8)
    if size < 2:
        raise ValueError(
            f"grpo.num_generations = {size}: an advantage compares the replies of a "
            "group, so it takes at least 2 (the paper: 8)"
        )
    world = PartialState().num_processes
    accumulation = options.get("gradient_accumulation_steps", 1)
    steps = options.get("steps_per_generation") or accumulation
    batch = options.get("generation_batch_size") or (
        options.get("per_device_train_batch_size", 8) * world * steps
    )
    if batch % size:
        raise ValueError(
            f"{batch} completions a generation (grpo.per_device_train_batch_size x "
            f"{world} processes x {steps} steps) do not divide into groups of "
            f"{size}; make per_device_train_batch_size x steps a multiple of "
            "grpo.num_generations"
        )
    if num_samples < batch // size:
        raise ValueError(
            f"{num_samples} training samples, but one generation takes {batch // size} "
            "prompts: TRL would drop them all and train nothing; give more samples or "
            "lower grpo.per_device_train_batch_size"
        )
    return GRPOConfig(**options)


def build_trainer(
    config: Mapping[str, Any],
    out: Path,
    train: Sequence[GroundingSample],
    sft_adapter: Path,
    callbacks: Sequence[TrainerCallback] = (),
    **weight_options: Any,
) -> DifficultyGRPOTrainer:
    """Everything up to the first update."""
    section = config["grpo"]
    arguments = grpo_config(section, out, len(train))
    quantize = "nf4" if config["sft"].get("adapter") == "qlora" else None
    model, processor = models.load(config["model"], sft_adapter, True, quantize)
    if section.get("freeze_vision", True):
        models.freeze_vision(model)
    exact = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and quantize
    }
    trainer = DifficultyGRPOTrainer(
        model=model,
        args=arguments,
        train_dataset=to_rows(train),
        processing_class=processor,
        callbacks=list(callbacks),
        **weight_options,
    )
    # TRL rounds the adapter of a quantised model to bf16, but not its reference copy.
    for name, parameter in model.named_parameters():
        if name in exact:
            parameter.data = exact[name].to(parameter.device)
    return trainer


def train(
    config: dict[str, Any],
    out: str | Path,
    train: Sequence[GroundingSample],
    *,
    sft_adapter: str | Path,
    weight: str | None = None,
    unit_mean: bool | None = None,
    constant: float = 1.0,
) -> dict[str, Any]:
    """GRPO from an SFT adapter.

    Writes out/{config.yaml, metrics.jsonl, rollouts.jsonl, adapter/, summary.json} and
    returns the summary. config: a whole scale; weight, unit_mean override its grpo
    section. sft_adapter: the adapter folder of stage 1 (or a fully trained model's).
    The new adapter takes its place: it is loaded the same way, on the same base.

    Raises ValueError for an impossible layout or option, FloatingPointError for a loss
    that is not finite.
    """
    out = Path(out)
    section = dict(config["grpo"])
    if weight is not None:
        section["weight"] = weight
    if unit_mean is not None:
        section["unit_mean"] = unit_mean
    config = {**config, "grpo": section}
    metrics = MetricsWriter(out / "metrics.jsonl")
    trainer = build_trainer(
        config,
        out,
        train,
        Path(sft_adapter),
        [metrics],
        weight=section.get("weight", "exp"),
        power=section.get("power", 1.0),
        unit_mean=section.get("unit_mean", False),
        constant=constant,
        rollout_log=out / "rollouts.jsonl",
    )
    if trainer.is_world_process_zero():
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            (out / name).unlink(missing_ok=True)
        runs.write_text(out / "config.yaml", runs.dump(config))
    metrics.began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - metrics.began
    trainer.save_model(str(out / "adapter"))
    summary = summarize(trainer, out, seconds, sft_adapter)
    if trainer.is_world_process_zero():
        # PEFT saves the frozen reference too; that is the SFT adapter, where it was.
        shutil.rmtree(out / "adapter" / "ref", ignore_errors=True)
        runs.write_json(out / "summary.json", summary)
    return summary


def summarize(
    trainer: DifficultyGRPOTrainer, out: Path, seconds: float, sft_adapter: str | Path
) -> dict[str, Any]:
    """What a training did: means over the first and last tenth of its updates."""
    rows = runs.read_jsonl(out / "metrics.jsonl")
    part = max(1, len(rows) // 10)

    def mean(key: str, some: list[dict[str, Any]]) -> float:
        return sum(row[key] for row in some) / len(some)

    return {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 3),
        "seconds_per_update": round(seconds / max(1, trainer.state.global_step), 3),
        "reward_first": mean("reward", rows[:part]),
        "reward_last": mean("reward", rows[-part:]),
        "mean_iou_first": mean("groups/mean_iou", rows[:part]),
        "mean_iou_last": mean("groups/mean_iou", rows[-part:]),
        "weight": trainer.weight_options,
        "sft_adapter": str(sft_adapter),
        "parameters": models.parameter_account(trainer.model),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; also what `accelerate launch -m univg_nb.grpo` runs."""
    parser = argparse.ArgumentParser(prog="python -m univg_nb.grpo")
    parser.add_argument("config", help="a shipped scale's name or a .yaml file")
    parser.add_argument("--sft-adapter", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="default runs/SCALE/grpo_WEIGHT")
    parser.add_argument("--data", type=Path, help="default: data.stage2_file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE"
    )
    options = parser.parse_args(argv)
    config = runs.load_scale(options.config)
    for assignment in options.set:
        config = runs.override(config, assignment)
    data, scale = config["data"], Path(options.config).stem
    path = (
        options.data or data.get("stage2_file") or f"runs/{scale}/data/stage2_rl.json"
    )
    rows = samples.read(path, image_root=data.get("image_root"))[: data.get("stage2")]
    weight = config["grpo"].get("weight", "exp")
    out = options.out or Path("runs") / scale / f"grpo_{weight}"
    summary = train(config, out, rows, sft_adapter=options.sft_adapter)
    print({key: value for key, value in summary.items() if key != "parameters"})


if __name__ == "__main__":
    main()

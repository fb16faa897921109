"""The trainer of stage 2: GRPO with difficulty weights.

The weight phi of a group's mean IoU is put on the advantages, which equals putting it
on the clipped surrogate and leaves the KL alone. The mean is taken over the gathered
group, so that no layout of batches and processes changes it (docs/paper_facts.md#t2).
The trainer also bounds the KL, stops trainings that learn nothing, logs every group,
and saves what an exact resume needs.
"""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from packaging.version import Version
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from univg_nb import io
from univg_nb.fast.trainer import SharedPrefixGRPOTrainer
from univg_nb.train import rollouts
from univg_nb.train.difficulty import (
    BINS,
    difficulty_bin,
    difficulty_weight,
    group_mean_iou,
    rescale_factor,
)
from univg_nb.train.final_norm import find_trained_norm, set_norm_learning_rate
from univg_nb.train.rewards import format_reward, iou_reward

IOU, FORMAT = 0, 1  # columns of the reward matrix
KL_EXPONENT = 10.0  # largest log(reference / policy) of a token in the KL: e^10 = 22026
KL_BROKEN = 0.1  # share of an update's tokens at that limit that stops the training


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler with an order that a resumed run finds again.

    It is a function of (seed, epoch), and not of a generator that no checkpoint holds.
    """

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Any:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class DifficultyGRPOTrainer(SharedPrefixGRPOTrainer):
    """GRPO whose groups are weighted by their difficulty.

    Args:
        model: as for SharedPrefixGRPOTrainer, as are `args` and `others`.
        args: GRPOConfig.
        weight: the `form` of `difficulty.difficulty_weight`.
        power: see there, as for unit_mean and constant.
        unit_mean: see there.
        constant: see there.
        rescale: the way of `difficulty.rescale_factor`.
        max_zero_updates: so many generations in a row without any reward are an error.
        norm_learning_rate: see `final_norm`.
        rollout_log: rollouts.jsonl, or None.
        **others: further arguments; for the rows see `grpo.to_rows`.
    """

    epoch_sampler: EpochRepeatSampler | None = None

    def __init__(
        self,
        model: Any,
        args: GRPOConfig,
        *,
        weight: str = "exp",
        power: float = 1.0,
        unit_mean: bool = False,
        constant: float = 1.0,
        rescale: str = "none",
        max_zero_updates: int = 20,
        norm_learning_rate: float | None = None,
        rollout_log: Path | None = None,
        **others: Any,
    ) -> None:
        self.weight_options: dict[str, Any] = {"form": weight, "power": power}
        self.weight_options |= {"unit_mean": unit_mean, "constant": constant}
        self.rescale = rescale
        # A wrong name fails here and not after the first rollout.
        difficulty_weight(torch.zeros(1), **self.weight_options)
        rescale_factor(torch.zeros(1, 2), rescale)
        super().__init__(
            model, args, reward_funcs=[iou_reward, format_reward], **others
        )
        self.rollout_log = rollout_log
        self.max_zero_updates = max_zero_updates
        self.norm_learning_rate = norm_learning_rate
        self.zero_updates = 0
        self.policy_pass: tuple | None = None  # of the batch whose loss is computed
        self.sums = torch.zeros(2 * len(BINS) + 2, dtype=torch.float64)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create TRL's, with the last norm in a group of its own if it is trained."""
        made = self.optimizer
        optimizer = super().create_optimizer(model)
        if made is None and self.norm_learning_rate is not None:
            norm = find_trained_norm(self.model)
            set_norm_learning_rate(optimizer, norm, self.norm_learning_rate)
        return optimizer

    # ------------------------------------------------------------ rewards and weights

    def _calculate_rewards(
        self, inputs: list, prompts: list, completions: list, completion_ids_list: list
    ) -> Tensor:
        """Run TRL's; keep the gathered rewards and this process's replies."""
        began = time.perf_counter()
        self.gathered_rewards = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )  # (N, 2) of all processes, groups adjacent
        rows = zip(inputs, completions, completion_ids_list, strict=True)
        self.local_replies = [
            {
                "sample_id": row["sample_id"],
                "task": row["task"],
                "text": completion[-1]["content"],
                "length": len(ids),
                "truncated": ids[-1] not in self.eos_token_ids,
            }
            for row, completion, ids in rows
        ]
        self._record_seconds("reward", began)
        return self.gathered_rewards

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        """Run TRL's; multiply this process's advantages by its groups' weights."""
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            advantages = output["advantages"]
            totals = self.gathered_rewards @ self.reward_weights.to(advantages)
            totals = totals.view(-1, self.num_generations)  # (groups, G)
            weights = self._compute_weights(totals)
            self._log_groups(totals, advantages, weights)
            self._check_rewards(totals)
            output["advantages"] = advantages * self._take_rows(weights)
            output["mean_iou"] = self._take_rows(self.mean_iou)
        return output

    def _compute_weights(self, totals: Tensor) -> Tensor:
        """Compute the factor of the advantages of all processes' groups, (groups,)."""
        ious = self.gathered_rewards[:, IOU]
        self.mean_iou = group_mean_iou(ious, self.num_generations)
        weights = difficulty_weight(self.mean_iou, **self.weight_options)
        return weights * rescale_factor(totals, self.rescale)

    def _take_rows(self, values: Tensor) -> Tensor:
        """Turn (groups,) of all processes into (rows,) of this one."""
        rows = values.repeat_interleave(self.num_generations)
        share = len(rows) // self.accelerator.num_processes
        return rows[self.accelerator.process_index * share :][:share]

    def _log_groups(self, totals: Tensor, advantages: Tensor, weights: Tensor) -> None:
        summary = rollouts.summarize_groups(self.mean_iou, weights, totals)
        for name, value in summary.items():
            self._metrics["train"][name].append(value)
        if self.rollout_log is None:
            return
        advantages = self.accelerator.gather(advantages)
        replies = gather_object(self.local_replies)
        columns = {"iou": self.gathered_rewards[:, IOU]}
        columns |= {"format": self.gathered_rewards[:, FORMAT]}
        columns |= {"rewards": totals.flatten(), "advantages": advantages}
        # One process writes the file (docs/paper_facts.md#t11).
        if self.accelerator.is_main_process:
            step = self.state.global_step + 1
            for row in rollouts.make_group_rows(step, replies, weights, columns):
                io.append_jsonl(self.rollout_log, row)

    def _check_rewards(self, totals: Tensor) -> None:
        self.zero_updates = 0 if totals.any() else self.zero_updates + 1
        if self.zero_updates >= self.max_zero_updates:
            raise ValueError(
                f"no reply of the last {self.zero_updates} generations had any reward, "
                "not even for its format, so nothing is learned: read them in "
                "rollouts.jsonl; train stage 1 longer, raise "
                "grpo.max_completion_length if replies are cut off, or wait longer "
                "with grpo.max_zero_updates"
            )

    # ------------------------------------------------------------ the loss, guarded

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's loss with a bounded KL; then what `_log_sums` writes."""
        self.row_groups = inputs["group"].tolist()
        made = self._run_policy_pass(model, inputs)
        logps, mask = made[0].detach(), inputs["completion_mask"].bool()
        bounded, clamped = dict(inputs), 0
        if "ref_per_token_logps" in inputs:
            # The KL of a token is e^d - d - 1, d = log(reference / policy). At the
            # bound its value and slope stay finite, and still pull back.
            most, reference = logps + KL_EXPONENT, inputs["ref_per_token_logps"]
            bounded["ref_per_token_logps"] = reference.minimum(most)
            clamped = int(((reference > most) & mask).sum())
        self.policy_pass = made
        loss = super().compute_loss(model, bounded, *args, **kwargs)
        self.policy_pass = None
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"GRPO loss is {loss.item()} at update {self.state.global_step + 1}: "
                "lower grpo.learning_rate or grpo.max_grad_norm, or raise grpo.beta; "
                "the last rows of rollouts.jsonl show the replies it came from"
            )
        if self.model.training:
            self._add_sums(logps, inputs, clamped)
            if self.accelerator.sync_gradients:
                self._log_sums()
        return loss

    def _run_policy_pass(self, model: Any, inputs: Any) -> tuple:
        """Compute the log-probs that TRL's loss of this batch will ask for."""
        theirs = GRPOTrainer._get_per_token_logps_and_entropies
        known = inspect.signature(theirs).parameters
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs[name] for name in known if name in inputs},
        )

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        if self.policy_pass is not None:
            return self.policy_pass
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _add_sums(self, logps: Tensor, batch: Any, clamped: int) -> None:
        """Add a micro-batch to the sums that `_log_sums` writes."""
        old, mask = batch.get("old_per_token_logps", logps), batch["completion_mask"]
        mask, epsilon = mask.bool(), (self.epsilon_low, self.epsilon_high)
        size = rollouts.compute_logit_gradient(
            logps, old, batch["advantages"], mask, epsilon
        )  # (B,)
        bins = [difficulty_bin(value) for value in batch["mean_iou"].tolist()]
        mine = torch.tensor([[name == found for found in bins] for name in BINS])
        mine = mine.to(size)  # (bins, B)
        found = [*(mine @ size).tolist(), *mine.sum(1).tolist()]
        self.sums += torch.tensor([*found, clamped, mask.sum().item()]).double()

    def _log_sums(self) -> None:
        """Log an update's mean gradient of each bin, and its tokens at the KL limit."""
        values = self.sums.to(self.accelerator.device, torch.float32)
        values = self.accelerator.reduce(values, reduction="sum").tolist()
        self.sums.zero_()
        *bins, clamped, tokens = values
        for i, name in enumerate(BINS):
            if rows := bins[len(BINS) + i]:
                self._metrics["train"][f"gradient/{name}"].append(bins[i] / rows)
        self._metrics["train"]["kl_clamped"].append(clamped)
        if clamped > KL_BROKEN * tokens:
            raise FloatingPointError(
                f"the KL explodes at update {self.state.global_step + 1}: "
                f"{clamped:.0f} of {tokens:.0f} tokens are over e^{KL_EXPONENT:.0f} "
                "times likelier under the reference than under the policy; lower "
                "grpo.learning_rate or grpo.num_iterations, or raise grpo.beta"
            )

    # ------------------------------------------------------------ exact resume

    def _get_train_sampler(self, dataset: Any = None) -> EpochRepeatSampler:
        """Return TRL's, with an order that a resumed run finds again."""
        theirs = super()._get_train_sampler(dataset)
        names = inspect.signature(RepeatSampler).parameters
        options = {name: getattr(theirs, name) for name in names}
        self.epoch_sampler = EpochRepeatSampler(**options)
        return self.epoch_sampler

    def _rollout_file(self, checkpoint: str | Path) -> Path:
        return Path(checkpoint) / f"rollouts_{self.accelerator.process_index}.pt"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save TRL's, and what it forgets: replies that later updates use again."""
        super()._save_checkpoint(model, trial)
        every = self.args.steps_per_generation * self.num_iterations
        state = {
            "processes": self.accelerator.num_processes,
            "step": self._step,
            "tokens": self._total_train_tokens,
            "zero_updates": self.zero_updates,
            "rollouts": self._buffered_inputs if self._step % every else None,
        }
        name = f"checkpoint-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial=trial)) / name
        torch.save(state, self._rollout_file(folder))

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        """Load as the Trainer does, which before 5.23 loads "ref" for the adapter."""
        super()._load_from_checkpoint(checkpoint, model)
        older = Version(transformers.__version__) < Version("5.23")
        if older and (Path(checkpoint) / "ref").is_dir():
            adapted = self.model if model is None else model
            adapted.load_adapter(checkpoint, "default", is_trainable=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path, device = self._rollout_file(checkpoint), self.accelerator.device
        if not path.is_file():  # more processes than before: replies are sampled anew
            return
        state = torch.load(path, map_location=device, weights_only=True)
        self._total_train_tokens = state["tokens"]
        self.zero_updates = state["zero_updates"]
        if state["processes"] == self.accelerator.num_processes:
            self._step = state["step"]
            self._buffered_inputs = state["rollouts"]

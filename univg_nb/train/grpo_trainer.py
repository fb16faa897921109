"""Stage 2's trainer: GRPO with difficulty weights, on TRL's GRPOTrainer.

The weight phi of a group's mean IoU is put on the advantages, which equals putting it
on the clipped surrogate and leaves the KL alone. The mean is taken over the gathered
group, so that no layout of batches and processes changes it (PF sec. 9, T2). Beside
that: what an exact resume needs, guards, and the log of every group.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from packaging.version import Version
from torch import Tensor
from trl import GRPOConfig
from trl.trainer.utils import RepeatSampler

from univg_nb import io
from univg_nb.fast.trainer import SharedPrefixGRPOTrainer
from univg_nb.train import rollouts
from univg_nb.train.difficulty import (
    BINS,
    difficulty_bin,
    difficulty_weight,
    group_mean_iou,
    rescaled,
)
from univg_nb.train.final_norm import find_trained_norm, set_norm_learning_rate
from univg_nb.train.rewards import format_reward, iou_reward

IOU, FORMAT = 0, 1  # columns of the reward matrix
KL_EXPONENT = 10.0  # largest log(reference / policy) of a token in the KL: e^10 = 22026
KL_BROKEN = 0.1  # share of an update's tokens at that limit that stops the training


class EpochRepeatSampler(RepeatSampler):
    """TRL's order of prompts as a function of (seed, epoch), so that a resumed run
    finds it again; TRL's own draws on, from a generator that no checkpoint has.
    """

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class DifficultyGRPOTrainer(SharedPrefixGRPOTrainer):
    """GRPO whose groups are weighted by their difficulty.

    weight, power, unit_mean, constant: as in `difficulty.difficulty_weight`; rescale:
    as in `difficulty.rescaled`. max_zero_updates: so many generations in a row without
    any reward are an error. norm_learning_rate: see `final_norm`. rollout_log:
    rollouts.jsonl, or None. Rows of `train_dataset`: see `grpo.to_rows`.
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
        self.weight_options = {
            "form": weight,
            "power": power,
            "unit_mean": unit_mean,
            "constant": constant,
        }
        # A wrong form fails here and not after the first rollout.
        difficulty_weight(torch.zeros(1), **self.weight_options)
        self.rescale = rescale
        rescaled(torch.zeros(1, 2), rescale)
        super().__init__(
            model, args, reward_funcs=[iou_reward, format_reward], **others
        )
        self.rollout_log = rollout_log
        self.max_zero_updates = max_zero_updates
        self.norm_learning_rate = norm_learning_rate
        self.zero_updates = 0
        self.scored: dict[str, Any] | None = None  # the batch whose loss is being taken
        self.sums = torch.zeros(2 * len(BINS) + 2, dtype=torch.float64)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """TRL's, the last norm in a group of its own if it is to be trained."""
        made = self.optimizer
        optimizer = super().create_optimizer(model)
        if made is None and self.norm_learning_rate is not None:
            set_norm_learning_rate(
                optimizer, find_trained_norm(self.model), self.norm_learning_rate
            )
        return optimizer

    # ------------------------------------------------------------ rewards and weights

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
            totals = self.gathered_rewards @ self.reward_weights.to(
                output["advantages"]
            )
            totals = totals.view(-1, self.num_generations)  # (groups, G)
            weights = self._group_weights(totals)
            self._log_groups(totals, output["advantages"], weights)
            self._check_rewards(totals)
            output["advantages"] = output["advantages"] * self._my_rows(weights)
            output["mean_iou"] = self._my_rows(self.mean_iou)
        return output

    def _group_weights(self, totals: Tensor) -> Tensor:
        """What every group's advantages are multiplied by, all processes, (groups,)."""
        self.mean_iou = group_mean_iou(
            self.gathered_rewards[:, IOU], self.num_generations
        )
        weights = difficulty_weight(self.mean_iou, **self.weight_options)
        return weights * rescaled(totals, self.rescale)

    def _my_rows(self, values: Tensor) -> Tensor:
        """(groups,) of all processes -> (rows,) of this one."""
        rows = values.repeat_interleave(self.num_generations)
        share = len(rows) // self.accelerator.num_processes
        return rows[self.accelerator.process_index * share :][:share]

    def _log_groups(self, totals: Tensor, advantages: Tensor, weights: Tensor) -> None:
        summary = rollouts.group_summary(self.mean_iou, weights, totals)
        for name, value in summary.items():
            self._metrics["train"][name].append(value)
        if self.rollout_log is None:
            return
        advantages = self.accelerator.gather(advantages)
        replies = gather_object(self.local_replies)
        if self.accelerator.is_main_process:  # T11: one process writes the file
            for row in rollouts.group_rows(
                self.state.global_step + 1,
                replies,
                self.gathered_rewards[:, IOU],
                self.gathered_rewards[:, FORMAT],
                totals.flatten(),
                advantages,
                weights,
            ):
                io.append_jsonl(self.rollout_log, row)

    # ------------------------------------------------------------ the loss, guarded

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.scored = dict(inputs)  # a copy: the reference's log-probs may be bounded
        loss = super().compute_loss(model, self.scored, *args, **kwargs)
        self.scored = None
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"GRPO loss is {loss.item()} at update {self.state.global_step + 1}: "
                "lower grpo.learning_rate or grpo.max_grad_norm, or raise grpo.beta; "
                "the last rows of rollouts.jsonl show the replies it came from"
            )
        if self.model.training and self.accelerator.sync_gradients:
            self._log_sums()
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        made = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self.scored is not None:
            self._bound_kl(made[0].detach(), self.scored)
        return made

    def _bound_kl(self, logps: Tensor, batch: dict[str, Any]) -> None:
        """Bound the exponent of k3 = e^d - d - 1 for the loss that is being taken, and
        sum up what `_log_sums` writes. d = log(reference / policy) of a token.
        """
        mask = batch["completion_mask"].bool()
        clamped = torch.zeros((), dtype=torch.long)
        if "ref_per_token_logps" in batch:
            most = logps + KL_EXPONENT  # value and slope stay finite, and pull back
            clamped = ((batch["ref_per_token_logps"] > most) & mask).sum()
            batch["ref_per_token_logps"] = batch["ref_per_token_logps"].minimum(most)
        if not self.model.training:
            return
        size = rollouts.logit_gradient(
            logps,
            batch.get("old_per_token_logps", logps),
            batch["advantages"],
            mask,
            (self.epsilon_low, self.epsilon_high),
        )  # (B,)
        bins = [difficulty_bin(value) for value in batch["mean_iou"].tolist()]
        mine = torch.tensor([[name == found for found in bins] for name in BINS])
        mine = mine.to(size)  # (bins, B)
        found = [*(mine @ size).tolist(), *mine.sum(1).tolist()]
        self.sums += torch.tensor([*found, clamped.item(), mask.sum().item()]).double()

    def _log_sums(self) -> None:
        """Over all micro-batches and processes of an update: the mean gradient of each
        difficulty bin, and the tokens at the KL's limit.
        """
        values = self.sums.to(self.accelerator.device, torch.float32)
        values = self.accelerator.reduce(values, reduction="sum").tolist()
        self.sums.zero_()
        count = len(BINS)
        for name, size, rows in zip(
            BINS, values[:count], values[count : 2 * count], strict=True
        ):
            if rows:
                self._metrics["train"][f"gradient/{name}"].append(size / rows)
        clamped, tokens = values[-2:]
        self._metrics["train"]["kl_clamped"].append(clamped)
        if clamped > KL_BROKEN * tokens:
            raise FloatingPointError(
                f"the KL explodes at update {self.state.global_step + 1}: "
                f"{clamped:.0f} of {tokens:.0f} tokens are over e^{KL_EXPONENT:.0f} "
                "times likelier under the reference than under the policy; lower "
                "grpo.learning_rate or grpo.num_iterations, or raise grpo.beta"
            )

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

    # ------------------------------------------------------------ exact resume

    def _get_train_sampler(self, dataset: Any = None) -> EpochRepeatSampler:
        """TRL's, with an order that a resumed run finds again."""
        theirs = super()._get_train_sampler(dataset)
        self.epoch_sampler = EpochRepeatSampler(
            theirs.data_source,
            theirs.mini_repeat_count,
            theirs.batch_size,
            theirs.repeat_count,
            theirs.shuffle,
            theirs.seed,
        )
        return self.epoch_sampler

    def _rollout_file(self, checkpoint: str | Path) -> Path:
        return Path(checkpoint) / f"rollouts_{self.accelerator.process_index}.pt"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's, and what it forgets: replies that later updates will use again."""
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
        """The Trainer's. Before transformers 5.23 it loads the reference and not the
        adapter that was trained, where a checkpoint has both.
        """
        super()._load_from_checkpoint(checkpoint, model)
        older = Version(transformers.__version__) < Version("5.23")
        if older and (Path(checkpoint) / "ref").is_dir():
            adapted = self.model if model is None else model
            adapted.load_adapter(checkpoint, "default", is_trainable=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = self._rollout_file(checkpoint)
        if not path.is_file():  # more processes than before: replies are sampled anew
            return
        state = torch.load(
            path, map_location=self.accelerator.device, weights_only=True
        )
        self._total_train_tokens = state["tokens"]
        self.zero_updates = state["zero_updates"]
        if state["processes"] == self.accelerator.num_processes:
            self._step = state["step"]
            self._buffered_inputs = state["rollouts"]

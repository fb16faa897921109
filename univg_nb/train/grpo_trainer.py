"""The trainer of stage 2: GRPO with difficulty weights.

The weight phi of a group's mean IoU is put on the advantages, which equals putting it
on the clipped surrogate and leaves the KL alone. The mean is taken over the gathered
group, so that no layout of batches and processes changes it (docs/paper_facts.md#t2).
The trainer also stops trainings that diverge or learn nothing, logs every group, and
saves what an exact resume needs.
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
from transformers import PreTrainedModel
from trl import GRPOConfig

from univg_nb import io
from univg_nb.data.conventions import PLAIN, BoxConvention, Pictures
from univg_nb.fast.trainer import SharedPrefixGRPOTrainer
from univg_nb.train import checkpoints, rollouts
from univg_nb.train.difficulty import (
    BINS,
    difficulty_bin,
    difficulty_weight,
    find_form,
    group_mean_iou,
    is_silent,
    rescale_factor,
)
from univg_nb.train.rewards import format_reward, iou_reward

IOU, FORMAT = 0, 1  # columns of the reward matrix
KL_FAR = 10.0  # log(reference / policy) of a token: e^10 = 22026 times less likely
KL_BROKEN = 0.1  # share of a micro-batch's tokens so far away that stops the training


class DifficultyGRPOTrainer(SharedPrefixGRPOTrainer):
    """GRPO whose groups are weighted by their difficulty.

    Args:
        model: as for SharedPrefixGRPOTrainer, as are `args` and `others`.
        args: GRPOConfig.
        weight: the form of `difficulty.difficulty_weight`, whose other options are
            `power`, `unit_mean` and `constant`.
        rescale: the way of `difficulty.rescale_factor`.
        max_zero_updates: so many generations in a row without any reward are an error.
        rollout_log: rollouts.jsonl, or None.
        convention: how the model writes boxes; rewards and the log read it.
        **others: further arguments; for the rows see `grpo.to_rows`.
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
        rescale: str = "none",
        max_zero_updates: int = 20,
        rollout_log: Path | None = None,
        convention: BoxConvention = PLAIN,
        **others: Any,
    ) -> None:
        self.weight_options: dict[str, Any] = {"form": weight, "power": power}
        self.weight_options |= {"unit_mean": unit_mean, "constant": constant}
        self.rescale = rescale
        # A wrong name fails here and not after the first rollout.
        self.form = find_form(weight)
        difficulty_weight(torch.zeros(1), **self.weight_options | {"form": self.form})
        rescale_factor(torch.zeros(1, 2), rescale)
        super().__init__(
            model, args, reward_funcs=[iou_reward, format_reward], **others
        )
        self.rollout_log, self.convention = rollout_log, convention
        self.max_zero_updates = max_zero_updates
        self.zero_updates = 0

    # ------------------------------------------------------------ rewards and weights

    def _calculate_rewards(
        self, inputs: list, prompts: Any, completions: list, *args: Any
    ) -> Tensor:
        """Run TRL's; keep the rewards of all processes, (N, 2), groups adjacent."""
        began = time.perf_counter()
        if self.convention != PLAIN:
            pairs = zip(inputs, completions, strict=True)
            texts = [self._read(row, turns[-1]["content"]) for row, turns in pairs]
            completions = [[{"role": "assistant", "content": one}] for one in texts]
        self.gathered_rewards = super()._calculate_rewards(
            inputs, prompts, completions, *args
        )
        self._record_seconds("reward", began)
        return self.gathered_rewards

    def _read(self, row: dict[str, Any], text: str) -> str:
        """Return a reply to a row as this project writes it."""
        return self.convention.read(text, Pictures(**row.get("pictures", {})))

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        """Run TRL's; multiply this process's advantages by its groups' weights."""
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            factors = self.reward_weights.to(self.gathered_rewards)
            totals = (self.gathered_rewards @ factors).view(-1, self.num_generations)
            weights = self._compute_weights(inputs, totals)
            self._log_groups(inputs, totals, weights)
            self._check_rewards(totals)
            output["advantages"] = output["advantages"] * self._take_rows(weights)
            output["mean_iou"] = self._take_rows(self.mean_iou)
        return output

    def _compute_weights(self, inputs: list, totals: Tensor) -> Tensor:
        """Compute the factor of the advantages of all processes' groups, (groups,)."""
        ious = self.gathered_rewards[:, IOU]
        self.mean_iou = group_mean_iou(ious, self.num_generations)
        answers = gather_object([row["answer"] for row in inputs])
        boxes = torch.tensor(answers[:: self.num_generations]).to(ious)  # (groups, 4)
        share = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) / 1000**2
        options = self.weight_options | {"form": self.form, "box_share": share}
        weights = difficulty_weight(self.mean_iou, **options)
        return weights * rescale_factor(totals, self.rescale)

    def _take_rows(self, values: Tensor) -> Tensor:
        """Turn (groups,) of all processes into (rows,) of this one."""
        rows = values.repeat_interleave(self.num_generations)
        share = len(rows) // self.accelerator.num_processes
        return rows[self.accelerator.process_index * share :][:share]

    def _log_groups(self, inputs: list, totals: Tensor, weights: Tensor) -> None:
        """Log shares of groups by difficulty, and of silent ones; write rollouts.jsonl.

        TRL logs the mean of every list in its metrics.
        """
        metrics = self._metrics["train"]
        groups = torch.stack([self.mean_iou, weights, is_silent(totals)], dim=1)
        for mean_iou, weight, silent in groups.tolist():
            level = difficulty_bin(mean_iou)
            metrics["groups/mean_iou"].append(mean_iou)
            metrics["groups/weight_mean"].append(weight)
            for name in ("groups/zero_variance", f"zero_variance/{level}"):
                metrics[name].append(silent)
            for name in BINS:
                metrics[f"groups/{name}"].append(float(name == level))
        if self.rollout_log is None:
            return
        names = gather_object([(row["sample_id"], row["task"]) for row in inputs])
        wanted = [
            {key: row[key] for key in row.keys() & {"pictures"}} for row in inputs
        ]
        rows = gather_object(wanted)
        columns = {
            "iou": self.gathered_rewards[:, IOU],
            "format": self.gathered_rewards[:, FORMAT],
            "rewards": totals.flatten(),
            "advantages": torch.tensor(self._logs["advantages"]),
        }
        # One process writes the file (docs/paper_facts.md#t11).
        if self.accelerator.is_main_process:
            names = names[:: self.num_generations]
            pairs = zip(rows, self._logs["completion"], strict=True)
            replies = [self._read(row, turns[-1]["content"]) for row, turns in pairs]
            step = self.state.global_step + 1
            for row in rollouts.make_group_rows(step, names, weights, replies, columns):
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
        """Compute TRL's loss; stop if it or the KL is out of bounds."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        update, mask = self.state.global_step + 1, inputs["completion_mask"].bool()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"GRPO loss is {loss.item()} at update {update}: "
                "lower grpo.learning_rate or grpo.max_grad_norm, or raise grpo.beta; "
                "the last rows of rollouts.jsonl show the replies it came from"
            )
        apart = inputs.get("ref_per_token_logps", self.last_logps) - self.last_logps
        if (far := (apart[mask] > KL_FAR).sum()) > KL_BROKEN * mask.sum():
            raise FloatingPointError(
                f"the KL explodes at update {update}: {far} of {mask.sum()} tokens are "
                f"over e^{KL_FAR:.0f} times likelier under the reference than under "
                "the policy; lower grpo.learning_rate or grpo.num_iterations, or raise "
                "grpo.beta"
            )
        if self.model.training:
            self._log_gradient(inputs, mask)
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        """Keep the log-probs, (B, T): in a loss the policy's are the last."""
        made = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.last_logps = made[0].detach()
        return made

    def _log_gradient(self, batch: Any, mask: Tensor) -> None:
        """Log the gradient at the output of every reply, by the bin of its group."""
        old = batch.get("old_per_token_logps", self.last_logps)
        epsilon = (self.epsilon_low, self.epsilon_high)
        sizes = rollouts.compute_logit_gradient(
            self.last_logps, old, batch["advantages"], mask, epsilon
        )  # (B,)
        pairs = torch.stack([batch["mean_iou"].to(sizes), sizes], dim=1)
        for mean_iou, size in self.accelerator.gather(pairs).tolist():
            level = difficulty_bin(mean_iou)
            self._metrics["train"][f"gradient/{level}"].append(size)

    # ------------------------------------------------------------ exact resume

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """Return TRL's, with an order that is a function of seed and epoch.

        TRL's is one of a generator that no checkpoint holds. accelerate calls
        `set_epoch` before every epoch.
        """
        sampler = super()._get_train_sampler(dataset)
        if sampler.shuffle:
            seed, generator = sampler.seed, sampler.generator
            sampler.set_epoch = lambda epoch: generator.manual_seed(seed + epoch)
        return sampler

    def _rollout_file(self, checkpoint: str | Path) -> Path:
        place = f"{self.accelerator.process_index}_of_{self.accelerator.num_processes}"
        return Path(checkpoint) / f"rollouts_{place}.pt"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save TRL's, and what it forgets: replies that later updates use again."""
        super()._save_checkpoint(model, trial)
        every = self.args.steps_per_generation * self.num_iterations
        state = {
            "step": self._step,
            "tokens": self._total_train_tokens,
            "rollouts": self._buffered_inputs if self._step % every else None,
        }
        name = f"checkpoint-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial=trial)) / name
        torch.save(state, self._rollout_file(folder))

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        """Load as the Trainer does, which before 5.23 loads "ref" for the adapter."""
        if isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled:
            checkpoints.load_whole(self.model, checkpoint)
            return
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
        if path.is_file():  # else other processes than before: replies sampled anew
            state = torch.load(path, map_location=device, weights_only=True)
            self._step, self._buffered_inputs = state["step"], state["rollouts"]
            self._total_train_tokens = state["tokens"]

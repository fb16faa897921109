"""TRL's GRPOTrainer, computing prompt and images once per group and pass.

TRL encodes every row twice and sends prompt and images through the model for each of
the G replies. Here each prompt is rendered, encoded and prefilled once, and sits once
in a row of the reference and policy passes. What is learned does not change: log-probs
are equal, and the replies have the same distribution. docs/fast_example.py shows the
use with any reward functions.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import (
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from univg_nb import models
from univg_nb.families import get_side
from univg_nb.fast import check, packed_rows, prompts, sampling, vllm
from univg_nb.fast.attention import MODEL_TYPES, get_attention
from univg_nb.fast.folded import fold_adapter
from univg_nb.fast.packed_rows import Group
from univg_nb.fast.prompts import Prompt
from univg_nb.fast.vision_features import VisionCache, tower_trains

logger = logging.getLogger(__name__)


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with shared prompts, and with vision tokens banned while sampling.

    Rows and reward functions are TRL's; `images` are paths or pictures. Rollouts by
    vLLM, or with options that look at the tokens before, are TRL's own. Tools and
    rollout functions are not supported.

    Args:
        model: as for GRPOTrainer, as are `others`.
        args: GRPOConfig; its generation_kwargs get the banned tokens.
        processing_class: the model's processor.
        shared_prefix: False takes TRL's own passes. True computes one group both ways
            at first use, and falls back to them where log-probs differ (`check`). So
            do models that are none of `attention.MODEL_TYPES`, and weights sharded by
            FSDP.
        row_tokens: most tokens in a pass of the model, in whole groups.
        **others: further arguments.

    Raises:
        ValueError: for an option out of range or not supported, or pixel limits that
            vLLM does not have.
    """

    processing_class: Any
    _buffered_inputs: Any

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        processing_class: Any,
        shared_prefix: bool = True,
        row_tokens: int = 8192,
        **others: Any,
    ) -> None:
        if row_tokens < 1:
            raise ValueError(f"row_tokens = {row_tokens}: must be at least 1")
        if refused := {"tools", "rollout_func", "environment_factory"} & others.keys():
            raise ValueError(f"{', '.join(refused)}: not supported with shared prompts")
        if args.use_vllm:  # before its engine starts
            text = isinstance(model, str)
            source = model if text else models.get_base_model(model).name_or_path
            vllm.check_limits(processing_class, source)
        self.row_tokens = row_tokens
        self.banned_tokens = sampling.ban_vision_tokens(args, processing_class)
        super().__init__(
            model=model, args=args, processing_class=processing_class, **others
        )
        base = models.get_base_model(self.model)
        _keep_differentiable(base)
        kind, sharded = base.config.model_type, self.is_fsdp_enabled
        self.shared_forward = shared_prefix and kind in MODEL_TYPES and not sharded
        if shared_prefix and not self.shared_forward:
            layout = " under FSDP" if sharded else ""
            logger.warning("shared_prefix: %s%s takes TRL's own passes", kind, layout)
        self.unchecked = self.shared_forward
        plain = args.repetition_penalty == 1.0 and not args.use_vllm
        plain = plain and args.generation_kwargs.keys() <= {"suppress_tokens"}
        self.shared_rollout = self.shared_forward and plain
        # With sharded weights all processes must call the tower equally often.
        cached = self.shared_forward and not is_deepspeed_zero3_enabled()
        cached = cached and not tower_trains(base.model)
        self.vision = VisionCache(base.model) if cached else None
        self.row_groups: list[int] = []  # the group of every row of the next pass

    # ---------------------------------------------------------------- the rollout

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        """Run TRL's without its second encoding; add the `group` of every row."""
        processor = self.processing_class
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.processing_class = processor
        output["group"] = torch.tensor(self.row_groups, device=self.accelerator.device)
        mode = "train" if self.model.training else "eval"
        vllm.check_log_prob_difference(self._metrics[mode])
        return output

    def _tokenize_prompts(self, prompts_of_rows: list) -> tuple[list, Any, dict]:
        """Run TRL's for the first row of each group. Groups are adjacent, as in TRL."""
        training, count = self.model.training, len(prompts_of_rows)
        size = self.num_generations if training else self.num_generations_eval
        start = self.accelerator.process_index * count
        rows = [(start + row) // size - start // size for row in range(count)]
        distinct = [prompts_of_rows[rows.index(g)] for g in range(rows[-1] + 1)]
        prompts.open_images(distinct, get_side(self.processing_class))
        ids, images, fields = super()._tokenize_prompts(distinct)
        device, self.row_groups = self.accelerator.device, rows
        self.prompts = prompts.make_prompts(ids, images, fields, device)
        fields = prompts.make_fields([self.prompts[group] for group in rows])
        self.processing_class = prompts.ReusedEncoding(self.processing_class, fields)
        if self.unchecked:
            self._check_sharing(self.prompts[0])
        images = images and [images[group] for group in rows]
        return [ids[group] for group in rows], images, fields

    def _generate_single_turn(
        self, prompt_ids: list, images: Any, *args: Any, **options: Any
    ) -> tuple[list, list | None]:
        """Sample with one prefill for each prompt, or as TRL does (vLLM and others)."""
        began = time.perf_counter()
        if self.shared_rollout:
            streams = [iter(replies) for replies in self._sample()]
            made = [next(streams[group]) for group in self.row_groups], None
        else:
            if self.use_vllm and images is not None:
                rows = prompt_ids, images, self.processing_class, self.vllm_mode
                prompt_ids, images = vllm.make_vllm_inputs(*rows)
            made = super()._generate_single_turn(prompt_ids, images, *args, **options)
        self._record_seconds("generate", began)
        return made

    def _sample(self) -> list[list[list[int]]]:
        """Sample as many replies to each prompt as the largest group has rows.

        The seeds name the row in the batch of all processes, however it is shared out.
        """
        rows, groups = self.row_groups, range(len(self.prompts))
        count = max(rows.count(group) for group in groups)
        micro = self._step % self.args.gradient_accumulation_steps
        when = (self.args.seed, self.state.global_step, micro)
        start = self.accelerator.process_index * len(rows)
        firsts = [start + rows.index(group) for group in groups]
        seeds = [
            sampling.noise_seed(*when, row + i) for row in firsts for i in range(count)
        ]
        with (
            self._unwrap_for_generation() as model,
            self.accelerator.autocast(),
            torch.no_grad(),
            fold_adapter(model),
        ):
            return sampling.sample_replies(
                model,
                self.prompts,
                count,
                self.generation_config,
                seeds,
                self.vision,
            )

    def _unwrap_for_generation(self) -> AbstractContextManager[Any]:
        """Return TRL's bare model: sharded weights gathered, no checkpointing."""
        return unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )

    def _check_sharing(self, prompt: Prompt) -> None:
        """Compute one group both ways; keep the first attention that agrees, if any."""
        self.unchecked = False
        with self._unwrap_for_generation() as model, self.accelerator.autocast():
            backbone = models.get_base_model(model).model
            before, allowed = get_attention(backbone), check.get_tolerance(backbone)
            for name in check.list_attention(backbone):
                self._set_attention(name)
                found = check.compare_log_probs(
                    model, prompt, self.banned_tokens, self.temperature, self.vision
                )
                everywhere = torch.tensor([found], device=self.accelerator.device)
                worst = self.accelerator.gather(everywhere).max().item()  # one answer
                if worst <= allowed:
                    return
                logger.warning(
                    "shared prompts with %s: log-probs differ by %.2g from those of "
                    "whole rows (allowed: %.2g)", name, worst, allowed,
                )  # fmt: skip
            self._set_attention(before)
        logger.warning("shared_prefix falls back to TRL's own passes")
        self.shared_forward = self.shared_rollout = False
        self.vision = None

    def _set_attention(self, name: str) -> None:
        """Set the attention of the policy, and of a reference with its own weights."""
        for model in filter(None, (self.model, self.ref_model)):
            base = models.get_base_model(self.accelerator.unwrap_model(model))
            base.model.language_model.set_attn_implementation(name)

    # ---------------------------------------------------------------- the update

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """Run TRL's, but keep groups whole, and similar lengths in one micro-batch.

        TRL's shuffling would scatter the groups. An update sees the same rows, so with
        a mean over sequences its gradient is the same.
        """
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        every = self.args.steps_per_generation * self.num_iterations
        if self._step % every == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            order, batch = self._order_rows(batch), split_pixel_values_by_grid(batch)
            for key, value in batch.items():
                if isinstance(value, list):
                    batch[key] = [value[row] for row in order]
                elif value.ndim:  # else one number for all rows
                    batch[key] = value[order]
            chunks = split_tensor_dict(batch, self.args.steps_per_generation)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(c) for c in chunks]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _order_rows(self, batch: dict[str, Any]) -> list[int]:
        """Shuffle groups, then sort them by length within an optimizer step."""
        lengths = batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)
        rows, size, args = len(lengths), self.num_generations, self.args
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        if rows % size or step % size:  # processes cut groups: nothing to keep whole
            return torch.randperm(rows).tolist()
        groups = torch.randperm(rows // size).tolist()
        totals = lengths.view(-1, size).sum(1).tolist()
        for start in range(0, len(groups), step // size):
            part = slice(start, start + step // size)
            groups[part] = sorted(groups[part], key=totals.__getitem__)
        return [group * size + i for group in groups for i in range(size)]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's loss; its policy pass finds the groups of the rows."""
        self.row_groups = inputs["group"].tolist()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor,
        logits_to_keep: int, **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Compute (B, C) log-probs and entropies; a group shares its prompt."""
        began, width = time.perf_counter(), input_ids.size(1) - logits_to_keep
        rows = input_ids[:, :width], attention_mask[:, :width], self.row_groups
        groups = prompts.split_rows(*rows, **options) if self.shared_forward else []
        if self.unchecked:  # resumed between updates that use the same replies
            self._check_sharing(groups[0][0])
        if self.shared_forward:
            counts = attention_mask[:, width:].sum(1).tolist()
            pairs = zip(input_ids[:, width:], counts, strict=True)
            replies = [row[:count] for row, count in pairs]
            made = self._compute_shared(model, groups, replies, logits_to_keep)
        else:
            made = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **options
            )
        if not torch.is_grad_enabled():
            self._record_seconds("reference", began)
        return made

    def _compute_shared(
        self, model: Any, groups: Sequence[Group], replies: list[Tensor], length: int
    ) -> tuple[Tensor, Tensor | None, None]:
        """Compute log-probs and entropies of all replies, (B, length).

        The head of a reference with weights of its own computes no entropies.
        """
        unwrapped = self.accelerator.unwrap_model(model)
        backbone = models.get_base_model(unwrapped).model
        # Where a forward pass talks to other processes, all must make equally many.
        sharded, training = is_deepspeed_zero3_enabled(), torch.is_grad_enabled()
        talks = sharded or (training and self.accelerator.num_processes > 1)
        budget = packed_rows.UNLIMITED if talks else self.row_tokens
        called = model if talks or training else unwrapped
        found: dict[int, tuple[Tensor, ...]] = {}  # by row
        for chunk in packed_rows.split_chunks(groups, [*map(len, replies)], budget):
            with self.accelerator.autocast(), fold_adapter(unwrapped):
                found |= packed_rows.compute_log_probs(
                    called, backbone, chunk, replies, self.vision
                )
        log_probs, *entropies = (
            torch.stack([pad(part, (0, length - len(part))) for part in parts])
            for parts in zip(*(found[row] for row in range(len(replies))), strict=True)
        )
        return log_probs, entropies[0] if entropies else None, None

    def _record_seconds(self, part: str, began: float) -> None:
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][f"seconds/{part}"].append(time.perf_counter() - began)


def _keep_differentiable(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights, which have no gradient then.

    On a CPU with AVX512-BF16 it does so where the model first runs in eval mode, for
    good. A GRPO training samples in eval mode: its next update would fail, or in layers
    without a bias silently miss the gradient that flows through the weights.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False

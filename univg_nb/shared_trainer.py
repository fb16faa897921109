"""TRL's GRPOTrainer, computing prompt and images once per group and pass.

TRL encodes every row twice and sends images and prompt through the model for each of
the G replies. Here each distinct prompt is encoded once, prefilled once, and sits once
in a row of the reference and policy passes (`shared_prefix`). What is learned does not
change: log-probs are equal, and the replies have the same distribution. A frozen
vision tower sees each image once (`vision_cache`).
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import (
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from univg_nb import models, packed_rows, shared_check, shared_prefix
from univg_nb.encoding import EncodedBatch, EncodedOnce
from univg_nb.folded import folded
from univg_nb.noise import noise_seed
from univg_nb.sampling import ban_vision_tokens, can_share_rollout, logits_warp
from univg_nb.vision_cache import VisionCache, tower_trains
from univg_nb.vllm_rollout import check_difference, vllm_inputs

logger = logging.getLogger(__name__)


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with shared prompts, and with vision tokens banned while sampling.

    shared_prefix "auto": at first use one group goes both ways; where log-probs differ
    (`shared_check`) a message says so and TRL's own passes are taken, as they are for
    what `shared_check.obstacle` names. "on" shares unchecked and refuses an obstacle,
    "off" does not share; YAML's bare on and off, which are booleans, mean the same.
    Rollouts by vLLM or with options that `sampling.logits_warp` does not cover are
    TRL's. row_tokens: about so many tokens go through the model at a time, in whole
    groups. Rows need `images`: paths or pictures.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        processing_class: Any,
        shared_prefix: str | bool = "auto",
        row_tokens: int = 8192,
        **others: Any,
    ) -> None:
        if shared_prefix not in ("auto", "on", "off", True, False):
            raise ValueError(
                f"grpo.shared_prefix = {shared_prefix!r}: write auto, on or off"
            )
        if row_tokens < 1:
            raise ValueError(f"grpo.row_tokens = {row_tokens}: must be at least 1")
        self.row_tokens = row_tokens
        self.banned_tokens = ban_vision_tokens(args, processing_class.tokenizer)
        super().__init__(
            model=model, args=args, processing_class=processing_class, **others
        )
        if self.ref_model is not None:  # its tower is as fixed as the policy's
            self.ref_model.requires_grad_(False)
        base = models.base_model(self.model)
        reason = shared_check.obstacle(base, self.is_fsdp_enabled)
        if reason and shared_prefix in ("on", True):
            raise ValueError(
                f"grpo.shared_prefix = on, but {reason}; set it to auto or off"
            )
        self.shared_forward = shared_prefix not in ("off", False) and not reason
        self.shared_rollout = self.shared_forward and can_share_rollout(args)
        self.unchecked = self.shared_forward and shared_prefix == "auto"
        if self.shared_forward and not self.unchecked:
            self._attend_with(shared_check.plain_choice(base.model))
        # With sharded weights all processes must call the tower equally often.
        remember = self.shared_forward and not is_deepspeed_zero3_enabled()
        frozen = remember and not tower_trains(base.model)
        self.vision = VisionCache() if frozen else None

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        """TRL's, which encodes all rows again: hand it what was encoded before."""
        self.real_processor = self.processing_class
        self.processing_class = EncodedOnce(self.real_processor, lambda: self.encoded)
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.processing_class = self.real_processor
        check_difference(self._metrics["train" if self.model.training else "eval"])
        return output

    def _tokenize_prompts(self, prompts: list) -> tuple[list, list, dict]:
        """TRL's, but each distinct prompt once."""
        self.encoded = EncodedBatch.encode(
            self.real_processor, prompts, self.num_generations, self.accelerator.device
        )
        if self.unchecked:
            self._check_sharing(self.encoded.prompts[0])
        fields = {} if self.shared_rollout else self.encoded.fields()
        return self.encoded.prompt_ids(), self.encoded.images, fields

    def _generate_single_turn(
        self,
        prompt_ids: list,
        images: list,
        multimodal_fields: dict,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list, None]:
        """One prefill per distinct prompt; else TRL's way (vLLM among others)."""
        began = time.perf_counter()
        if self.shared_rollout:
            with (
                self._for_generation() as model,
                self.accelerator.autocast(),
                torch.no_grad(),
                folded(model),
            ):
                base = models.base_model(model)
                replies = shared_prefix.sample_replies(
                    base,
                    base.model,
                    self.encoded.prompts,
                    max(self.encoded.counts),
                    max_new_tokens=self.max_completion_length,
                    eos_token_ids=self.eos_token_ids,
                    warp=logits_warp(self.args, self.banned_tokens),
                    seeds=self._reply_seeds(),
                    vision=self.vision,
                )
            made = self.encoded.expand(replies), None
        else:
            if self.use_vllm:
                prompt_ids, images = vllm_inputs(
                    prompt_ids, images, self.real_processor, self.vllm_mode
                )
            made = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        self._record_seconds("generate", began)
        return made

    def _reply_seeds(self) -> list[int]:
        """One for each of this process's replies, `max(counts)` to a prompt: from the
        run's seed, the update and the row in the batch of all processes, so that the
        replies do not depend on how rows are shared out."""
        counts = self.encoded.counts
        first = self.accelerator.process_index * sum(counts)
        starts = [first + sum(counts[:i]) for i in range(len(counts))]
        micro = self._step % self.args.gradient_accumulation_steps
        when = (self.args.seed, self.state.global_step, micro)
        return [
            noise_seed(*when, start + i) for start in starts for i in range(max(counts))
        ]

    def _for_generation(self) -> AbstractContextManager[Any]:
        """TRL's way to the bare model: sharded weights gathered, no checkpointing."""
        return unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )

    def _check_sharing(self, prompt: shared_prefix.Prompt) -> None:
        """One group both ways. Keeps the first attention that gives equal log-probs;
        where none does, TRL's way from here on, and a message."""
        self.unchecked = False
        warp = logits_warp(self.args, self.banned_tokens)
        with self._for_generation() as model, self.accelerator.autocast():
            backbone = models.base_model(model).model
            before, allowed = shared_prefix.attention_of(backbone), 0.0
            for name in shared_check.attention_choices(backbone):
                self._attend_with(name)
                worst, allowed = shared_check.difference_with(
                    model, prompt, warp, self.temperature, self.vision
                )
                worst = self.accelerator.gather(worst).max().item()  # one answer
                if worst <= allowed:
                    return
                logger.warning(
                    "shared prompts with %s: log-probs differ by %.2g from those of "
                    "whole rows (allowed: %.2g)", name, worst, allowed,
                )  # fmt: skip
            self._attend_with(before)
        logger.warning("grpo.shared_prefix: auto falls back to TRL's own passes")
        self.shared_forward = self.shared_rollout = False
        self.vision = None

    def _attend_with(self, name: str) -> None:
        """Give the policy this attention, and the reference where it has weights of
        its own (after full fine-tuning; else it is an adapter of the policy)."""
        for model in (self.model, self.ref_model):
            if model is not None:
                base = models.base_model(self.accelerator.unwrap_model(model))
                base.model.language_model.set_attn_implementation(name)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's, but groups stay whole, and similar lengths share a micro-batch.

        TRL shuffles rows, which scatters the groups. Only the split into micro-batches
        differs: an update sees the same rows, so with a mean over sequences its
        gradient is the same.
        """
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        every = self.args.steps_per_generation * self.num_iterations
        if self._step % every == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            order = self._row_order(batch)
            batch = {
                key: _permuted(value, order)
                for key, value in split_pixel_values_by_grid(batch).items()
            }
            chunks = split_tensor_dict(batch, self.args.steps_per_generation)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(c) for c in chunks]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _row_order(self, batch: dict[str, Any]) -> list[int]:
        """Row numbers: groups shuffled, then by length within an optimiser step."""
        lengths = batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)
        rows, unit = len(lengths), self.num_generations
        step = self.args.per_device_train_batch_size * (
            self.args.gradient_accumulation_steps
        )
        if rows % unit or step % unit:  # groups cut by processes: nothing to keep
            return torch.randperm(rows).tolist()
        groups = torch.randperm(rows // unit).tolist()
        totals = lengths.view(-1, unit).sum(1).tolist()
        window = step // unit
        for start in range(0, len(groups), window):
            part = slice(start, start + window)
            groups[part] = sorted(groups[part], key=totals.__getitem__)
        return [group * unit + i for group in groups for i in range(unit)]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **fields: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, C) log-probs and entropies; rows of one prompt share its computation."""
        began, groups = time.perf_counter(), []
        if self.shared_forward and not compute_aux_loss:
            groups = shared_prefix.split_rows(
                input_ids,
                attention_mask,
                fields["mm_token_type_ids"],
                input_ids.size(1) - logits_to_keep,
                fields.get("pixel_values"),
                fields.get("image_grid_thw"),
                fields.get("num_images"),
            )
            if self.unchecked:  # resumed between updates that use the same replies
                self._check_sharing(groups[0][0])
        if not self.shared_forward or compute_aux_loss:
            made = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size,
                compute_entropy, compute_aux_loss, **fields,
            )  # fmt: skip
        else:
            made = self._shared_log_probs(
                model, groups, input_ids, attention_mask, logits_to_keep,
                compute_entropy,
            )  # fmt: skip
        if not torch.is_grad_enabled():
            self._record_seconds("reference", began)
        return made

    def _shared_log_probs(
        self,
        model: Any,
        groups: list[tuple[shared_prefix.Prompt, list[int]]],
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        compute_entropy: bool,
    ) -> tuple[Tensor, Tensor | None, None]:
        width = input_ids.size(1) - logits_to_keep
        lengths = attention_mask[:, width:].sum(1).tolist()
        unwrapped = self.accelerator.unwrap_model(model)
        backbone = models.base_model(unwrapped).model
        # Where a forward pass talks to other processes, all must make equally many.
        sharded, training = is_deepspeed_zero3_enabled(), torch.is_grad_enabled()
        talks = sharded or (training and self.accelerator.num_processes > 1)
        budget = packed_rows.UNLIMITED if talks else self.row_tokens
        called = model if talks or training else unwrapped
        log_probs: list[Any] = [None] * len(input_ids)
        entropies: list[Any] = [None] * len(input_ids)
        for chunk in packed_rows.chunked(groups, lengths, budget):
            packed = [
                (prompt, [input_ids[r, width : width + lengths[r]] for r in rows])
                for prompt, rows in chunk
            ]
            with self.accelerator.autocast(), folded(unwrapped):
                parts = packed_rows.packed_log_probs(
                    called, backbone, packed, self.vision
                )
            for kept, part in zip((log_probs, entropies), parts, strict=True):
                _put(kept, chunk, part)

        def padded(values: list[Tensor]) -> Tensor:
            stacked = pad_sequence(values, batch_first=True)
            return pad(stacked, (0, logits_to_keep - stacked.size(1)))

        return padded(log_probs), padded(entropies) if compute_entropy else None, None

    def _record_seconds(self, part: str, began: float) -> None:
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][f"seconds/{part}"].append(time.perf_counter() - began)


def _put(
    kept: list[Any],
    chunk: list[tuple[shared_prefix.Prompt, list[int]]],
    part: list[list[Tensor]],
) -> None:
    """Put values [group][reply] at the numbers of their rows; the head of a reference
    with weights of its own makes no entropies, and then there are none to put."""
    if not part:
        return
    for (_, rows), values in zip(chunk, part, strict=True):
        for row, value in zip(rows, values, strict=True):
            kept[row] = value


def _permuted(value: Any, order: list[int]) -> Any:
    if isinstance(value, Tensor):
        return value[order] if value.ndim else value
    return [value[i] for i in order]

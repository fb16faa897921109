"""TRL's GRPOTrainer, computing prompt and images once per group and pass.

TRL encodes every row twice and sends images and prompt through the model for each of
the G replies. Here each distinct prompt is encoded once, prefilled once, and sits once
in a row of the reference and policy passes (`shared_prefix`). What is learned does not
change: log-probs are equal, and the replies have the same distribution.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import (
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from univg_nb import models, shared_prefix
from univg_nb.encoding import EncodedBatch, EncodedOnce
from univg_nb.folded import folded
from univg_nb.sampling import ban_vision_tokens, can_share_rollout, logits_warp


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with shared prompts, and with vision tokens banned while sampling.

    shared_prefix=False takes TRL's own passes; so do vLLM, FSDP, models without
    Qwen2-VL's positions, attention without 4-D masks, and sampling options that
    `sampling.logits_warp` does not cover. Rows need `images`: paths or pictures.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        processing_class: Any,
        shared_prefix: bool = True,
        **others: Any,
    ) -> None:
        self.banned_tokens = ban_vision_tokens(args, processing_class.tokenizer)
        super().__init__(
            model=model, args=args, processing_class=processing_class, **others
        )
        self.shared_forward = shared_prefix and can_share(self)
        self.shared_rollout = self.shared_forward and can_share_rollout(args)

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        """TRL's, which encodes all rows again: hand it what was encoded before."""
        self.real_processor = self.processing_class
        self.processing_class = EncodedOnce(self.real_processor, lambda: self.encoded)
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self.processing_class = self.real_processor

    def _tokenize_prompts(self, prompts: list) -> tuple[list, list, dict]:
        """TRL's, but each distinct prompt once."""
        self.encoded = EncodedBatch.encode(
            self.real_processor, prompts, self.num_generations, self.accelerator.device
        )
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
                unwrap_model_for_generation(
                    self.model_wrapped,
                    self.accelerator,
                    gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                    gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
                ) as model,
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
                )
            made = self.encoded.expand(replies), None
        else:
            made = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        self._record_seconds("generate", began)
        return made

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
        began = time.perf_counter()
        if not self.shared_forward or compute_aux_loss:
            made = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size,
                compute_entropy, compute_aux_loss, **fields,
            )  # fmt: skip
        else:
            made = self._shared_log_probs(
                model, input_ids, attention_mask, logits_to_keep,
                batch_size or len(input_ids), compute_entropy, fields,
            )  # fmt: skip
        if not torch.is_grad_enabled():
            self._record_seconds("reference", began)
        return made

    def _shared_log_probs(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int,
        compute_entropy: bool,
        fields: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None, None]:
        width = input_ids.size(1) - logits_to_keep
        groups = shared_prefix.split_rows(
            input_ids,
            attention_mask,
            fields["mm_token_type_ids"],
            width,
            fields.get("pixel_values"),
            fields.get("image_grid_thw"),
            fields.get("num_images"),
        )
        lengths = attention_mask[:, width:].sum(1).tolist()
        unwrapped = self.accelerator.unwrap_model(model)
        backbone = models.base_model(unwrapped).model
        log_probs: list[Any] = [None] * len(input_ids)
        entropies: list[Any] = [None] * len(input_ids)
        for chunk in shared_prefix.chunked(groups, lengths, batch_size):
            packed = [
                (prompt, [input_ids[r, width : width + lengths[r]] for r in rows])
                for prompt, rows in chunk
            ]
            with self.accelerator.autocast(), folded(unwrapped):
                parts = shared_prefix.packed_log_probs(model, backbone, packed)
            for (_, rows), logps, entropy in zip(chunk, *parts, strict=True):
                for row, logp, e in zip(rows, logps, entropy, strict=True):
                    log_probs[row], entropies[row] = logp, e

        def padded(values: list[Tensor]) -> Tensor:
            stacked = pad_sequence(values, batch_first=True)
            return pad(stacked, (0, logits_to_keep - stacked.size(1)))

        return padded(log_probs), padded(entropies) if compute_entropy else None, None

    def _record_seconds(self, part: str, began: float) -> None:
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][f"seconds/{part}"].append(time.perf_counter() - began)


def _permuted(value: Any, order: list[int]) -> Any:
    if isinstance(value, Tensor):
        return value[order] if value.ndim else value
    return [value[i] for i in order]


def can_share(trainer: GRPOTrainer) -> bool:
    """Whether prompts can be shared: a model that supports it, weights not sharded."""
    base = models.base_model(trainer.model)
    return shared_prefix.supports(base) and not trainer.is_fsdp_enabled

"""Stage 1's trainer: TRL's SFTTrainer, and what it lacks for an exact resume.

Length-grouped order that is a function of (seed, epoch), vision features computed
once, attention without a mask where padding is behind, a stop before a broken update.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from trl import SFTTrainer

from univg_nb import models
from univg_nb.collator import LengthGroupedBatches, VisionCollator


class GroundingSFTTrainer(SFTTrainer):
    """SFTTrainer that groups batches by length, takes ready-made vision features, and
    stops before an update with a loss or gradient that is not finite."""

    epoch_sampler: LengthGroupedBatches | None = None
    seen: list[int]  # indices of the samples of the update at hand
    samples = 0  # of this process and this call, as the next two
    tokens = 0  # padding included
    padding = 0
    counted: int | None = None  # parameters, embeddings left out

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen = []
        collator = self.data_collator
        if isinstance(collator, VisionCollator) and collator.padding_side == "right":
            backbone = models.base_model(self.model).model
            backbone.register_forward_pre_hook(_without_mask, with_kwargs=True)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's own estimate. It counts the parameters anew at every update,
        which takes a twentieth of the time of a small model's."""
        if self.counted is None:
            self.counted = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self.counted

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self.epoch_sampler = LengthGroupedBatches(
            dataset[self.args.length_column_name],
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            self.args.seed,
        )
        return self.epoch_sampler

    def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        self.seen += inputs.pop("sample_index").tolist()
        mask = inputs["attention_mask"]
        self.samples += len(mask)
        self.tokens += mask.numel()
        self.padding += mask.numel() - int(mask.sum())
        loss = super().training_step(model, inputs, *args)
        self._check_finite("loss", float(loss))
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if "image_features" in inputs:
            # Qwen2-VL's own way in for a vision output that is already there.
            features = inputs.pop("image_features")
            image = SimpleNamespace(pooler_output=(features,))
            inputs["mm_encoder_outputs"] = {"image": image}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last thing the Trainer asks for before the update."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._check_finite("gradient norm", float(norm))
        self.seen = []
        return norm

    def _check_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        rows = self.train_dataset.select(self.seen)
        raise FloatingPointError(
            f"{what} is {value} at step {self.state.global_step + 1}, before its "
            f"update; samples {', '.join(rows['sample_id'])}. Lower sft.learning_rate "
            "or look at these samples; the last checkpoint is whole"
        )


def _without_mask(module: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
    """In training on right-padded rows no real token looks back at padding, and the
    padding's own outputs carry no loss: plain causal attention, which is faster."""
    return (args, {**kwargs, "attention_mask": None}) if module.training else None

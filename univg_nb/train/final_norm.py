"""The language model's last RMSNorm, trained beside LoRA at its own learning rate.

The norm's weight multiplies the hidden state in front of `lm_head`. Its mean makes all
distributions over tokens sharper or flatter, and a few updates find its direction, long
before LoRA's gradient rises above its noise. `grpo.norm_learning_rate` turns it on.
PEFT keeps the trained copy in the adapter (`modules_to_save`), so it is saved, merged
and switched off with LoRA. Not tried on weights sharded over GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch.nn import Module, Parameter
from transformers import PreTrainedModel, ProcessorMixin

from univg_nb import models

FINAL_NORM = "language_model.norm"  # PEFT matches the end of a module's name


def load_with_trained_norm(
    model_section: Mapping[str, Any],
    adapter: str | Path,
    quantize: models.Quantization | None = None,
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """Load a model for training whose LoRA adapter also trains the last norm.

    Arguments and result are those of `models.load_for_training`. An adapter saved
    without the norm starts from the base model's (PEFT refuses to load one whose
    configuration names a module that its file lacks); a whole model has the norm among
    its weights.
    """
    if not models.is_adapter(adapter):
        return models.load_for_training(model_section, adapter, quantize)
    model, processor = models.load_for_training(model_section, quantize=quantize)
    config = PeftConfig.from_pretrained(str(adapter))
    config.modules_to_save = sorted({*(config.modules_to_save or ()), FINAL_NORM})
    config.inference_mode = False
    weights = load_peft_weights(str(adapter), device="cpu")
    name, norm = next(
        (name, module)
        for name, module in model.named_modules()
        if name.endswith(FINAL_NORM)
    )
    weights.setdefault(f"base_model.model.{name}.weight", norm.weight.detach().clone())
    with models.ignore_rename_warnings():
        model = get_peft_model(model, config)
    found = set_peft_model_state_dict(model, weights)
    assert not found.unexpected_keys, found.unexpected_keys
    return model.train(), processor


def find_trained_norm(model: Module) -> Parameter:
    """Return the trainable weight of the last norm, (D,): the adapter's if any."""
    named = model.named_parameters()
    (norm,) = [p for name, p in named if f"{FINAL_NORM}." in name and p.requires_grad]
    return norm


def set_norm_learning_rate(
    optimizer: torch.optim.Optimizer, norm: Parameter, learning_rate: float
) -> None:
    """Move `norm`, (D,), to a parameter group with its own learning rate and no decay.

    Its entries get the mean of their gradients: with their own, they would drift apart
    and change which token is the likeliest. Call it before the scheduler is made, which
    scales the rate of every group.
    """
    norm.register_hook(lambda gradient: gradient.mean().expand_as(gradient))
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not norm]
    own = {"params": [norm], "lr": learning_rate, "weight_decay": 0.0}
    optimizer.add_param_group(optimizer.param_groups[-1] | own)

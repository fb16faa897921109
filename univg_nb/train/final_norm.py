"""The language model's last RMSNorm, trained beside LoRA with a step size of its own.

The norm's weight multiplies the hidden state in front of `lm_head`: made longer, every
distribution over tokens gets sharper, made shorter, flatter. So one number, the mean of
that weight, decides how often sampling leaves the likely tokens, and a few updates can
find out which way it should go, long before the gradient of the LoRA matrices rises
above its noise. Its entries therefore move together: each by its own gradient, they
would drift apart and change which token is the likeliest. `grpo.norm_learning_rate`
turns it on; PEFT keeps the trained copy in the adapter (its `modules_to_save`), so it
is saved, merged and switched off with LoRA. Not tried on weights sharded over GPUs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper
from torch.nn import Module, Parameter
from transformers import PreTrainedModel

FINAL_NORM = "language_model.norm"  # PEFT matches the end of a module's name


def load_adapter_with_norm(model: PreTrainedModel, adapter: str | Path) -> PeftModel:
    """Put a LoRA adapter on `model` to be trained on, together with the last norm.

    adapter: a folder that PEFT saved.

    An adapter saved without the norm starts from the model's own. (PEFT refuses to
    load one whose configuration names a module that its file lacks.)
    """
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
    adapted = get_peft_model(model, config)
    found = set_peft_model_state_dict(adapted, weights)
    assert not found.unexpected_keys, found.unexpected_keys
    return adapted


def saved_modules(model: Module) -> list[ModulesToSaveWrapper]:
    """The modules that adapters keep whole copies of."""
    return [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]


def trained_norm(model: Module) -> Parameter:
    """The trainable weight of the last norm, (D,)."""
    found = [
        parameter
        for name, parameter in model.named_parameters()
        if f"{FINAL_NORM}." in name and parameter.requires_grad
    ]
    (norm,) = found  # the adapter's copy, or in full fine-tuning the weight itself
    return norm


def own_rate(
    optimizer: torch.optim.Optimizer, norm: Parameter, learning_rate: float
) -> None:
    """Move `norm`, (D,), into a parameter group with its own learning rate, no decay.

    Its entries share the mean of their gradients and so move together. Call it before
    the scheduler is made, which then scales every group's own rate.
    """
    norm.register_hook(lambda gradient: gradient.mean().expand_as(gradient))
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not norm]
    own = {"params": [norm], "lr": learning_rate, "weight_decay": 0.0}
    optimizer.add_param_group(optimizer.param_groups[-1] | own)

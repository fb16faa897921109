"""A LoRA adapter folded into the weights for as long as nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch.nn import Module


def can_fold(model: Module) -> bool:
    """Whether folding changes nothing but the speed.

    Plain LoRA, switched on, on whole float32 weights: bf16 would round the sum, and
    4-bit or sharded weights cannot take it.
    """
    if not isinstance(model, PeftModel):
        return False
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    return bool(layers) and all(
        type(layer) is Linear
        and not layer.disable_adapters
        and not any(name in layer.lora_variant for name in layer.active_adapters)
        and layer.get_base_layer().weight.dtype == torch.float32
        and layer.get_base_layer().weight.dim() == 2
        for layer in layers
    )


@contextmanager
def folded(model: Module) -> Iterator[None]:
    """Inside, the active adapter is part of the weights: one product for three.

    On a CPU with a small model LoRA's extra calls cost more than its arithmetic. The
    old weights come back as they were, bit for bit (subtracting would drift). Outside
    of `torch.no_grad` this would cut the adapter off from its gradient.
    """
    if torch.is_grad_enabled() or not can_fold(model):
        yield
        return
    assert isinstance(model, PeftModel)
    kept = []
    try:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                base = layer.get_base_layer()
                kept.append((base.weight, base.weight.data))
                delta = [layer.get_delta_weight(name) for name in layer.active_adapters]
                base.weight.data = torch.stack([base.weight.data, *delta]).sum(0)
        for wrapper in [
            m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)
        ]:  # switched off, it shows the original
            trained = wrapper.modules_to_save[wrapper.active_adapter].parameters()
            original = wrapper.original_module.parameters()
            for ours, theirs in zip(original, trained, strict=True):
                kept.append((ours, ours.data))
                ours.data = theirs.data
        with model.disable_adapter():
            yield
    finally:
        for parameter, value in kept:
            parameter.data = value

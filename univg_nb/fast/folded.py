"""A LoRA adapter folded into the weights for as long as nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch.nn import Module


@contextmanager
def fold_adapter(model: Module) -> Iterator[None]:
    """Make the active adapter a part of the weights: one product instead of three.

    With a small model on a CPU, LoRA's additional calls cost more than its arithmetic.
    The old weights come back bit for bit (subtraction would drift). Nothing is done
    where gradients are on, or where the adapter cannot be folded.
    """
    if torch.is_grad_enabled() or not _can_fold(model):
        yield
        return
    assert isinstance(model, PeftModel)
    kept = []
    try:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                weight = module.get_base_layer().weight
                kept.append((weight, weight.data))
                deltas = [module.get_delta_weight(a) for a in module.active_adapters]
                weight.data = torch.stack([weight.data, *deltas]).sum(0)
            elif isinstance(module, ModulesToSaveWrapper):
                # With adapters disabled it shows the original module.
                trained = module.modules_to_save[module.active_adapter].parameters()
                original = module.original_module.parameters()
                for ours, theirs in zip(original, trained, strict=True):
                    kept.append((ours, ours.data))
                    ours.data = theirs.data
        with model.disable_adapter():
            yield
    finally:
        for parameter, value in kept:
            parameter.data = value


def _can_fold(model: Module) -> bool:
    """Return whether this is plain LoRA, switched on, on whole float32 weights.

    bf16 would round the sum, and 4-bit or sharded weights cannot take it.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    return bool(layers) and all(
        type(layer) is Linear
        and not layer.disable_adapters
        and not any(name in layer.lora_variant for name in layer.active_adapters)
        and layer.get_base_layer().weight.dtype == torch.float32
        and layer.get_base_layer().weight.dim() == 2
        for layer in layers
    )

"""A LoRA adapter folded into the weights for as long as nothing is trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch.nn import Module


@contextmanager
def fold_adapter(model: Module) -> Iterator[None]:
    """Make the active adapter a part of the weights: one product instead of three.

    With a small model on a CPU, LoRA's additional calls cost more than its arithmetic.
    The old weights come back bit for bit (PEFT's own unmerging would drift). Nothing is
    done where gradients are on, or where the adapter cannot be folded.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if torch.is_grad_enabled() or not all(map(_can_fold, layers)):
        yield
        return
    kept = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer in layers:
            weight = layer.get_base_layer().weight
            weight.data = weight.data.clone()
            layer.merge()
        yield
    finally:
        for layer, value in zip(layers, kept, strict=True):
            layer.get_base_layer().weight.data = value
            layer.merged_adapters.clear()


def _can_fold(layer: LoraLayer) -> bool:
    """Return whether this is plain LoRA, switched on, on whole float32 weights.

    bf16 would round the sum, and 4-bit or sharded weights cannot take it.
    """
    weight = layer.get_base_layer().weight
    return (
        type(layer) is Linear
        and not layer.disable_adapters
        and not any(name in layer.lora_variant for name in layer.active_adapters)
        and not any(layer.lora_bias.values())
        and weight.dtype == torch.float32
        and weight.dim() == 2
    )

"""Weights that DeepSpeed's ZeRO-3 has cut over the processes.

Between the loading of a model and the first update every process holds a slice of each
parameter, and the parameter itself is an empty tensor. Inside the trainer's forward
pass DeepSpeed puts them together, module by module; before it, nobody does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.integrations import is_deepspeed_zero3_enabled


def entries(parameter: torch.nn.Parameter) -> int:
    """Number of entries of a parameter, wherever they lie; cut ones know it."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def whole(module: torch.nn.Module) -> Iterator[None]:
    """Inside, every process has all weights of the module, to be read only.

    All processes have to come here together. Without ZeRO-3 nothing is done.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed import zero  # it is there, or ZeRO-3 were not on

    with zero.GatheredParameters(list(module.parameters())):
        yield

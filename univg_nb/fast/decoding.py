"""One step of sampling for all replies: their keys, and attention over them.

The keys of a prompt are kept once for its G replies, and each reply's own keys in a
buffer that doubles when it is full, so a step copies nothing that is there. A token's
scores are computed in two parts, over the prompt and over its own reply, and no reply's
with another.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention.flex_attention import BlockMask
from transformers import DynamicCache

ROOM = 32  # tokens of a reply that the first buffer has room for


class ReplyCache(DynamicCache):
    """The keys and values of D prompts, and of the G replies to each.

    Args:
        prompts: the cache of the prompts, which this one takes over.
        seen: (D, P) what is not padding in it.
        group: replies to each prompt, G.
    """

    def __init__(self, prompts: DynamicCache, seen: Tensor, group: int) -> None:
        super().__init__()
        self.layers = prompts.layers
        self.seen = seen
        self.group = group
        self.length = 0  # tokens of a reply that are in the buffers
        self._own: dict[int, Tensor] = {}  # by layer: (2, D, K, G, room, size)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """Keep the step's keys and values, (D, K, G, size); attention looks here."""
        new = torch.stack([key_states, value_states])  # (2, D, K, G, size)
        own = self._own.get(layer_idx)
        if own is None:
            own = new.new_empty(*new.shape[:-1], ROOM, new.size(-1))
        elif self.length == own.size(-2):
            own = torch.cat([own, torch.empty_like(own)], dim=-2)
        own[..., self.length, :] = new
        self._own[layer_idx] = own
        return key_states, value_states

    def get_own(self, layer: int) -> Tensor:
        """Return keys and values of the replies so far, (2, D, K, G, t, size)."""
        return self._own[layer][..., : self.length + 1, :]

    def select_rows(self, keep: Tensor) -> None:
        """Keep the prompts that `keep`, (D,), says, and their replies."""
        self.batch_select_indices(keep)
        self.seen = self.seen[keep]
        self._own = {layer: own[:, keep] for layer, own in self._own.items()}


class Step(BlockMask):
    """The mask of a step: every token sees its prompt and its own reply in a cache.

    By its type only a BlockMask, which every model of transformers hands to its layers
    as it is.
    """

    def __init__(self, cache: ReplyCache, dtype: torch.dtype) -> None:
        self.cache = cache
        hidden = torch.zeros_like(cache.seen, dtype=dtype)
        hidden.masked_fill_(~cache.seen, torch.finfo(dtype).min)
        self.padding = hidden[:, None, None]  # (D, 1, 1, P), added to the scores

    @property
    def shape(self) -> tuple[int, ...]:
        """That of a mask, (D, 1, G, keys)."""
        rows, keys = self.cache.seen.shape
        return rows, 1, self.cache.group, keys + self.cache.length + 1


def attend(module: Module, query: Tensor, step: Step, scaling: float) -> Tensor:
    """Compute the attention of one step: (D, H, G, size) -> (D, G, H, size)."""
    layer = step.cache.layers[module.layer_idx]
    keys, values = layer.keys, layer.values  # (D, K, P, size)
    own_keys, own_values = step.cache.get_own(module.layer_idx)  # (D, K, G, t, size)
    rows, heads, group, size = query.shape
    shared = keys.size(1)
    query = (query * scaling).reshape(rows, shared, -1, group, size)  # (D, K, r, G, d)
    whole = query.flatten(2, 3) @ keys.mT + step.padding  # (D, K, r*G, P)
    alone = (query.transpose(2, 3) @ own_keys.mT).transpose(2, 3)  # (D, K, r, G, t)
    scores = torch.cat([whole, alone.flatten(2, 3)], dim=-1)
    share = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    whole, alone = share.split([keys.size(2), own_keys.size(3)], dim=-1)
    alone = alone.view(rows, shared, -1, group, alone.size(-1)).transpose(2, 3)
    out = (whole @ values).view(query.shape)
    out = out + (alone @ own_values).transpose(2, 3)  # (D, K, r, G, size)
    return out.view(rows, heads, group, size).transpose(1, 2).contiguous()

"""Attention over packed rows without a mask over the row.

Under one mask for a whole row every reply is scored against all others, only for the
mask to drop it: work that grows with the square of the replies. Here each piece of a
row attends by itself, the prompt causally and each reply to the prompt and itself, by
torch's own scaled_dot_product_attention. FlexAttention does the like on a GPU.

Known to transformers as SEGMENTS (for the CPU) and FLEX (for a GPU):
`language_model.set_attn_implementation(SEGMENTS)`. With any other mask than `Segments`
or `BlockMask` they are sdpa. FLEX is not transformers' own "flex_attention", which
refuses Qwen2-VL and would take FlexAttention for whole rows too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENTS = "univg_segments"
FLEX = "univg_flex"


@dataclass
class Segments:
    """The pieces of packed rows, and what each reply may see.

    sizes: for every row [prompt, reply 1, ..., reply G, padding], in tokens; their sum
    is the same for all rows.
    """

    sizes: list[list[int]]
    masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, segments: Tensor) -> Segments:
        """From (B, S): 0 for the prompt, 1..G for the replies in order, -1 padding."""
        rows = []
        for row in segments.tolist():
            replies = [row.count(number) for number in range(1, max(row) + 1)]
            rows.append([row.count(0), *replies, row.count(-1)])
        return cls(rows)

    def mask(self, prompt: int, reply: int, like: Tensor) -> Tensor:
        """Added to scores, (reply, prompt + reply): the whole prompt, then causal."""
        key = (prompt, reply, like.dtype)
        if key not in self.masks:
            later = like.new_full((reply, reply), torch.finfo(like.dtype).min).triu(1)
            self.masks[key] = torch.cat([like.new_zeros(reply, prompt), later], dim=1)
        return self.masks[key]


def segment_attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Segments | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, H, S, D), key and value (B, K, S, D)
    with K heads that divide H -> (B, S, H, D)."""
    if not isinstance(attention_mask, Segments):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **others
        )
    how = {"dropout_p": dropout, "scale": scaling, "enable_gqa": True}
    rows = []
    for row, sizes in enumerate(attention_mask.sizes):
        # Split once: the backward pass then joins the pieces' gradients once.
        queries, keys, values = (
            x[row : row + 1].split(sizes, dim=2) for x in (query, key, value)
        )
        pieces = []
        if sizes[0]:  # a prompt of one token is the first of every reply
            pieces.append(
                scaled_dot_product_attention(
                    queries[0], keys[0], values[0], is_causal=True, **how
                )
            )
        for number in range(1, len(sizes) - 1):
            pieces.append(
                scaled_dot_product_attention(
                    queries[number],
                    torch.cat([keys[0], keys[number]], dim=2),
                    torch.cat([values[0], values[number]], dim=2),
                    attn_mask=attention_mask.mask(sizes[0], sizes[number], query),
                    **how,
                )
            )
        pieces.append(torch.zeros_like(queries[-1]))  # padding, whose states are unused
        rows.append(torch.cat(pieces, dim=2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def block_attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function, shapes as above: FlexAttention over a
    `BlockMask`, sdpa over any other mask."""
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **others
        )
    output, _ = flex_attention_forward(
        module, query, key, value, attention_mask, scaling, dropout=dropout
    )
    return output, None


for _name, _attention in ((SEGMENTS, segment_attention), (FLEX, block_attention)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)

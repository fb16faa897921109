"""Attention over packed rows, and the masks that it takes.

In a packed row (`packed_rows`) a prompt is followed by its replies. One mask over the
whole row would compute the scores of every reply with all others, only to drop them.
Here each piece of a row is computed by itself: the prompt causally, each reply over the
prompt and itself. On a CPU the mask is a list of pieces, `Segments`; on a GPU a
BlockMask of FlexAttention, which skips what nobody sees. transformers knows the
function as SEGMENTS and FLEX: `language_model.set_attn_implementation(SEGMENTS)`. FLEX
is not transformers' own "flex_attention", which refuses Qwen2-VL and would serve whole
rows too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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

from univg_nb.fast import decoding

SEGMENTS = "univg_segments"
FLEX = "univg_flex"
# Where the shared prompt was checked.
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


class Segments(BlockMask):
    """The pieces of packed rows, given to `packed_attention` in place of a mask.

    By its type only a BlockMask, which every model of transformers hands to its layers
    as it is.

    Args:
        ids: (B, S) 0 for the prompt, 1..G for the replies in order, -1 for padding.

    Attributes:
        sizes: for every row [prompt, reply 1, ..., reply G, padding], in tokens.
    """

    def __init__(self, ids: Tensor) -> None:
        self._rows, self._length = ids.shape
        self.sizes = [
            [row.count(number) for number in [*range(max(row) + 1), -1]]
            for row in ids.tolist()
        ]
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """That of a mask, (B, 1, S, S)."""
        return self._rows, 1, self._length, self._length

    def get_mask(self, prompt: int, reply: int, like: Tensor) -> Tensor:
        """Return what is added to a reply's scores, (reply, prompt + reply).

        It sees the whole prompt, and itself causally; `like` gives dtype and device.
        torch's own `causal_lower_right` compares dtypes before autocast can act, so
        mixed precision would fail with it.
        """
        key = (prompt, reply, like.dtype)
        if key not in self._masks:
            later = like.new_full((reply, reply), torch.finfo(like.dtype).min).triu(1)
            self._masks[key] = torch.cat([like.new_zeros(reply, prompt), later], dim=1)
        return self._masks[key]


def packed_attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention by Step, Segments or BlockMask, or as sdpa with another mask.

    The signature is that of transformers: query (B, H, S, D), key and value (B, K, S,
    D) with K heads that divide H; the result is (B, S, H, D).
    """
    tensors = module, query, key, value
    if isinstance(attention_mask, decoding.Step):
        return decoding.attend(module, query, attention_mask, others["scaling"]), None
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(*tensors, attention_mask, **others)
    if not isinstance(attention_mask, Segments):
        options = {name: others[name] for name in ("scaling", "dropout")}
        return flex_attention_forward(*tensors, attention_mask, **options)[0], None
    options = {"dropout_p": others["dropout"], "scale": others["scaling"]}
    options["enable_gqa"] = True
    rows = []
    for row, sizes in enumerate(attention_mask.sizes):
        # One split of all pieces: the backward pass joins their gradients once.
        queries, keys, values = (
            x[row : row + 1].split(sizes, dim=2) for x in (query, key, value)
        )
        prompt = queries[0], keys[0], values[0]
        pieces = [scaled_dot_product_attention(*prompt, is_causal=True, **options)]
        pieces += [
            scaled_dot_product_attention(
                queries[number],
                torch.cat([keys[0], keys[number]], dim=2),
                torch.cat([values[0], values[number]], dim=2),
                attn_mask=attention_mask.get_mask(sizes[0], sizes[number], query),
                **options,
            )
            for number in range(1, len(sizes) - 1)
        ]
        pieces.append(torch.zeros_like(queries[-1]))  # padding, whose states are unused
        rows.append(torch.cat(pieces, dim=2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


for _name in (SEGMENTS, FLEX):
    AttentionInterface.register(_name, packed_attention)
    AttentionMaskInterface.register(_name, sdpa_mask)


def get_attention(model: Module) -> str:
    """Return the name of the language model's attention implementation."""
    return model.config.get_text_config()._attn_implementation


def get_compute_dtype(model: Module) -> torch.dtype:
    """Return the dtype the model computes in: that of autocast where it is on."""
    first = next(model.parameters())
    if torch.is_autocast_enabled(first.device.type):
        return torch.get_autocast_dtype(first.device.type)
    return first.dtype


def make_additive_mask(allowed: Tensor, model: Module) -> Tensor:
    """Turn bool (B, Q, K) into what `model` adds to its scores, (B, 1, Q, K)."""
    dtype = get_compute_dtype(model)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


@contextmanager
def use_attention(backbone: Module, name: str) -> Iterator[None]:
    """Use another attention implementation of the language model for a while."""
    before = get_attention(backbone)
    backbone.language_model.set_attn_implementation(name)
    try:
        yield
    finally:
        backbone.language_model.set_attn_implementation(before)

"""The training pass of GRPO: a prompt and all its replies in one row.

    [ prompt without its last token | s1 | s2 | ... | sG ],   s_i = last token + reply i

The row runs through the unmodified model, so that images and prompt are computed once
for a group (`prompts` says why this is exact). Each segment starts with a copy of the
prompt's last token, so that every reply has its own place that predicts its first
token. TRL's fused head computes log-probs in tiles and recomputes the logits in the
backward pass. It gets the places of the replies only: neither its memory nor its time
grows with vocabulary x prompt.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    create_mask,
)
from torch.nn.utils.rnn import pad_sequence

from univg_nb.fast.attention import (
    FLEX,
    SEGMENTS,
    Segments,
    get_attention,
    make_additive_mask,
)
from univg_nb.fast.prompts import Prompt, compute_positions
from univg_nb.fast.vision_features import VisionCache, make_vision_inputs

UNLIMITED = 2**62

Group = tuple[Prompt, Sequence[int]]  # a prompt with the numbers of its rows


def block_mask(segments: Tensor) -> Tensor:
    """Return who sees whom, bool (B, S, S), query by key.

    segments: (B, S) 0 for the prompt, 1..G for the replies, -1 for padding. A token
    sees what is before it in its own segment and in the prompt.
    """
    rows, length = segments.shape
    rule = make_mask_rule(segments)
    return create_mask(rule, rows, None, length, length, segments.device)[:, 0]


def make_mask_rule(segments: Tensor) -> Callable[..., Tensor]:
    """Return `block_mask` in FlexAttention's form, a function of indices.

    A padding query sees the padding before it and itself: no row is all masked.
    """

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ours, theirs = segments[row, query], segments[row, key]
        return (query >= key) & ((ours == theirs) | (theirs == 0))

    return sees


def make_attention_mask(segments: Tensor, backbone: Module) -> Tensor | BlockMask:
    """Return the mask in the form that the model's attention takes.

    FLEX and SEGMENTS skip what nobody sees and never make a mask of length x length;
    sdpa and eager get one that is added to the scores.
    """
    attention = get_attention(backbone)
    if attention == SEGMENTS:
        return Segments(segments)
    if attention != FLEX:
        return make_additive_mask(block_mask(segments), backbone)
    rows, length = segments.shape
    rule = make_mask_rule(segments)
    return create_block_mask(rule, rows, None, length, length, segments.device)


def split_chunks(
    groups: Sequence[Group], lengths: Sequence[int], max_tokens: int = UNLIMITED
) -> list[list[Group]]:
    """Split groups into batches of at most `max_tokens`, padding included.

    lengths: reply tokens of every row. Similar lengths come together. Groups are never
    cut: one that is longer is a batch by itself.
    """

    def size(group: Group) -> int:
        return len(group[0].ids) + sum(lengths[row] for row in group[1])

    chunks: list[list[Group]] = []
    for group in sorted(groups, key=size):  # the longest of a chunk is its last
        if not chunks or (len(chunks[-1]) + 1) * size(group) > max_tokens:
            chunks.append([])
        chunks[-1].append(group)
    return chunks


def pack_row(
    backbone: Module, prompt: Prompt, replies: Sequence[Tensor]
) -> list[Tensor]:
    """Return the packed row of a group: ids, labels, segments (S,), positions (S, 3).

    Labels are the next tokens, -100 in the prompt. A reply may be empty: TRL masks out
    truncated ones.
    """
    positions = compute_positions(backbone, prompt).T  # (P, 3)
    ids, last = prompt.ids[:-1], positions[-1]
    assert int(positions.max()) == int(last.max()), "a prompt must end in text"
    none, zero = torch.full_like(ids, -100), torch.zeros_like(ids)
    pieces = [(ids, none, zero, positions[:-1])]
    for number, reply in enumerate(replies, start=1):
        shifted = torch.cat([prompt.ids[-1:], reply])[: len(reply)]
        places = last + torch.arange(len(reply), device=reply.device)[:, None]
        pieces.append((shifted, reply, torch.full_like(reply, number), places))
    return [torch.cat(column) for column in zip(*pieces, strict=True)]


def compute_log_probs(
    model: Module,
    backbone: Module,
    groups: Sequence[Group],
    replies: Sequence[Tensor] | Tensor,
    vision: VisionCache | None = None,
) -> dict[int, tuple[Tensor, ...]]:
    """Compute log-probs and entropies of the replies of `groups`, packed.

    model: has TRL's fused head; backbone: what is below it; replies: (L,) of every row,
    without padding. Returns {row: (log-probs, entropies)}, each (L,) in float32;
    (log-probs,) where the head computes no entropies.
    """
    packed = [
        pack_row(backbone, prompt, [replies[row] for row in rows])
        for prompt, rows in groups
    ]
    columns = zip(zip(*packed, strict=True), (0, -100, -1, 0), strict=True)
    ids, labels, segments, positions = (
        pad_sequence(column, batch_first=True, padding_value=padding)
        for column, padding in columns
    )
    chosen = labels != -100

    def select(_module: Module, _inputs: tuple, output: Any) -> Any:
        """Leave the states of `chosen`: off Triton TRL's head scores every place."""
        output.last_hidden_state = output.last_hidden_state[chosen][None]
        return output

    images = [image for prompt, _ in groups for image in prompt.images]
    with backbone.register_forward_hook(select):
        outputs = model(
            input_ids=ids,
            attention_mask=make_attention_mask(segments, backbone),
            position_ids=positions.permute(2, 0, 1),  # (3, B, S)
            shift_labels=labels[chosen][None],
            fused_lm_head=True,
            **make_vision_inputs(images, vision),
        )
    order = [row for _, rows in groups for row in rows]
    lengths = [len(replies[row]) for row in order]
    values = (outputs.log_probs, outputs.entropy)
    parts = [x[0].split(lengths) for x in values if x is not None]
    return dict(zip(order, zip(*parts, strict=True), strict=True))

"""The training pass of GRPO: a prompt and all its replies in one row.

    [ prompt without its last token | s1 | s2 | ... | sG ],   s_i = last token + reply i

The row runs through the unmodified model, so that images and prompt are computed once
for a group (`prompts` says why this is exact). Each segment starts with a copy of the
prompt's last token, so that every reply has its own place that predicts its first
token. TRL's fused head computes log-probs in tiles and recomputes the logits in the
backward pass. It gets the places of the replies only: neither its memory nor its time
grows with vocabulary x prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
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

Groups = list[tuple[Prompt, list[int]]]  # each prompt with the numbers of its rows


def block_mask(segments: Tensor) -> Tensor:
    """Return who sees whom: causal, and of other segments only the prompt.

    Args:
        segments: (B, S) 0 for the prompt, 1..G for the replies, -1 for padding.

    Returns:
        bool (B, S, S), query by key.
    """
    row = torch.arange(len(segments), device=segments.device)[:, None, None]
    place = torch.arange(segments.size(1), device=segments.device)
    return make_mask_rule(segments)(row, row, place[:, None], place)


def make_mask_rule(segments: Tensor) -> Callable[..., Tensor]:
    """Return `block_mask` in FlexAttention's form, a function of indices.

    A padding query sees the padding before it and itself: no row is all masked.
    """

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ours, theirs = segments[row, query], segments[row, key]
        return (query >= key) & ((ours == theirs) | (theirs == 0))

    return sees


def make_attention_mask(
    segments: Tensor, backbone: Module
) -> Tensor | BlockMask | dict[str, Segments]:
    """Return the mask in the form that the model's attention takes.

    FLEX and SEGMENTS skip what nobody sees and never make a mask of length x length;
    sdpa and eager get one that is added to the scores.
    """
    attention = get_attention(backbone)
    if attention == SEGMENTS:  # a dict reaches the layers as it is
        kinds = backbone.config.get_text_config().layer_types
        return dict.fromkeys(kinds, Segments.from_ids(segments))
    if attention != FLEX:
        return make_additive_mask(block_mask(segments), backbone)
    rows, length = segments.shape
    rule, device = make_mask_rule(segments), segments.device
    return create_block_mask(rule, rows, None, length, length, device=device)


def split_chunks(
    groups: Groups, lengths: Sequence[int], max_tokens: int = UNLIMITED
) -> list[Groups]:
    """Split groups into batches of at most `max_tokens`, padding included.

    lengths: reply tokens of every row. Similar lengths come together. Groups are never
    cut: one that is longer is a batch by itself.
    """

    def size(group: tuple[Prompt, list[int]]) -> int:
        return len(group[0].ids) + sum(lengths[row] for row in group[1])

    chunks: list[Groups] = []
    for group in sorted(groups, key=size):  # the longest of a chunk is its last
        if not chunks or (len(chunks[-1]) + 1) * size(group) > max_tokens:
            chunks.append([])
        chunks[-1].append(group)
    return chunks


@contextmanager
def only_at(backbone: Module, chosen: Tensor) -> Iterator[None]:
    """Let the backbone return only its states at `chosen`, bool (B, S), as one row.

    The head then costs nothing for the prompt; off Triton TRL's scores every place.
    """

    def select(_module: Module, _inputs: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[chosen][None]
        return output

    handle = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


def compute_log_probs(
    model: Module,
    backbone: Module,
    groups: Sequence[tuple[Prompt, Sequence[Tensor]]],
    vision: VisionCache | None = None,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Compute log-probs and entropies of all replies, with one row for each group.

    model: has TRL's fused head; backbone: its Qwen2VLModel; groups: each prompt with
    its replies (L,) without padding. Returns values (L,) of every reply in order, in
    float32; the entropies are () where the head computes none.
    """
    rows: dict[str, list[Tensor]] = {"ids": [], "labels": [], "segments": [], "pos": []}
    for prompt, replies in groups:
        place = compute_positions(backbone, prompt)  # (3, P)
        last, start = prompt.ids[-1:], place[:, -1:]
        assert int(place.max()) == int(start.max()), "a prompt must end in text"
        ids = [prompt.ids[:-1]]
        labels = [torch.full_like(prompt.ids[:-1], -100)]
        segments = [torch.zeros_like(prompt.ids[:-1])]
        positions = [place[:, :-1]]
        for number, reply in enumerate(replies, start=1):
            if not len(reply):  # a truncated reply that TRL masks out altogether
                continue
            ids += [last, reply[:-1]]
            labels.append(reply)
            segments.append(torch.full_like(reply, number))
            positions.append(start + torch.arange(len(reply), device=reply.device))
        rows["ids"].append(torch.cat(ids))
        rows["labels"].append(torch.cat(labels))
        rows["segments"].append(torch.cat(segments))
        rows["pos"].append(torch.cat(positions, dim=1).T)  # (S, 3)
    input_ids = pad_sequence(rows["ids"], batch_first=True)  # (B, S)
    label_ids = pad_sequence(rows["labels"], batch_first=True, padding_value=-100)
    segment_ids = pad_sequence(rows["segments"], batch_first=True, padding_value=-1)
    position_ids = pad_sequence(rows["pos"], batch_first=True).permute(2, 0, 1)
    chosen = label_ids != -100
    images = [image for prompt, _ in groups for image in prompt.images]
    with only_at(backbone, chosen):
        outputs = model(
            input_ids=input_ids,
            attention_mask=make_attention_mask(segment_ids, backbone),
            position_ids=position_ids,  # (3, B, S)
            shift_labels=label_ids[chosen][None],
            fused_lm_head=True,
            **make_vision_inputs(backbone, images, vision),
        )
    lengths = [len(reply) for _, replies in groups for reply in replies]
    if outputs.entropy is None:
        return outputs.log_probs[0].split(lengths), ()
    return outputs.log_probs[0].split(lengths), outputs.entropy[0].split(lengths)

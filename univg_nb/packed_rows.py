"""The training forward of GRPO: a prompt and all its replies in one row.

    [ prompt without its last token | s1 | s2 | ... | sG ],   s_i = last token + reply i

runs through the unmodified model, so that images and prompt are computed once a group
(`shared_prefix` says why that is exact). Each segment starts with a copy of the
prompt's last token, so that every reply has its own place from which its first token is
predicted. TRL's fused head makes log-probs in tiles and computes the logits again in
the backward pass; it gets the replies' places only, so neither its memory nor its time
grows with vocabulary x prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.utils.rnn import pad_sequence

from univg_nb.segment_attention import FLEX, SEGMENTS, Segments
from univg_nb.shared_prefix import Prompt, additive, attention_of, prompt_positions
from univg_nb.vision_cache import VisionCache, vision_inputs

UNLIMITED = 2**62


def block_mask(segments: Tensor) -> Tensor:
    """Who sees whom, bool (B, S, S): causal, a segment sees segment 0 and itself only.

    segments: (B, S) 0 for the prompt, 1..G for the replies, -1 for padding.
    """
    length = segments.size(1)
    key, query = segments[:, None, :], segments[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=key.device).tril()
    # A padding query sees the padding before it and itself: no row is all masked.
    return causal & ((key == query) | (key == 0))


def segment_rule(segments: Tensor) -> Callable[..., Tensor]:
    """`block_mask` as FlexAttention asks for it: a function of indices."""

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ours, theirs = segments[row, query], segments[row, key]
        return (query >= key) & ((ours == theirs) | (theirs == 0))

    return sees


def attention_mask(
    segments: Tensor, backbone: Module
) -> Tensor | BlockMask | dict[str, Segments]:
    """The mask in the form that the model's attention takes.

    FLEX (GPU) and SEGMENTS (CPU) skip what nobody sees and never make a mask
    of length x length; sdpa and eager get one that is added to the scores.
    """
    if attention_of(backbone) == SEGMENTS:  # a dict reaches the layers as it is
        kinds = backbone.config.get_text_config().layer_types
        return dict.fromkeys(kinds, Segments.of(segments))
    if attention_of(backbone) != FLEX:
        return additive(block_mask(segments), backbone)
    rows, length = segments.shape
    rule, device = segment_rule(segments), segments.device
    return create_block_mask(rule, rows, None, length, length, device=device)


def chunked(
    groups: Sequence[tuple[Prompt, list[int]]],
    lengths: Sequence[int],
    max_tokens: int = UNLIMITED,
) -> list[list[tuple[Prompt, list[int]]]]:
    """Split groups into batches of at most `max_tokens`, padding included.

    lengths: reply tokens of every row. Similar lengths come together. Groups are never
    cut, so one that is longer than the budget is a batch by itself.
    """

    def size(group: tuple[Prompt, list[int]]) -> int:
        return len(group[0].ids) + sum(lengths[row] for row in group[1])

    chunks: list[list[tuple[Prompt, list[int]]]] = []
    for group in sorted(groups, key=size):  # the longest of a chunk is its last
        if not chunks or (len(chunks[-1]) + 1) * size(group) > max_tokens:
            chunks.append([])
        chunks[-1].append(group)
    return chunks


@contextmanager
def only_at(backbone: Module, chosen: Tensor) -> Iterator[None]:
    """Inside, the backbone returns its states at `chosen` only, as one row.

    chosen: bool (B, S). What follows the backbone (the head) then costs nothing for the
    prompt; off Triton devices TRL's head would score every place.
    """

    def select(_module: Module, _inputs: tuple, output: object) -> object:
        output.last_hidden_state = output.last_hidden_state[chosen][None]
        return output

    handle = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


def packed_log_probs(
    model: Module,
    backbone: Module,
    groups: Sequence[tuple[Prompt, Sequence[Tensor]]],
    vision: VisionCache | None = None,
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Log-probability and entropy of every reply token, one row per group.

    model: called with TRL's fused head (`fused_lm_head=True`, pre-shifted labels);
    backbone: its Qwen2VLModel, for positions. groups: prompt and replies, each (L_i,)
    without padding; vision: remembers image features. Returns two nested lists
    [group][reply] of (L_i,) tensors in float32, the second [] where the head computes
    no entropies.
    """
    rows: dict[str, list[Tensor]] = {"ids": [], "labels": [], "segments": [], "pos": []}
    for prompt, replies in groups:
        where = prompt_positions(backbone, prompt)  # (3, P)
        last, start = prompt.ids[-1:], where[:, -1:]
        assert int(where.max()) == int(start.max()), "a prompt must end in text"
        ids = [prompt.ids[:-1]]
        labels = [torch.full_like(prompt.ids[:-1], -100)]
        segments = [torch.zeros_like(prompt.ids[:-1])]
        positions = [where[:, :-1]]
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
    labels = pad_sequence(rows["labels"], batch_first=True, padding_value=-100)
    segments = pad_sequence(rows["segments"], batch_first=True, padding_value=-1)
    positions = pad_sequence(rows["pos"], batch_first=True).permute(2, 0, 1)
    chosen = labels != -100
    images = [image for prompt, _ in groups for image in prompt.images]
    with only_at(backbone, chosen):
        outputs = model(
            input_ids=input_ids,
            attention_mask=attention_mask(segments, backbone),
            position_ids=positions,  # (3, B, S)
            shift_labels=labels[chosen][None],
            fused_lm_head=True,
            **vision_inputs(backbone, images, vision),
        )
    lengths = [len(reply) for _, replies in groups for reply in replies]

    def split(values: Tensor | None) -> list[list[Tensor]]:
        if values is None:
            return []
        parts = iter(values[0].split(lengths))
        return [[next(parts) for _ in replies] for _, replies in groups]

    return split(outputs.log_probs), split(outputs.entropy)

"""One vision pass and one prefill for all replies to a prompt.

The G replies of a group share a long prompt with images. Both functions here lay them
out in ONE row of the unmodified model, so that images and prompt are computed once:

    [ prompt without its last token | s1 | s2 | ... | sG ],   s_i = last token + reply i

Reply i sees the prompt and itself (a 4-D attention mask) and takes the positions that
follow the prompt (M-RoPE), exactly as if it stood alone. Each segment starts with a
copy of the prompt's last token, so that every reply has its own place from which its
first token is predicted. DESIGN sec. 9 has the measurement that this is exact.

Works for models with Qwen2-VL's `get_rope_index` and sdpa or eager attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LogitsProcessorList

ATTENTION = ("sdpa", "eager")  # the ones that take a 4-D mask
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")


@dataclass
class Prompt:
    """One distinct prompt and its images, no padding.

    ids: (P,) token ids; token_types: (P,) 0 text, 1 image; pixel_values: (patches,
    patch_dim) or None; grid: (images, 3) patches in time, height, width, or None.
    """

    ids: Tensor
    token_types: Tensor
    pixel_values: Tensor | None
    grid: Tensor | None

    def same_as(self, other: Prompt) -> bool:
        """Whether both are the same text over the same pixels."""
        if (self.pixel_values is None) != (other.pixel_values is None):
            return False
        return torch.equal(self.ids, other.ids) and (
            self.pixel_values is None
            or (
                torch.equal(self.grid, other.grid)
                and torch.equal(self.pixel_values, other.pixel_values)
            )
        )


def supports(model: Module) -> bool:
    """Whether this model can run shared rows (else the trainer takes TRL's way)."""
    config = model.config
    return config.model_type in MODEL_TYPES and config._attn_implementation in ATTENTION


def split_rows(
    input_ids: Tensor,
    attention_mask: Tensor,
    token_types: Tensor,
    prompt_length: int,
    pixel_values: Tensor | None,
    grid: Tensor | None,
    num_images: Sequence[int] | None,
) -> list[tuple[Prompt, list[int]]]:
    """Runs of adjacent rows with the same prompt: [(prompt, its row numbers), ...].

    input_ids, attention_mask, token_types: (B, P+C), prompts left-padded. A group cut
    by a micro-batch border just gives two runs; nothing depends on G.
    """
    counts = num_images or [0] * len(input_ids)
    image_ends = [0, *accumulate(counts)]
    patches = [0, *accumulate(grid.prod(-1).tolist())] if grid is not None else [0]
    runs: list[tuple[Prompt, list[int]]] = []
    for row in range(len(input_ids)):
        real = attention_mask[row, :prompt_length].bool()
        first, last = image_ends[row], image_ends[row + 1]
        prompt = Prompt(
            input_ids[row, :prompt_length][real],
            token_types[row, :prompt_length][real],
            pixel_values[patches[first] : patches[last]] if last > first else None,
            grid[first:last] if last > first else None,
        )
        if runs and prompt.same_as(runs[-1][0]):
            runs[-1][1].append(row)
        else:
            runs.append((prompt, [row]))
    return runs


def prompt_positions(backbone: Module, prompt: Prompt) -> Tensor:
    """M-RoPE positions of a prompt, (3, P); replies continue at the maximum + 1."""
    if prompt.grid is None:
        return torch.arange(len(prompt.ids), device=prompt.ids.device).expand(3, -1)
    positions, _ = backbone.get_rope_index(
        prompt.ids[None],
        mm_token_type_ids=prompt.token_types[None],
        image_grid_thw=prompt.grid,
    )
    return positions[:, 0]  # (3, 1, P) -> (3, P)


def vision_inputs(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """pixel_values and image_grid_thw of several prompts in a row."""
    seen = [p for p in prompts if p.grid is not None]
    if not seen:
        return {}
    return {
        "pixel_values": torch.cat([p.pixel_values for p in seen]),
        "image_grid_thw": torch.cat([p.grid for p in seen]),
    }


def block_mask(segments: Tensor) -> Tensor:
    """Who sees whom, bool (B, S, S): causal, a segment sees segment 0 and itself only.

    segments: (B, S) 0 for the prompt, 1..G for the replies, -1 for padding.
    """
    length = segments.size(1)
    key, query = segments[:, None, :], segments[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=key.device).tril()
    # A padding query sees the padding before it and itself: no row is all masked.
    return causal & ((key == query) | (key == 0))


def additive(allowed: Tensor, model: Module) -> Tensor:
    """bool (B, Q, K) -> what attention adds to its scores, (B, 1, Q, K).

    In the dtype the scores will have: that of autocast where it is on.
    """
    device = allowed.device.type
    dtype = next(model.parameters()).dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def chunked(
    groups: Sequence[tuple[Prompt, list[int]]], lengths: Sequence[int], rows: int
) -> list[list[tuple[Prompt, list[int]]]]:
    """Split groups into chunks of about `rows` rows, similar lengths together.

    lengths: reply tokens of every row. Groups are never cut, so a chunk can be larger.
    """
    order = sorted(
        groups, key=lambda g: len(g[0].ids) + sum(lengths[row] for row in g[1])
    )
    chunks: list[list[tuple[Prompt, list[int]]]] = []
    filled = 0
    for group in order:
        if not chunks or filled + len(group[1]) > rows:
            chunks.append([])
            filled = 0
        chunks[-1].append(group)
        filled += len(group[1])
    return chunks


def packed_log_probs(
    model: Module,
    backbone: Module,
    groups: Sequence[tuple[Prompt, Sequence[Tensor]]],
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Log-probability and entropy of every reply token, one row per group.

    model: called with TRL's fused head (`fused_lm_head=True`, pre-shifted labels);
    backbone: its Qwen2VLModel, for positions. groups: prompt and replies, each (L_i,)
    without padding, L_i >= 1. Returns two nested lists [group][reply] of (L_i,) tensors
    in float32; the entropies are None where the head does not compute them.
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
    outputs = model(
        input_ids=input_ids,
        attention_mask=additive(block_mask(segments), backbone),
        position_ids=positions,  # (3, B, S)
        shift_labels=labels,
        fused_lm_head=True,
        **vision_inputs([prompt for prompt, _ in groups]),
    )

    def split(values: Tensor | None) -> list[list[Tensor]]:
        if values is None:
            return []
        parts = []
        for row, (prompt, replies) in zip(values, groups, strict=True):
            lengths = [len(reply) for reply in replies]
            start = len(prompt.ids) - 1
            parts.append(list(row[start : start + sum(lengths)].split(lengths)))
        return parts

    return split(outputs.log_probs), split(outputs.entropy)


@torch.no_grad()
def sample_replies(
    model: Module,
    backbone: Module,
    prompts: Sequence[Prompt],
    num_replies: int,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    warp: LogitsProcessorList,
) -> list[list[list[int]]]:
    """Sample `num_replies` replies to every prompt: [prompt][reply] -> token ids.

    Each prompt is one row of the batch and its replies are `num_replies` queries of
    that row, so the cache holds the prompt once. A reply ends with its first EOS, which
    is kept, or at `max_new_tokens`. Rows whose replies are all done leave the batch.
    `warp` turns logits (N, V) into the logits sampled from (temperature, top-p, banned
    tokens). Raises FloatingPointError when they are not finite.
    """
    device = prompts[0].ids.device
    where = [prompt_positions(backbone, prompt) for prompt in prompts]
    width = max(len(prompt.ids) for prompt in prompts) - 1
    size, group = len(prompts), num_replies
    ids = torch.zeros(size, width, dtype=torch.long, device=device)
    seen = torch.zeros(size, width, dtype=torch.bool, device=device)
    positions = torch.zeros(3, size, width, dtype=torch.long, device=device)
    for row, (prompt, place) in enumerate(zip(prompts, where, strict=True)):
        count = len(prompt.ids) - 1
        ids[row, width - count :] = prompt.ids[:-1]
        seen[row, width - count :] = True
        positions[:, row, width - count :] = place[:, :-1]
    cache = DynamicCache(config=backbone.config.get_text_config())
    backbone(
        input_ids=ids,
        attention_mask=seen.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        **vision_inputs(prompts),
    )
    tokens = torch.stack([p.ids[-1] for p in prompts])[:, None].repeat(1, group)
    at = torch.stack([place[:, -1] for place in where], dim=1)  # (3, D)
    eos = torch.tensor(list(eos_token_ids), device=device)
    finished = torch.zeros(size, group, dtype=torch.bool, device=device)
    alive = torch.arange(size, device=device)  # which prompts the rows still are
    replies: list[list[list[int]]] = [[[] for _ in range(group)] for _ in prompts]
    # Keys of later steps lie behind the prompt, `group` a step, one for each reply.
    own = torch.eye(group, dtype=torch.bool, device=device)
    head = model.get_output_embeddings()
    for step in range(max_new_tokens):
        mask = torch.cat(
            [
                seen[:, None, :].expand(-1, group, -1),
                own.repeat(1, step + 1).expand(len(alive), -1, -1),
            ],
            dim=2,
        )  # (D, G, width + G*(step+1))
        hidden = backbone(
            input_ids=tokens,
            attention_mask=additive(mask, backbone),
            position_ids=(at + step)[:, :, None].expand(-1, -1, group),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # (D, G, H)
        logits = head(hidden).float().flatten(0, 1)  # (D*G, V)
        probabilities = warp(tokens.view(-1, 1), logits).softmax(-1)
        if not probabilities.isfinite().all():
            raise FloatingPointError(
                "the policy's next-token probabilities are not finite: its weights "
                "have diverged; lower grpo.learning_rate or grpo.max_grad_norm"
            )
        tokens = torch.multinomial(probabilities, 1).view(-1, group)
        for row, prompt in enumerate(alive.tolist()):
            for reply, token in enumerate(tokens[row].tolist()):
                if not finished[row, reply]:
                    replies[prompt][reply].append(token)
        finished = finished | torch.isin(tokens, eos)
        keep = ~finished.all(dim=1)
        if not keep.all():
            if not keep.any():
                break
            cache.batch_select_indices(keep)
            alive, finished, seen = alive[keep], finished[keep], seen[keep]
            tokens, at = tokens[keep], at[:, keep]
    return replies

"""One prefill for all replies to a prompt: prompts, positions, masks, and sampling.

The G replies of a group share a long prompt with images. Here each distinct prompt goes
through the model once, in the rollout (`sample_replies`) as in the training passes
(`packed_rows`). A reply sees the prompt and itself (a 4-D attention mask) and takes the
positions that follow the prompt (M-RoPE), exactly as if it stood alone.

Works for models with Qwen2-VL's `get_rope_index`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache, LogitsProcessorList

from univg_nb.noise import SeededNoise
from univg_nb.segment_attention import FLEX, SEGMENTS
from univg_nb.vision_cache import VisionCache, vision_inputs

ATTENTION = ("sdpa", "eager", FLEX, SEGMENTS)  # that take our masks
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

    @property
    def images(self) -> list[tuple[Tensor, Tensor]]:
        """[(pixel_values, grid)], or [] without images."""
        return [] if self.grid is None else [(self.pixel_values, self.grid)]

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


def attention_of(model: Module) -> str:
    """The attention implementation of the language model."""
    return model.config.get_text_config()._attn_implementation


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


def compute_dtype(model: Module) -> torch.dtype:
    """What the model computes in: the dtype of autocast where it is on."""
    first = next(model.parameters())
    if torch.is_autocast_enabled(first.device.type):
        return torch.get_autocast_dtype(first.device.type)
    return first.dtype


def additive(allowed: Tensor, model: Module) -> Tensor:
    """bool (B, Q, K) -> what attention adds to its scores, (B, 1, Q, K)."""
    dtype = compute_dtype(model)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


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
    seeds: Sequence[int],
    vision: VisionCache | None = None,
) -> list[list[list[int]]]:
    """Sample `num_replies` replies to every prompt: [prompt][reply] -> token ids.

    Each prompt is one row of the batch and its replies are `num_replies` queries of
    that row, so the cache holds the prompt once. A reply ends with its first EOS, which
    is kept, or at `max_new_tokens`. Rows whose replies are all done leave the batch.
    `warp` turns logits (N, V) into the logits sampled from (temperature, top-p, banned
    tokens); seeds: one for each reply, those of a prompt adjacent, so that a reply does
    not depend on the others; vision remembers image features. Raises
    FloatingPointError when the probabilities are not finite.
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
        **vision_inputs(backbone, [i for p in prompts for i in p.images], vision),
    )
    tokens = torch.stack([p.ids[-1] for p in prompts])[:, None].repeat(1, group)
    at = torch.stack([place[:, -1] for place in where], dim=1)  # (3, D)
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
    finished = torch.zeros(size, group, dtype=torch.bool, device=device)
    alive = torch.arange(size, device=device)  # which prompts the rows still are
    replies: list[list[list[int]]] = [[[] for _ in range(group)] for _ in prompts]
    # Keys of later steps lie behind the prompt, `group` a step, one for each reply.
    own = torch.eye(group, dtype=torch.bool, device=device)
    head = model.get_output_embeddings()
    noise = SeededNoise(seeds, temperature=1.0)
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
        tokens = noise(tokens, probabilities.log()).argmax(-1).view(-1, group)
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
            noise.keep(keep.repeat_interleave(group).nonzero()[:, 0].tolist())
            alive, finished, seen = alive[keep], finished[keep], seen[keep]
            tokens, at = tokens[keep], at[:, keep]
    return replies

"""Tells some attention heads of the base model where to look while it learns.

Binding words to the thing they name is the slow part of learning to point: for long
the model knows that there are things, and where, but not which is meant. The lessons
know where each part of a reply is to be seen, so two heads are taught to put their
attention there. Only pre-training does this; the model itself stays as it is.
"""

import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

HEADS = ((1, 0), (2, 0), (2, 3))  # (layer, query head) that are guided


class AttentionGuide:
    """Keeps what the guided layers attend from and computes the guiding loss."""

    def __init__(self, layers: nn.ModuleList):
        self.seen: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        self.attention = {number: layers[number].self_attn for number, _ in HEADS}
        for number, attention in self.attention.items():
            attention.register_forward_pre_hook(self._keep(number), with_kwargs=True)

    def _keep(self, number: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = kwargs["hidden_states"] if not args else args[0]
            self.seen[number] = (hidden, kwargs["position_embeddings"])

        return hook

    def loss(self, look_from: Tensor, look_at: Tensor) -> Tensor:
        """Mean of -log(attention that falls on ``look_at``) over looks and heads.

        look_from: (N, 2) row and position of the query; look_at: (N, T) allowed keys.
        """
        losses = [self._head(layer, head, look_from, look_at) for layer, head in HEADS]
        self.seen.clear()
        return torch.stack(losses).mean()

    def _head(
        self, layer: int, head: int, look_from: Tensor, look_at: Tensor
    ) -> Tensor:
        attention = self.attention[layer]
        hidden, (cos, sin) = self.seen[layer]  # (B, T, H)
        size = attention.head_dim
        q = attention.q_proj(hidden).unflatten(-1, (-1, size))[:, :, head]
        k = attention.k_proj(hidden).unflatten(-1, (-1, size))
        k = k[:, :, head // attention.num_key_value_groups]  # (B, T, head_dim)
        q, k = apply_rotary_pos_emb(q[:, None], k[:, None], cos, sin)
        rows, at = look_from.unbind(1)
        scores = (q[:, 0] @ k[:, 0].transpose(1, 2)) * attention.scaling  # (B, T, T)
        scores = scores[rows, at]  # (N, T)
        future = torch.arange(scores.shape[1]) > at[:, None]
        scores = scores.masked_fill(future, float("-inf"))
        wanted = scores.masked_fill(~look_at, float("-inf")).logsumexp(-1)
        return (scores.logsumexp(-1) - wanted).mean()

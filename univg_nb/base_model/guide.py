"""Tells some attention heads of the base model where to look while it learns.

Binding words to the thing they name is the slow part of learning to point: for long
the model knows that there are things, and where, but not which is meant. The lessons
know where each part of a reply is to be seen, so a chain of heads is taught to find
it: the phrase in the question looks at the thing it names, each token of the reply
looks back at the phrase, and then at the thing itself. Only pre-training does this;
the model itself stays as it is. All three steps are guided, because a reply cannot
find the thing before it has learned to look back at the phrase that names it.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

# (layer, query head) that learn each step; layers of a step come one after the other.
PHRASE_TO_THING = ((0, 0), (1, 0))
REPLY_TO_PHRASE = ((1, 4), (2, 4))
REPLY_TO_THING = ((2, 0), (3, 0), (3, 3))
# "image 2" looks at the second picture. Not in layer 0: which one a picture is, its
# tokens can only learn there.
NUMBER_TO_IMAGE = ((1, 3), (2, 3))
NUMBER = -2  # in the place of a phrase: the token that says which image


class Looks(NamedTuple):
    """Where the tokens of a batch should look.

    row, at: (N,) the query; thing: (N, T) bool, the image tokens of what it is about;
    phrase: (N,) position of the phrase's last token, -1 for none, or NUMBER; asking:
    (N,) bool, whether the query is that token itself and not one of the reply.
    """

    row: Tensor
    at: Tensor
    thing: Tensor
    phrase: Tensor
    asking: Tensor

    def only(self, keep: Tensor) -> "Looks":
        """The looks selected by the boolean ``keep`` (N,)."""
        return Looks(*(part[keep] for part in self))


class AttentionGuide:
    """Keeps what the guided layers attend from and computes the guiding loss."""

    def __init__(self, layers: nn.ModuleList):
        self.seen: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        self.attention = dict(enumerate(layer.self_attn for layer in layers))
        for number, attention in self.attention.items():
            attention.register_forward_pre_hook(self._keep(number), with_kwargs=True)

    def _keep(self, number: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = kwargs["hidden_states"] if not args else args[0]
            self.seen[number] = (hidden, kwargs["position_embeddings"])

        return hook

    def loss(self, looks: Looks) -> dict[str, Tensor]:
        """For each step, the mean of -log(attention that falls where it should)."""
        number = looks.phrase == NUMBER
        asking = looks.only(looks.asking)
        replying = looks.only(~looks.asking & ~number)
        naming = replying.only(replying.phrase >= 0)
        length = looks.thing.shape[1]
        phrase = torch.nn.functional.one_hot(naming.phrase, length).bool()
        counted = looks.only(number)
        losses = {
            "phrase_to_thing": self._step(PHRASE_TO_THING, asking, asking.thing),
            "reply_to_phrase": self._step(REPLY_TO_PHRASE, naming, phrase),
            "reply_to_thing": self._step(REPLY_TO_THING, replying, replying.thing),
        }
        if len(counted.at):
            losses["number_to_image"] = self._step(
                NUMBER_TO_IMAGE, counted, counted.thing
            )
        self.seen.clear()
        return losses

    def _step(self, heads: tuple, looks: Looks, wanted: Tensor) -> Tensor:
        if not len(looks.at):
            return torch.zeros(())
        return torch.stack([self._head(*h, looks, wanted) for h in heads]).mean()

    def _head(self, layer: int, head: int, looks: Looks, wanted: Tensor) -> Tensor:
        attention = self.attention[layer]
        hidden, (cos, sin) = self.seen[layer]  # (B, T, H)
        size = attention.head_dim
        q = attention.q_proj(hidden).unflatten(-1, (-1, size))[:, :, head]
        k = attention.k_proj(hidden).unflatten(-1, (-1, size))
        k = k[:, :, head // attention.num_key_value_groups]  # (B, T, head_dim)
        q, k = apply_rotary_pos_emb(q[:, None], k[:, None], cos, sin)
        # Row by row, since few positions of a row are asked: looks are in row order.
        counts = torch.bincount(looks.row, minlength=len(hidden)).tolist()
        asked = zip(q[:, 0], k[:, 0], looks.at.split(counts), strict=True)
        scores = torch.cat([queries[at] @ keys.T for queries, keys, at in asked])
        scores = scores * attention.scaling  # (N, T)
        future = torch.arange(scores.shape[1]) > looks.at[:, None]
        scores = scores.masked_fill(future, float("-inf"))
        inside = scores.masked_fill(~wanted, float("-inf")).logsumexp(-1)
        return (scores.logsumexp(-1) - inside).mean()

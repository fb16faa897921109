"""A loss that tells some attention heads of the base model where to look.

Binding words to the thing they name is the slow part of learning to point: for a long
time the model knows that there are things, and where, but not which is meant. The
lessons know where each part of a reply is visible, so a chain of heads is taught to
find it: the phrase in the question looks at the thing it names, each token of the reply
looks back at the phrase, and then at the thing itself. All three steps are guided,
because a reply cannot find the thing before it has learned to look back at the phrase.
Only pre-training does this; the architecture does not change.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

# (layer, query head) that learn each step; the layers of a step follow each other.
PHRASE_TO_THING = ((0, 0), (1, 0))
REPLY_TO_PHRASE = ((1, 4), (2, 4))
REPLY_TO_THING = ((2, 0), (3, 0), (3, 3))
# "image 2" looks at the second picture. Not in layer 0: only there can the tokens of a
# picture learn which one it is.
NUMBER_TO_IMAGE = ((1, 3), (2, 3))
NUMBER = -2  # instead of a phrase: the token says which image

Heads = tuple[tuple[int, int], ...]


class Looks(NamedTuple):
    """Where N tokens of a batch of length T should look.

    Attributes:
        row: (N,) row of the token.
        at: (N,) its position.
        thing: (N, T) bool, the image tokens of what it is about.
        phrase: (N,) position of the phrase's last token, -1 for none, or NUMBER.
        asking: (N,) bool, whether the token is that last token, not one of the reply.
    """

    row: Tensor
    at: Tensor
    thing: Tensor
    phrase: Tensor
    asking: Tensor

    def select(self, keep: Tensor) -> "Looks":
        """Return the looks selected by the boolean `keep` (N,)."""
        return Looks(*(part[keep] for part in self))


class AttentionGuide:
    """Keep what the layers attend from and compute the guiding loss.

    Args:
        layers: the decoder layers; hooks on their attention keep its input.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.seen: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        self.attention = dict(enumerate(layer.self_attn for layer in layers))
        for number, attention in self.attention.items():
            attention.register_forward_pre_hook(self._keep(number), with_kwargs=True)

    def _keep(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = kwargs["hidden_states"] if not args else args[0]
            self.seen[number] = (hidden, kwargs["position_embeddings"])

        return hook

    def loss(self, looks: Looks) -> dict[str, Tensor]:
        """Return, for each step, the mean of -log(attention that is where it should).

        Args:
            looks: of the batch that the model has just processed.
        """
        number = looks.phrase == NUMBER
        asking = looks.select(looks.asking)
        replying = looks.select(~looks.asking & ~number)
        naming = replying.select(replying.phrase >= 0)
        length = looks.thing.shape[1]
        phrase = torch.nn.functional.one_hot(naming.phrase, length).bool()
        counted = looks.select(number)
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

    def _step(self, heads: Heads, looks: Looks, wanted: Tensor) -> Tensor:
        if not len(looks.at):
            return torch.zeros(())
        return torch.stack(
            [self._head(layer, head, looks, wanted) for layer, head in heads]
        ).mean()

    def _head(self, layer: int, head: int, looks: Looks, wanted: Tensor) -> Tensor:
        attention = self.attention[layer]
        hidden, (cos, sin) = self.seen[layer]  # (B, T, H)
        size = attention.head_dim
        q = attention.q_proj(hidden).unflatten(-1, (-1, size))[:, :, head]
        k = attention.k_proj(hidden).unflatten(-1, (-1, size))
        k = k[:, :, head // attention.num_key_value_groups]  # (B, T, head_dim)
        q, k = apply_rotary_pos_emb(q[:, None], k[:, None], cos, sin)
        # Row by row, because few positions of a row are needed; looks are in row order.
        counts = torch.bincount(looks.row, minlength=len(hidden)).tolist()
        asked = zip(q[:, 0], k[:, 0], looks.at.split(counts), strict=True)
        scores = torch.cat([queries[at] @ keys.T for queries, keys, at in asked])
        scores = scores * attention.scaling  # (N, T)
        future = torch.arange(scores.shape[1]) > looks.at[:, None]
        scores = scores.masked_fill(future, float("-inf"))
        inside = scores.masked_fill(~wanted, float("-inf")).logsumexp(-1)
        return (scores.logsumexp(-1) - inside).mean()

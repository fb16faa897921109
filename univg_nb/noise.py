"""Random numbers of sampling: a stream of its own for every reply.

torch.multinomial draws all rows of a batch from one stream, and a reply would then
depend on which others are sampled beside it: on the batch size, and on how many
processes share the work.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor


def noise_seed(*numbers: int) -> int:
    """The seed of one reply from what names it, as (seed, item, number of the reply);
    all at least 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class SeededNoise(LogitsProcessor):
    """Turns greedy decoding into sampling, with a random stream of its own per row.

    argmax(logits / temperature + Gumbel noise) is a sample of softmax(logits /
    temperature).
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.seeds = seeds
        self.temperature = temperature
        self.streams: list[torch.Generator] = []

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch only."""
        self.streams = [self.streams[row] for row in rows]

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor
    ) -> torch.FloatTensor:
        """scores (B, V) -> noisy scores (B, V); input_ids (B, T) is not used."""
        if not self.streams:  # only here is the device known
            self.streams = [
                torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds
            ]
        waits = torch.stack(
            [
                torch.empty_like(row).exponential_(generator=stream)
                for row, stream in zip(scores, self.streams, strict=True)
            ]
        )
        return scores / self.temperature - waits.log()  # -log(Exp(1)) is Gumbel

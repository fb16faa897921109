"""Is a merged model still the model that was trained?

Folding a LoRA adapter into the weights it was trained on changes rounding only. After
QLoRA it is folded into the unrounded base, a base that it never saw: then the
difference is that of the four bits, and is worth a number.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from univg_nb import models
from univg_nb.collator import IGNORE, VisionCollator, tokenize
from univg_nb.replies import reply
from univg_nb.samples import GroundingSample

AT_ONCE = 8  # samples in one batch


def merge_check(
    model_cfg: Mapping[str, Any],
    adapter: str | Path,
    samples: Sequence[GroundingSample],
    max_new_tokens: int,
    quantize: Literal["nf4"] | None = None,
) -> dict[str, float | int]:
    """The model as trained (on an NF4 base with `quantize`) against the merged one.

    Returns samples, same_replies (greedy replies that are equal, of `samples`), and
    over all tokens of the samples' own replies max_logit_difference,
    mean_logit_difference and, to compare them with, logit_std; reloaded_difference:
    the largest one between the merged model and itself, saved and loaded by
    transformers alone.
    """
    trained, processor = models.load(model_cfg, adapter, quantize=quantize)
    merged, _ = models.load(model_cfg, adapter, merge=True)
    with TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        plain = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=merged.dtype,
            attn_implementation=merged.config._attn_implementation,
        )
    plain.to(merged.device).eval()
    largest = reloaded = 0.0
    sums, count, same = torch.zeros(3, dtype=torch.float64), 0, 0
    for start in range(0, len(samples), AT_ONCE):
        part = samples[start : start + AT_ONCE]
        expected, made, again = (
            logits(model, processor, part) for model in (trained, merged, plain)
        )  # (tokens, V) each
        gap = (made - expected).abs()
        largest = max(largest, gap.max().item())
        parts = (gap, expected, expected.square())
        sums += torch.stack([part.double().sum().cpu() for part in parts])
        count += gap.numel()
        reloaded = max(reloaded, (again - made).abs().max().item())
        answers = [
            reply(model, processor, part, max_new_tokens=max_new_tokens)
            for model in (trained, merged)
        ]
        same += sum(a.response == b.response for a, b in zip(*answers, strict=True))
    gap, mean, square = (sums / count).tolist()
    return {
        "samples": len(samples),
        "same_replies": same,
        "max_logit_difference": largest,
        "mean_logit_difference": gap,
        "logit_std": (square - mean**2) ** 0.5,
        "reloaded_difference": reloaded,
    }


@torch.no_grad()
def logits(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[GroundingSample],
) -> Tensor:
    """Logits (tokens, V) from which the tokens of the samples' own replies come."""
    batch = VisionCollator(processor)(list(tokenize(samples, processor)))
    carried = batch.pop("labels")[:, 1:] != IGNORE  # position t predicts token t + 1
    batch = {k: v.to(model.device) for k, v in batch.items() if k != "sample_index"}
    return model(**batch).logits[:, :-1][carried.to(model.device)].float()

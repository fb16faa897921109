"""Adapters merged into the weights: a folder that transformers and vLLM load.

    python -m univg_nb merge --model M --adapter A --scale full --out FOLDER
    vllm serve FOLDER
    python -m univg_nb generate --server http://127.0.0.1:8000/v1 --model FOLDER ...

An adapter of stage 2 contains that of stage 1, and both together are refused. A fully
trained model is given as `--adapter` too. Merging a LoRA adapter into the weights that
it was trained on changes rounding only. After QLoRA it is merged into the weights
before quantization, which it was not trained on; `merge_check` measures how much that
changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from univg_nb import models
from univg_nb.config import load_scale, make_parser, output_folder
from univg_nb.data.conventions import get_convention
from univg_nb.data.sample import GroundingSample
from univg_nb.fast.prompts import split_rows
from univg_nb.fast.sampling import get_vision_token_ids, sample_replies
from univg_nb.train.collator import IGNORE, VisionCollator, tokenize

BATCH_SIZE = 8


def merge_check(
    model_section: Mapping[str, Any],
    adapter: str | Path,
    samples: Sequence[GroundingSample],
    max_new_tokens: int,
    quantize: models.Quantization | None = None,
) -> dict[str, float | int]:
    """Compare the model as it was trained with the merged one, saved and loaded again.

    Args:
        model_section: the `model` section of a scale.
        adapter: folder of the adapter.
        samples: what both models are asked, with the replies to score.
        max_new_tokens: of a greedy reply.
        quantize: "nf4" if the adapter was trained on 4-bit weights.

    Returns:
        samples, same_replies (how many greedy replies are equal), and over all tokens
        of the samples' own replies max_logit_difference, mean_logit_difference and, to
        compare them with, logit_std.
    """
    trained, processor = models.load_for_training(model_section, adapter, quantize)
    trained.to(models.get_device()).eval()
    with TemporaryDirectory() as folder:
        path = write_merged(model_section, [adapter], Path(folder) / "merged")
        section = {**model_section, "name_or_path": str(path)}
        merged, _ = models.load_for_inference(section)
    largest = 0.0
    sums, count, same = torch.zeros(3, dtype=torch.float64), 0, 0
    boxes = get_convention(merged.config, processor)
    dataset = tokenize(samples, processor, convention=boxes)
    collate = VisionCollator(processor)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=processor.tokenizer.eos_token_id,
        suppress_tokens=get_vision_token_ids(processor),
    )
    for start in range(0, len(dataset), BATCH_SIZE):
        rows = list(dataset.skip(start).take(BATCH_SIZE))
        batch = {key: v.to(merged.device) for key, v in collate(rows).items()}
        expected = _compute_logits(trained, batch)  # (tokens, V)
        gap = (_compute_logits(merged, batch) - expected).abs()
        largest = max(largest, gap.max().item())
        parts = (gap, expected, expected.square())
        sums += torch.stack([part.double().sum().cpu() for part in parts])
        count += gap.numel()
        is_prompt = batch["attention_mask"].bool() & (batch["labels"] == IGNORE)
        prompts = split_rows(
            **(batch | {"attention_mask": is_prompt}),
            groups=range(len(rows)),
            num_images=[len(row["images"]) for row in rows],
        )
        replies = [
            sample_replies(model, [prompt for prompt, _ in prompts], 1, config)
            for model in (trained, merged)
        ]
        same += sum(a == b for a, b in zip(*replies, strict=True))
    mean_gap, mean, square = (sums / count).tolist()
    return {
        "samples": len(samples),
        "same_replies": same,
        "max_logit_difference": largest,
        "mean_logit_difference": mean_gap,
        "logit_std": (square - mean**2) ** 0.5,
    }


@torch.no_grad()
def _compute_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits (tokens, V) that predict the tokens of the samples' replies."""
    of_reply = batch["labels"][:, 1:] != IGNORE  # position t predicts token t + 1
    left_out = ("labels", "sample_index")
    inputs = {key: value for key, value in batch.items() if key not in left_out}
    return model(**inputs).logits[:, :-1][of_reply].float()


def write_merged(
    model_section: Mapping[str, Any], adapters: Sequence[str | Path], out: str | Path
) -> Path:
    """Save a model with adapters merged into its weights, whole or not at all.

    The processor is saved with the base model's own pixel limits, not the scale's:
    images are sent to a server at the right size, and it must not shrink them again.

    Args:
        model_section: the `model` section of a scale.
        adapters: as in `models.load_for_inference`.
        out: folder to write; returned.

    Raises:
        ValueError: if `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"--out {out} exists; remove it or name another folder")
    # Merging computes no attention, so flash-attn and its GPU are not needed.
    section = {**model_section, "attn_implementation": "sdpa"}
    model, _ = models.load_for_inference(section, adapters)
    processor = models.load_processor({"name_or_path": section["name_or_path"]})
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    return unfinished.replace(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge adapters from the command line."""
    parser = make_parser(
        "merge",
        "Write a model with adapters merged into its weights.",
        "--model tiny --scale tiny --adapter runs/tiny/grpo_exp/adapter --out merged",
    )
    add = parser.add_argument
    add("--model", required=True, help='"tiny", a local folder or a hub name')
    add("--adapter", nargs="+", required=True, help="each on top of the last")
    add("--out", required=True, type=output_folder, help="a new folder")
    add("--scale", required=True, help="name or .yaml file, for the dtype")
    options = parser.parse_args(arguments)
    section = {**load_scale(options.scale)["model"], "name_or_path": options.model}
    print(write_merged(section, options.adapter, options.out))

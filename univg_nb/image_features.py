"""What the frozen vision tower makes of a training set's images, computed once a run.

Stage 1's trainings (with chains, without, on four-bit weights) look at the same
images; the first writes the features, the others read them.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from univg_nb import models, runs
from univg_nb.images import open_image

FEATURE_BYTES = 2**30  # vision features up to this size are kept in memory
IMAGES_AT_ONCE = 32  # through processor and vision tower when features are computed

Encoded = tuple[torch.Tensor, torch.Tensor]  # (patches or features, grid (1, 3))


def pixels(processor: ProcessorMixin, paths: Sequence[str]) -> Encoded:
    """Preprocess images: pixel_values (patches, values), image_grid_thw (images, 3)."""
    pictures = [open_image(path) for path in paths]
    out = processor.image_processor(images=pictures, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


def vision_features(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    paths: Iterable[str],
    keep: Path | None = None,
    progress: bool = True,
) -> dict[str, Encoded]:
    """The vision tower's output for each distinct path: (tokens, hidden), grid (1, 3).

    A frozen tower gives the same output every time, so training needs it only once,
    and so do further trainings on these images: with ``keep``, a folder, it is written
    there, under a name that changes with the tower, the processor and the images.
    """
    distinct = list(dict.fromkeys(paths))
    file = None if keep is None else keep / _features_name(model, processor, distinct)
    if file is not None and file.is_file():
        return _read_features(file, distinct)
    encoded = _through_tower(model, processor, distinct, progress)
    if file is not None:
        _write_features(file, encoded)
    return encoded


def _features_name(
    model: PreTrainedModel, processor: ProcessorMixin, paths: Sequence[str]
) -> str:
    """Name of the file for features of these images, as they lie on disk now."""
    towers = models.weights_hash(model.model.visual)
    files = [(path, *_stamp(path)) for path in paths]
    made = runs.config_hash([towers, processor.image_processor.to_dict(), files])
    return f"{made}.safetensors"


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of change, by which a rewritten image is told."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _write_features(file: Path, encoded: dict[str, Encoded]) -> None:
    """One tensor of all features and one of the grids, whole or not at all."""
    features, grids = zip(*encoded.values(), strict=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    save_file({"features": torch.cat(features), "grids": torch.cat(grids)}, temporary)
    os.replace(temporary, file)


def _read_features(file: Path, paths: Sequence[str]) -> dict[str, Encoded]:
    """What `_write_features` wrote for these paths."""
    found = load_file(file)
    grids = found["grids"]
    merged = found["features"].shape[0] * grids.prod(-1) // grids.prod(-1).sum()
    parts = found["features"].split(merged.tolist())
    return {
        path: (feature, grid[None])
        for path, feature, grid in zip(paths, parts, grids, strict=True)
    }


def _through_tower(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    distinct: Sequence[str],
    progress: bool,
) -> dict[str, Encoded]:
    encoded: dict[str, Encoded] = {}
    was_training = model.training
    model.eval()
    starts = range(0, len(distinct), IMAGES_AT_ONCE)
    for start in tqdm(starts, desc="images", disable=not progress, leave=False):
        chunk = distinct[start : start + IMAGES_AT_ONCE]
        values, grids = pixels(processor, chunk)
        with torch.no_grad():
            features = model.get_image_features(
                values.to(model.device), grids.to(model.device)
            ).pooler_output
        for path, feature, grid in zip(chunk, features, grids, strict=True):
            encoded[path] = (feature.cpu().clone(), grid[None])
    model.train(was_training)
    return encoded


def features_fit(dataset: Dataset, hidden: int) -> bool:
    """Whether the features of all images of a dataset stay within FEATURE_BYTES."""
    tokens = {
        path: count
        for row in dataset
        for path, count in zip(row["images"], row["image_tokens"], strict=True)
    }
    return sum(tokens.values()) * hidden * 4 <= FEATURE_BYTES

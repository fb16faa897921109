"""What a frozen vision tower makes of an image, kept for every pass that needs it.

A GRPO update looks at each image in the rollout, the reference and the policy pass, and
again with the next update on the same question. A frozen tower gives the same features
every time.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from univg_nb import io, models
from univg_nb.data.images import open_image

# DOC of image_features:
# """What the frozen vision tower makes of a training set's images, computed once a run.

# Stage 1's trainings (with chains, without, on four-bit weights) look at the same
# images; the first writes the features, the others read them.
# """


def tower_trains(backbone: Module) -> bool:
    """Whether any weight of the vision tower, adapters on it included, is trained."""
    return any(p.requires_grad for p in backbone.visual.parameters())


def image_key(pixels: Tensor, grid: Tensor) -> bytes:
    """Identity of one image as the processor made it.

    pixels: (patches, patch_dim); grid: (3,). Resizing, normalisation and patch size all
    show in them, so another processor setting is another key.
    """
    what = repr((pixels.dtype, tuple(pixels.shape), grid.tolist()))
    digest = hashlib.blake2b(what.encode(), digest_size=16)
    digest.update(pixels.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.digest()


class VisionCache:
    """Features of the images seen last, at most `limit_bytes` of them.

    Each image goes through the tower by itself, so that its features are the same bits
    whatever stood beside it and whatever was remembered: a resumed training repeats an
    uninterrupted one. `computed` counts images that went through, `reused` the others.
    """

    def __init__(self, limit_bytes: int = 2**30) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.computed = 0
        self.reused = 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def features(
        self, backbone: Module, pixels: Tensor, grid: Tensor
    ) -> BaseModelOutputWithPooling:
        """What `backbone.get_image_features` returns for the images, in their order.

        backbone: a Qwen2VLModel; pixels: (patches of all images, patch_dim); grid:
        (images, 3). Raises ValueError where the tower trains: its features change with
        every update, and remembered ones would cut it off from its gradient.
        """
        if tower_trains(backbone):
            raise ValueError(
                "the vision tower trains, so its features cannot be remembered; set "
                "grpo.freeze_vision: true, or train without a VisionCache"
            )
        parts = pixels.split(grid.prod(-1).tolist())
        found = [self._one(backbone, *image) for image in zip(parts, grid, strict=True)]
        return BaseModelOutputWithPooling(pooler_output=tuple(found))

    @torch.no_grad()
    def _one(self, backbone: Module, pixels: Tensor, grid: Tensor) -> Tensor:
        """Features of one image, (tokens, hidden size)."""
        key = image_key(pixels, grid)
        if key in self._kept:
            self.reused += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.computed += 1
        output = backbone.get_image_features(pixels, grid[None], return_dict=True)
        value = output.pooler_output[0].clone()
        self._kept[key] = value
        self.used_bytes += value.nbytes
        while self.used_bytes > self.limit_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.used_bytes -= oldest.nbytes
        return value


def vision_inputs(
    backbone: Module,
    images: Sequence[tuple[Tensor, Tensor]],
    cache: VisionCache | None = None,
) -> dict[str, object]:
    """Model inputs for the images of several prompts in a row.

    images: (pixel_values, grid) of each prompt that has any. With a cache these are
    finished features; without, pixels for the model to encode.
    """
    if not images:
        return {}
    pixels = torch.cat([part for part, _ in images])
    grid = torch.cat([part for _, part in images])
    if cache is not None:
        return {"mm_encoder_outputs": {"image": cache.features(backbone, pixels, grid)}}
    return {"pixel_values": pixels, "image_grid_thw": grid}


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
    towers = models.hash_weights(model.model.visual)
    files = [(path, *_stamp(path)) for path in paths]
    made = io.config_hash([towers, processor.image_processor.to_dict(), files])
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

"""Features of images from a frozen vision tower, computed once and kept.

A frozen tower gives the same features for an image every time. A GRPO update looks at
each image in the rollout, the reference pass and the policy pass, and again in the next
update on the same question: `VisionCache` keeps the features of the images seen last.
The trainings of stage 1 all look at the same images: `vision_features` computes them
once and writes them to a file.
"""

from __future__ import annotations

import hashlib
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

FEATURE_BYTES = 2**30  # features of a data set up to this size are kept in memory
IMAGES_AT_ONCE = 32  # through processor and vision tower

EncodedImage = tuple[Tensor, Tensor]  # (patches or features, grid (1, 3))


def tower_trains(backbone: Module) -> bool:
    """Return whether any weight of the vision tower, or of adapters on it, trains."""
    return any(p.requires_grad for p in backbone.visual.parameters())


def _hash_image(pixels: Tensor, grid: Tensor) -> bytes:
    """Identify an image by what the processor made of it: other settings, other key."""
    what = repr((pixels.dtype, tuple(pixels.shape), grid.tolist()))
    digest = hashlib.blake2b(what.encode(), digest_size=16)
    digest.update(pixels.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.digest()


class VisionCache:
    """Features of the images seen last, at most `limit_bytes` of them.

    Each image goes through the tower by itself: its features are the same bits whatever
    stood beside it and whatever was kept, so a resumed training repeats an
    uninterrupted one. `computed` counts images that went through, `reused` the others.
    """

    def __init__(self, limit_bytes: int = 2**30) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.computed = 0
        self.reused = 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def get_features(
        self, backbone: Module, pixels: Tensor, grid: Tensor
    ) -> BaseModelOutputWithPooling:
        """Return what `backbone.get_image_features` returns, computed once.

        pixels: (patches of all images, patch_dim); grid: (images, 3). ValueError if the
        tower trains: its features change with every update, and kept ones would cut it
        off from its gradient.
        """
        if tower_trains(backbone):
            raise ValueError(
                "the vision tower trains, so its features cannot be kept; set "
                "grpo.freeze_vision: true, or train without a VisionCache"
            )
        parts = pixels.split(grid.prod(-1).tolist())
        found = [self._get(backbone, *image) for image in zip(parts, grid, strict=True)]
        return BaseModelOutputWithPooling(pooler_output=tuple(found))

    @torch.no_grad()
    def _get(self, backbone: Module, pixels: Tensor, grid: Tensor) -> Tensor:
        """Return the features of one image, (tokens, hidden size)."""
        key = _hash_image(pixels, grid)
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


def make_vision_inputs(
    backbone: Module,
    images: Sequence[tuple[Tensor, Tensor]],
    cache: VisionCache | None = None,
) -> dict[str, object]:
    """Return model inputs for images (pixel_values, grid): features with a cache."""
    if not images:
        return {}
    pixels, grid = (torch.cat(parts) for parts in zip(*images, strict=True))
    if cache is None:
        return {"pixel_values": pixels, "image_grid_thw": grid}
    return {"mm_encoder_outputs": {"image": cache.get_features(backbone, pixels, grid)}}


def preprocess_images(
    processor: ProcessorMixin, paths: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Open and preprocess images; ValueError for one that cannot be read.

    Returns:
        pixel_values (patches, patch_dim) and image_grid_thw (images, 3).
    """
    pictures = [open_image(path) for path in paths]
    out = processor.image_processor(images=pictures, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


def vision_features(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    paths: Iterable[str],
    keep: Path | None = None,
    progress: bool = True,
) -> dict[str, EncodedImage]:
    """Compute what the vision tower makes of each distinct image.

    Args:
        model: the model; its tower is frozen.
        processor: processor of the model.
        paths: the images.
        keep: folder where the features are written, and read the next time, under a
            name that changes with the tower, the processor and the images.
        progress: whether to show a progress bar.

    Returns:
        {path: (features (tokens, hidden size), grid (1, 3))}.
    """
    distinct = list(dict.fromkeys(paths))
    if keep is None:
        return _compute_features(model, processor, distinct, progress)
    stats = [(path, Path(path).stat()) for path in distinct]
    name = io.config_hash(
        [
            models.hash_weights(model.model.visual),
            processor.image_processor.to_dict(),
            [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
        ]
    )
    file = keep / f"{name}.safetensors"
    if not file.is_file():
        encoded = _compute_features(model, processor, distinct, progress)
        features, grids = zip(*encoded.values(), strict=True)
        tensors = {"features": torch.cat(features), "grids": torch.cat(grids)}
        with io.open_atomically(file, "wb") as handle:
            save_file(tensors, handle.name)
        return encoded
    tensors = load_file(file)
    patches = tensors["grids"].prod(-1)  # a fixed number of patches makes a token
    tokens = len(tensors["features"]) * patches // patches.sum()
    parts = tensors["features"].split(tokens.tolist())
    pairs = zip(parts, tensors["grids"].split(1), strict=True)
    return dict(zip(distinct, pairs, strict=True))


def _compute_features(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    paths: Sequence[str],
    progress: bool,
) -> dict[str, EncodedImage]:
    encoded: dict[str, EncodedImage] = {}
    training = model.training
    model.eval()
    starts = range(0, len(paths), IMAGES_AT_ONCE)
    for start in tqdm(starts, desc="images", disable=not progress, leave=False):
        chunk = paths[start : start + IMAGES_AT_ONCE]
        pixels, grids = preprocess_images(processor, chunk)
        with torch.no_grad():
            features = model.get_image_features(
                pixels.to(model.device), grids.to(model.device)
            ).pooler_output
        for path, feature, grid in zip(chunk, features, grids, strict=True):
            encoded[path] = (feature.cpu().clone(), grid[None])
    model.train(training)
    return encoded


def features_fit(dataset: Dataset, hidden: int) -> bool:
    """Return whether the features of a data set's images fit in FEATURE_BYTES.

    Args:
        dataset: rows with `images` (paths) and `image_tokens` (of each image).
        hidden: hidden size of the language model.
    """
    tokens: dict[str, int] = {}
    for row in dataset:
        tokens |= zip(row["images"], row["image_tokens"], strict=True)
    return sum(tokens.values()) * hidden * 4 <= FEATURE_BYTES

"""Features of images from a frozen vision tower, computed once and kept.

A frozen tower gives the same features for an image every time. A GRPO update looks at
each image in the rollout, the reference pass and the policy pass, and again in the next
update on the same question: `VisionCache` keeps the features of the images seen last.
The trainings of stage 1 all look at the same images: `vision_features` computes them
once and writes them to a file, which is mapped into memory.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from univg_nb import io, models
from univg_nb.data.images import open_image
from univg_nb.families import get_side

FEATURE_BYTES = 2**33  # features of a data set up to this size are kept on disk
IMAGES_AT_ONCE = 32  # through processor and vision tower

EncodedImage = tuple[Tensor, Tensor]  # (patches or features, grid (1, 3))


def tower_trains(backbone: Module) -> bool:
    """Return whether any weight of the vision tower, or of adapters on it, trains."""
    return any(p.requires_grad for p in backbone.visual.parameters())


class VisionCache:
    """Features of the images seen last, at most `limit_bytes` of them.

    Each image goes through the tower by itself: its features are the same bits whatever
    stood beside it and whatever was kept, so a resumed training repeats an
    uninterrupted one. `computed` counts the images that went through. The tower must
    not train: its features would change, and kept ones give it no gradient.
    """

    def __init__(self, backbone: Module, limit_bytes: int = 2**30) -> None:
        assert not tower_trains(backbone), "the vision tower trains: nothing to keep"
        self.backbone = backbone
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.computed = 0
        self._kept: dict[bytes, Tensor] = {}  # the one used last comes last

    @torch.no_grad()
    def get_features(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """Return the features of an image, as `encode_images`, computed once.

        pixels: (patches, patch_dim); grid: (1, 3).
        """
        # What the processor made of the image: with other settings another key.
        what = repr((pixels.dtype, tuple(pixels.shape), grid.tolist()))
        digest = hashlib.blake2b(what.encode(), digest_size=16)
        digest.update(pixels.cpu().contiguous().view(torch.uint8).numpy())
        key = digest.digest()
        features = self._kept.pop(key, None)
        if features is None:
            self.computed += 1
            (features,) = encode_images(self.backbone, pixels, grid)
            self.used_bytes += features.nbytes
        self._kept[key] = features
        while self.used_bytes > self.limit_bytes:
            oldest = next(iter(self._kept))
            self.used_bytes -= self._kept.pop(oldest).nbytes
        return features


class GivenFeatures(VisionCache):
    """The same where images come as features already, as of `vision_features`."""

    def get_features(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """Return `pixels`, which are features."""
        return pixels


def encode_images(backbone: Module, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """Compute the features of each image, (tokens, `get_feature_width`).

    The first columns, as many as the language model's hidden size, stand in the place
    of the image tokens. Qwen3-VL has as many again for each of its first layers, after
    which they are added to the states of these tokens (deepstack).
    """
    output = backbone.get_image_features(pixels, grids, return_dict=True)
    levels = [output.pooler_output, *getattr(output, "deepstack_features", ())]
    return [torch.cat(parts, dim=1) for parts in zip(*levels, strict=True)]


def get_feature_width(config: PreTrainedConfig) -> int:
    """Return the columns of an image's features, those of deepstack included."""
    deepstack = getattr(config.vision_config, "deepstack_visual_indexes", ())
    return config.get_text_config().hidden_size * (1 + len(deepstack))


def make_feature_inputs(
    features: Sequence[Tensor], config: PreTrainedConfig
) -> dict[str, Any]:
    """Return features of `encode_images` as the model input that replaces pixels."""
    hidden = config.get_text_config().hidden_size
    levels = zip(*(one.split(hidden, dim=1) for one in features), strict=True)
    pooled, *deepstack = levels
    output = SimpleNamespace(pooler_output=pooled, deepstack_features=deepstack)
    return {"mm_encoder_outputs": {"image": output}}


def make_vision_inputs(
    images: Sequence[EncodedImage], cache: VisionCache | None = None
) -> dict[str, object]:
    """Return model inputs for images (pixel_values, grid): features with a cache."""
    if not images:
        return {}
    if cache is None:
        pixels, grids = map(torch.cat, zip(*images, strict=True))
        return {"pixel_values": pixels, "image_grid_thw": grids}
    features = [cache.get_features(*image) for image in images]
    return make_feature_inputs(features, cache.backbone.config)


def preprocess_images(
    processor: ProcessorMixin, paths: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return pixel_values (patches, patch_dim) and image_grid_thw (images, 3).

    ValueError for an image that cannot be read.
    """
    side = get_side(processor)
    pictures = [open_image(path, side=side) for path in paths]
    out = processor.image_processor(images=pictures, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


class KeptFeatures(Mapping[str, EncodedImage]):
    """Features of images on disk, by path; memory holds what is looked at."""

    def __init__(self, file: Path, paths: Sequence[str], about: dict[str, Any]) -> None:
        shape, self._grids = about["shape"], about["grids"]
        size, dtype = shape[0] * shape[1], about["dtype"]
        values = torch.from_file(str(file), shared=False, size=size, dtype=dtype)
        self._features = values.view(shape)
        self._ends = about["tokens"].cumsum(0)
        self._numbers = {path: number for number, path in enumerate(paths)}

    def __getitem__(self, path: str) -> EncodedImage:
        number = self._numbers[path]
        start = int(self._ends[number - 1]) if number else 0
        features = self._features[start : int(self._ends[number])]
        return features, self._grids[number : number + 1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


@torch.no_grad()
def vision_features(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    paths: Iterable[str],
    keep: Path,
    progress: bool = True,
) -> KeptFeatures:
    """Compute what the frozen vision tower makes of each distinct image.

    The features are written to the folder `keep`, and read the next time, under a name
    that changes with the tower, the processor and the images.

    Returns:
        {path: (features as of `encode_images`, grid (1, 3))}, mapped from the file.
    """
    distinct = list(dict.fromkeys(paths))
    stats = [(path, Path(path).stat()) for path in distinct]
    name = io.config_hash(
        [
            models.hash_weights(model.model.visual),
            processor.image_processor.to_dict(),
            [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
        ]
    )
    file, about_file = keep / f"{name}.bin", keep / f"{name}.pt"
    if not about_file.is_file():
        # Filled in place: a small tensor kept per batch would sit between the large
        # buffers of the batches, whose memory could then not be used again.
        tokens, grids = [], torch.empty((len(distinct), 3), dtype=torch.int64)
        starts = range(0, len(distinct), IMAGES_AT_ONCE)
        with io.open_atomically(file, "wb") as handle:
            for start in tqdm(starts, desc="images", disable=not progress, leave=False):
                chunk = distinct[start : start + IMAGES_AT_ONCE]
                pixels, grid = preprocess_images(processor, chunk)
                found = encode_images(
                    model.model, pixels.to(model.device), grid.to(model.device)
                )
                tokens += [len(one) for one in found]
                grids[start : start + len(chunk)] = grid
                made = torch.cat(found).cpu()
                handle.write(made.view(torch.uint8).numpy().data)
        about = {
            "tokens": torch.tensor(tokens),
            "grids": grids,
            "shape": (sum(tokens), made.shape[1]),
            "dtype": made.dtype,
        }
        with io.open_atomically(about_file, "wb") as handle:
            torch.save(about, handle)  # last: with it the features are whole
    return KeptFeatures(file, distinct, torch.load(about_file))


def features_fit(dataset: Iterable[Mapping[str, Any]], width: int) -> bool:
    """Return whether the features of a data set's images fit in FEATURE_BYTES.

    Its rows have `images` (paths) and `image_tokens` (of each); `width` is that of
    `get_feature_width`.
    """
    tokens: dict[str, int] = {}
    for row in dataset:
        tokens |= zip(row["images"], row["image_tokens"], strict=True)
    return sum(tokens.values()) * width * 4 <= FEATURE_BYTES

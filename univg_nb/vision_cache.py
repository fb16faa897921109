"""What a frozen vision tower makes of an image, kept for every pass that needs it.

A GRPO update looks at each image in the rollout, the reference and the policy pass, and
again with the next update on the same question. A frozen tower gives the same features
every time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module
from transformers.modeling_outputs import BaseModelOutputWithPooling


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

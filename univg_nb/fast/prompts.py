"""Prompts of GRPO groups: each encoded once, with the positions that replies continue.

The G replies of a group share a long prompt with images. In the rollout (`sampling`)
and in the training passes (`packed_rows`) each prompt goes through the model once: a
reply sees the prompt and itself (an attention mask) and takes the positions that follow
the prompt (M-RoPE), exactly as if it stood alone. This works for models with the
`get_rope_index` of Qwen2-VL.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence

from univg_nb.data.images import open_image
from univg_nb.fast.vision_features import EncodedImage, make_vision_inputs


@dataclass
class Prompt:
    """One prompt and its images, without padding.

    Attributes:
        ids: (P,) token ids.
        token_types: (P,) 0 for text, 1 for an image.
        images: (pixel_values (patches, patch_dim), grid (1, 3)) of each image; the grid
            counts its patches in time, height and width.
    """

    ids: Tensor
    token_types: Tensor
    images: list[EncodedImage] = field(default_factory=list)


def split_rows(
    input_ids: Sequence[Tensor] | Tensor,
    attention_mask: Sequence[Tensor] | Tensor,
    groups: Sequence[int],
    *,
    mm_token_type_ids: Sequence[Tensor] | Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    num_images: Sequence[int] | None = None,
    **_: Any,
) -> list[tuple[Prompt, list[int]]]:
    """Take the prompt of every group out of rows, padded or not.

    Args:
        input_ids: (B, P) prompts.
        attention_mask: (B, P) 1 for a token, 0 for padding.
        groups: the group of every row; the rows of a group have the same prompt.
        mm_token_type_ids: (B, P or more) 0 for text, 1 for an image; None is all text.
        pixel_values: (patches, patch_dim) of the images of all rows.
        image_grid_thw: (images, 3) of the images of all rows.
        num_images: images of every row; None is no images.

    Returns:
        (prompt, numbers of its rows) for every group, in the order of the rows.
    """
    images: list[EncodedImage] = []
    if pixel_values is not None and image_grid_thw is not None:
        parts = pixel_values.split(image_grid_thw.prod(-1).tolist())
        images = list(zip(parts, image_grid_thw.split(1), strict=True))
    ends = [0, *accumulate(num_images or [0] * len(groups))]
    found: dict[int, tuple[Prompt, list[int]]] = {}
    for row, group in enumerate(groups):
        if group not in found:
            ids, real = input_ids[row], attention_mask[row].bool()
            types = torch.zeros_like(ids)
            if mm_token_type_ids is not None:
                types = mm_token_type_ids[row][: len(ids)]
            own = images[ends[row] : ends[row + 1]]
            found[group] = (Prompt(ids[real], types[real], own), [])
        found[group][1].append(row)
    return list(found.values())


def compute_positions(backbone: Module, prompt: Prompt) -> Tensor:
    """Compute M-RoPE positions of a prompt, (3, P); replies continue at maximum + 1."""
    if not prompt.images:
        return torch.arange(len(prompt.ids), device=prompt.ids.device).expand(3, -1)
    positions, _ = backbone.get_rope_index(
        prompt.ids[None],
        mm_token_type_ids=prompt.token_types[None],
        image_grid_thw=torch.cat([grid for _, grid in prompt.images]),
    )
    return positions[:, 0]  # (3, 1, P) -> (3, P)


def open_images(conversations: Sequence[Any], side: int) -> None:
    """Open the images that structured messages name by a path, in place.

    `side` is that of a token in pixels.
    """
    for messages in conversations:
        for message in messages if isinstance(messages, list) else ():
            for part in message["content"]:
                if isinstance(part, dict) and isinstance(part.get("image"), str):
                    part["image"] = open_image(part["image"], side=side)


def make_prompts(
    ids: Sequence[Sequence[int]],
    images: Sequence[Any] | None,
    fields: Mapping[str, Any],
    device: torch.device,
) -> list[Prompt]:
    """Make prompts of what TRL's `_tokenize_prompts` returns."""
    rows = [torch.tensor(row, device=device) for row in ids]
    names = [name for name in ("pixel_values", "image_grid_thw") if name in fields]
    given = {name: torch.as_tensor(fields[name]).to(device) for name in names}
    types = fields.get("mm_token_type_ids")
    found = split_rows(
        rows,
        [torch.ones_like(row) for row in rows],
        range(len(rows)),
        mm_token_type_ids=types and [torch.tensor(row, device=device) for row in types],
        num_images=images and [len(some or ()) for some in images],
        **given,
    )
    return [prompt for prompt, _ in found]


def make_fields(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return TRL's multimodal fields of rows: pixels flat, a list for each row else."""
    images = [image for prompt in prompts for image in prompt.images]
    types = [prompt.token_types.tolist() for prompt in prompts]
    return {**make_vision_inputs(images), "mm_token_type_ids": types}


class ReusedEncoding:
    """A processor that renders nothing, and whose call returns fields made before."""

    def __init__(self, processor: Any, fields: Mapping[str, Any]) -> None:
        self._processor, self._fields = processor, fields

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        """Return no text, as none is used."""
        return ""

    def __call__(self, **_: Any) -> dict[str, Any]:
        """Return the fields as model inputs, padded on the left."""
        types = [torch.tensor(row) for row in self._fields["mm_token_type_ids"]]
        padded = pad_sequence(types, batch_first=True, padding_side="left")
        return {**self._fields, "mm_token_type_ids": padded}

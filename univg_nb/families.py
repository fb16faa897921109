"""The families of models that work here: what a token of an image is, and box units.

Qwen2-VL, Qwen2.5-VL and Qwen3-VL differ in the side of a merged patch and in how they
were taught to write boxes (`data.conventions` converts). The model type of config.json
decides. Neither torch nor transformers is imported here.
"""

from typing import Any, Literal

Boxes = Literal["thousandths", "pixels"]
# In thousandths of the picture's width and height, or in pixels of the resized picture.
BOXES: dict[str, Boxes] = {
    "qwen2_vl": "thousandths",
    "qwen2_5_vl": "pixels",
    "qwen3_vl": "thousandths",
}
JSON_REPLIES = ("qwen2_5_vl", "qwen3_vl")  # their usual reply: {"bbox_2d": [...]}
SIDE = 28  # pixels of a token's side in Qwen2-VL: two patches of 14

_RECURRENT = (
    "three of four layers are recurrent, and no mask separates the replies of a group"
)
_EXPERTS = "LoRA, 4-bit weights and vLLM's updates treat experts in ways not tried here"
_REASONS = {
    "qwen3_5": _RECURRENT,
    "qwen3_5_moe": _RECURRENT,
    "qwen3_vl_moe": _EXPERTS,
    "qwen3_omni_moe": _EXPERTS,
}


def check_family(config: Any, source: str) -> None:
    """Raise ValueError for a model that is none of `BOXES`, with the reason."""
    kind = config.model_type
    if kind not in BOXES:
        reason = _REASONS.get(kind, "its images and boxes are not known here")
        raise ValueError(
            f"{source}: a model of type {kind!r} does not work: {reason}; take a "
            "Qwen2-VL, Qwen2.5-VL or dense Qwen3-VL, such as Qwen/Qwen3-VL-8B-Instruct"
        )


def box_convention(config: Any) -> Boxes:
    """Return the unit in which a model of one of these families writes boxes.

    `config.boxes` is there on weights that were fine-tuned to another unit than their
    family's.
    """
    return getattr(config, "boxes", None) or BOXES[config.model_type]


def get_side(processor: Any) -> int:
    """Return the side in pixels of what becomes a token, 28 in Qwen2-VL."""
    return processor.image_processor.patch_size * processor.image_processor.merge_size


def scale_limit(pixels: int, side: int) -> int:
    """Return a scale's pixel limit for a model whose tokens have this side.

    Limits are written for tokens of 28 x 28 pixels. Where tokens are larger (Qwen3-VL:
    32 x 32) the limit grows with them: 512 tokens stay 512.
    """
    return pixels * side**2 // SIDE**2 if side > SIDE else pixels

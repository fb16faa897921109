"""What TRL hands to vLLM, made such that vLLM sees what the policy is trained on.

TRL 1.16 gives vLLM the token ids of the training pass, in which every image already
stands as its run of image tokens, and the opened picture. A colocated vLLM then puts a
run in the place of the first image token it finds for each image, so the model reads
prompts with too many image tokens in them, without an error (huggingface/trl, issue
6294). And vLLM resizes pictures within the limits of the model's own processor, not
those of the scale. Both would make replies worse, and both are ruled out here.
"""

from __future__ import annotations

from typing import Any

from PIL.Image import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

DIFFERENCE = "sampling/sampling_logp_difference/mean"  # TRL's name
ALLOWED = 0.1  # nats a token; rounding to bfloat16 stays far below


def one_token_an_image(ids: list[int], image_token: int) -> list[int]:
    """`ids` with every run of `image_token` as one, the form that vLLM expands itself.

    The chat template of Qwen2-VL has other tokens between two images.
    """
    return [
        token
        for before, token in zip([None, *ids], ids, strict=False)
        if not token == before == image_token
    ]


def resized(picture: Image, image_processor: Any) -> Image:
    """As large as `image_processor` makes it, by its own way, so that it finds nothing
    to do any more, and neither does another one with wider limits."""
    (pixels,) = image_processor.resize(
        images=pil_to_tensor(picture)[None],  # (1, 3, H, W)
        size=image_processor.size,
        resample=image_processor.resample,
        factor=image_processor.patch_size * image_processor.merge_size,
    )
    return to_pil_image(pixels)


def vllm_inputs(
    ids: list[list[int]], images: list[list[Image]], processor: Any, mode: str
) -> tuple[list[list[int]], list[list[Image]]]:
    """(token ids, pictures) of every row, for `mode` "colocate" or "server".

    ids: with runs of image tokens, as trained on. A server gets pictures and ids in two
    requests, and TRL looks for the runs to say where the pictures go; there they stay.
    """
    if mode == "colocate":
        ids = [one_token_an_image(row, processor.image_token_id) for row in ids]
    made: dict[int, Image] = {}  # the rows of a group hold the same objects
    for picture in (picture for row in images for picture in row):
        if id(picture) not in made:
            made[id(picture)] = resized(picture, processor.image_processor)
    return ids, [[made[id(picture)] for picture in row] for row in images]


def check_difference(metrics: dict[str, list[float]]) -> None:
    """ValueError if vLLM's log-probs are not those of the policy, by TRL's own metric
    of the last generation, a mean over all processes.

    TRL's importance weights hide it in the loss: they go to 0, and nothing is learned.
    Without them (grpo.vllm_importance_sampling_correction=false) there is no metric.
    """
    found = metrics.get(DIFFERENCE)
    if found and found[-1] > ALLOWED:
        raise ValueError(
            f"vLLM's log-probs differ from the policy's by {found[-1]:.2g} nats a "
            f"token, more than {ALLOWED}: it samples from another model or sees other "
            "prompts, and nothing would be learned; set grpo.use_vllm=false"
        )

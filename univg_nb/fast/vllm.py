"""Rollouts by vLLM: which settings and versions work, and what vLLM is given.

TRL 1.16 gives vLLM the token ids of the training pass, in which an image already stands
as its run of image tokens, and the opened picture. A colocated vLLM then puts a run in
the place of the first image token that it finds for each image: the model reads prompts
with too many image tokens, without an error (huggingface/trl, issue 6294). And vLLM
resizes pictures within the limits of the model's own processor, not those of the scale.
`make_vllm_inputs` rules out both, given limits for which `check_limits` passes.
"""

import json
import urllib.request
from collections.abc import Mapping
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from PIL.Image import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from transformers import AutoImageProcessor

TRIED = SpecifierSet(">=0.32,<0.33")  # as in pyproject.toml
# What TRL 1.16 recommends, and the only servers it can read. They want a transformers
# older than 5.18, which takes no finished image features.
SERVED = SpecifierSet(">=0.22,<=0.31")
DIFFERENCE = "sampling/sampling_logp_difference/mean"  # a metric of TRL
ALLOWED = 0.1  # nats a token; rounding to bfloat16 stays far below


def find_conflict(config: Mapping[str, Any]) -> str:
    """Return why vLLM cannot sample for GRPO as a scale says, and what to do, or "".

    A server that does not answer is no problem here: TRL waits for it.
    """
    grpo = config["grpo"]
    if not grpo.get("use_vllm"):
        return ""
    if config["sft"].get("adapter") == "qlora":
        return (
            "sft.adapter=qlora: TRL sends merged weights at full size to an engine "
            "that holds 4-bit ones, which refuses them (huggingface/trl, issue 4973); "
            "set sft.adapter=lora, or grpo.use_vllm=false"
        )
    if grpo.get("vllm_mode") != "server":
        return ""
    url = get_server_url(grpo)
    try:
        with urllib.request.urlopen(f"{url}/version", timeout=5) as answer:
            version = json.load(answer)["version"]
    except OSError:
        return ""
    except (ValueError, KeyError, TypeError):
        return f"{url} does not answer as a vLLM server; set grpo.vllm_server_port"
    if Version(version).base_version in SERVED:
        return ""
    return (
        f"{url} is vLLM {version}, whose replies TRL cannot read ({SERVED}); serve "
        'with pip install "vllm<=0.31" in an environment of its own, or set '
        "grpo.vllm_mode=colocate"
    )


def describe_version(installed: str) -> str:
    """Return "ok", or that this project was tried with another version of vLLM."""
    base = Version(installed).base_version  # 0.32.0+cu129 counts as 0.32.0
    return "ok" if base in TRIED else f"{installed} found; tried with {TRIED}"


def get_server_url(grpo: Mapping[str, Any]) -> str:
    """Return where TRL looks for the server of a scale's grpo section."""
    host = grpo.get("vllm_server_host", "0.0.0.0")
    port = grpo.get("vllm_server_port", 8000)
    return grpo.get("vllm_server_base_url") or f"http://{host}:{port}"


def collapse_image_tokens(ids: list[int], image_token: int) -> list[int]:
    """Return `ids` with each run of `image_token` as one, which vLLM expands itself.

    The chat template of Qwen2-VL has other tokens between two images.
    """
    pairs = zip([None, *ids], ids, strict=False)
    return [token for before, token in pairs if not before == token == image_token]


def resize_image(picture: Image, image_processor: Any) -> Image:
    """Resize a picture as `image_processor` does, which leaves it nothing to do.

    One with wider limits (`check_limits`) has nothing to do either.
    """
    (pixels,) = image_processor.resize(
        images=pil_to_tensor(picture)[None],  # (1, 3, H, W)
        size=image_processor.size,
        resample=image_processor.resample,
        factor=image_processor.patch_size * image_processor.merge_size,
    )
    return to_pil_image(pixels)


def check_limits(processor: Any, source: str) -> None:
    """Raise ValueError if vLLM would resize again what `processor` has resized.

    vLLM resizes within the limits in `source`, the model's folder. Those of Qwen3-VL
    enlarge every picture of less than 65,536 pixels.
    """
    theirs = AutoImageProcessor.from_pretrained(source)
    ours, own = (
        (images.size["shortest_edge"], images.size["longest_edge"])
        for images in (processor.image_processor, theirs)
    )
    if ours[0] < own[0] or ours[1] > own[1]:
        raise ValueError(
            f"vLLM resizes pictures to {own[0]} to {own[1]} pixels, as {source} says, "
            f"but the training to {ours[0]} to {ours[1]}: it would sample from other "
            "prompts; set model.min_pixels and model.max_pixels within vLLM's limits, "
            "or grpo.use_vllm=false"
        )


def make_vllm_inputs(
    ids: list[list[int]], images: list[list[Image] | None], processor: Any, mode: str
) -> tuple[list[list[int]], list[list[Image] | None]]:
    """Return the token ids and opened pictures of every row as vLLM is to get them.

    `ids` have runs of image tokens, as trained on. In the mode "server" they stay:
    pictures and ids go in two requests, and TRL looks for the runs to say where the
    pictures go.
    """
    if mode == "colocate":
        ids = [collapse_image_tokens(row, processor.image_token_id) for row in ids]
    # The rows of a group hold the same objects: each is resized once.
    distinct = {id(picture): picture for row in images for picture in row or ()}
    made = {
        key: resize_image(picture, processor.image_processor)
        for key, picture in distinct.items()
    }
    return ids, [row and [made[id(picture)] for picture in row] for row in images]


def check_log_prob_difference(metrics: Mapping[str, list[float]]) -> None:
    """Raise ValueError if vLLM's log-probs are not the policy's, by TRL's metric.

    TRL's importance weights hide it: they go to 0, and nothing is learned. Without them
    (grpo.vllm_importance_sampling_correction=false) there is no metric.
    """
    found = metrics.get(DIFFERENCE)
    if found and found[-1] > ALLOWED:
        raise ValueError(
            f"vLLM's log-probs differ from the policy's by {found[-1]:.2g} nats a "
            f"token, more than {ALLOWED}: it samples from another model or sees other "
            "prompts, and nothing would be learned; set grpo.use_vllm=false"
        )

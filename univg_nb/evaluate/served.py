"""Replies of a vLLM server: `vllm serve MODEL`, then `generate --server URL`.

vLLM batches requests by itself. Prompt, pixels and banned tokens are as in `replies`;
adapters must have been merged into the folder that is served (`merge`).
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from transformers import ProcessorMixin

from univg_nb.data import prompts
from univg_nb.data.conventions import PLAIN, BoxConvention
from univg_nb.data.images import encode_data_url, open_image
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate.predictions import Reply, convert_reply
from univg_nb.families import get_side
from univg_nb.fast.sampling import get_vision_token_ids
from univg_nb.fast.vllm import resize_image


@dataclass(frozen=True)
class ServedModel:
    """A model behind an OpenAI-compatible endpoint; OPENAI_API_KEY may hold a key."""

    base_url: str  # such as "http://127.0.0.1:8000/v1"
    model: str  # its name at the endpoint: for vLLM the folder or hub name it serves
    convention: BoxConvention = PLAIN


def reply(
    model: ServedModel,
    processor: ProcessorMixin,
    samples: Sequence[GroundingSample],
    *,
    seeds: Sequence[int],
    style: str = "univg",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> list[Reply]:
    """Return one reply to each sample, all asked at once; see `replies.reply`.

    Images are sent as `processor` resizes them: vLLM takes no limits by request.

    Raises:
        ValueError: an image is unreadable, or the server unreachable or unwilling.
    """
    import openai  # half a second that only those who ask a server should wait

    # A proxy of the environment does not lead to this machine.
    local = urlsplit(model.base_url).hostname in ("localhost", "127.0.0.1", "::1")
    client = openai.OpenAI(
        base_url=model.base_url,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        timeout=600,  # seconds that a reply may take
        http_client=openai.DefaultHttpxClient(trust_env=not local),
    )
    banned = get_vision_token_ids(processor)

    def ask(sample: GroundingSample, seed: int) -> Reply:
        content: list[dict[str, Any]] = []
        for path in sample.images:
            image = open_image(path, sample.id, get_side(processor))
            image = resize_image(image, processor.image_processor)
            url = encode_data_url(image, "PNG", compress_level=1)
            content.append({"type": "image_url", "image_url": {"url": url}})
        text = prompts.user_text(model.convention.ask(sample), style)
        content.append({"type": "text", "text": text})
        answer = client.chat.completions.create(
            model=model.model,
            messages=[{"role": "user", "content": content}],
            seed=seed,
            max_tokens=max_new_tokens,
            temperature=temperature,
            logit_bias={str(token): -100 for token in banned},
        )
        (choice,) = answer.choices
        made = Reply(
            prompts.open_thinking(choice.message.content or ""),
            truncated=choice.finish_reason == "length",
            tokens=answer.usage.completion_tokens if answer.usage else 0,
        )
        return convert_reply(made, sample, model.convention)

    try:
        with ThreadPoolExecutor(max(1, len(samples))) as pool:
            return list(pool.map(ask, samples, seeds))
    except openai.APIError as error:
        raise ValueError(
            f"{model.base_url}, model {model.model!r}: {error}; start it with "
            f"`vllm serve {model.model}` and run again, what is finished is kept"
        ) from error

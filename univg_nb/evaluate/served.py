"""Replies of a vLLM server: `vllm serve MODEL`, then `generate --server URL`.

vLLM batches requests by itself. Prompt, pixels and banned tokens are as in `replies`;
adapters must have been merged into the folder that is served (`merge`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai
from transformers import ProcessorMixin

from univg_nb.data import prompts
from univg_nb.data.images import encode_data_url, open_image
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate.replies import GeneratedReply
from univg_nb.fast.sampling import VISION_TOKENS
from univg_nb.fast.vllm import resize_image


@dataclass(frozen=True)
class ServedModel:
    """A model behind an OpenAI-compatible endpoint.

    Attributes:
        base_url: such as "http://127.0.0.1:8000/v1"; OPENAI_API_KEY may hold a key.
        model: its name at the endpoint: for vLLM the folder or hub name it serves.
        timeout: seconds that a reply may take.
    """

    base_url: str
    model: str
    timeout: float = 600.0

    def identify(self) -> dict[str, Any]:
        """Return what its replies depend on, as far as this side can know."""
        return {"attention": "server", "weights_hash": ["served", self.model]}

    def reply(
        self,
        processor: ProcessorMixin,
        samples: Sequence[GroundingSample],
        *,
        seeds: Sequence[int],
        style: str = "univg",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> list[GeneratedReply]:
        """Return one reply to each sample, all asked at once.

        Images are sent as `processor` resizes them: vLLM takes no limits by request.

        Args:
            processor: gives the pixel limits and the ids of the banned tokens.
            samples: the items to answer.
            seeds: of sampling, one for each sample.
            style: prompt style, one of `prompts.STYLES`.
            max_new_tokens: most tokens of a reply.
            temperature: 0 is greedy.

        Raises:
            ValueError: an image is unreadable, or the server unreachable or unwilling.
        """
        client = self._connect()
        known = processor.tokenizer.get_vocab()
        banned = [known[token] for token in VISION_TOKENS if token in known]
        owners = {path: sample.id for sample in samples for path in sample.images}
        urls = {}
        for path, owner in owners.items():
            image = resize_image(open_image(path, owner), processor.image_processor)
            urls[path] = encode_data_url(image, "PNG", compress_level=1)

        def ask(sample: GroundingSample, seed: int) -> GeneratedReply:
            content: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": urls[path]}}
                for path in sample.images
            ]
            content.append({"type": "text", "text": prompts.user_text(sample, style)})
            answer = client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],
                seed=seed,
                max_tokens=max_new_tokens,
                temperature=temperature,
                logit_bias={str(token): -100 for token in banned},
            )
            (choice,) = answer.choices
            return GeneratedReply(
                response=choice.message.content or "",
                tokens=answer.usage.completion_tokens if answer.usage else 0,
                truncated=choice.finish_reason == "length",
            )

        try:
            with ThreadPoolExecutor(max(1, len(samples))) as pool:
                return list(pool.map(ask, samples, seeds))
        except openai.APIError as error:
            raise ValueError(
                f"{self.base_url}, model {self.model!r}: {error}; start it with "
                f"`vllm serve {self.model}` and run again, what is finished is kept"
            ) from error

    def _connect(self) -> openai.OpenAI:
        # A proxy of the environment does not lead to this machine.
        local = urlsplit(self.base_url).hostname in ("localhost", "127.0.0.1", "::1")
        return openai.OpenAI(
            base_url=self.base_url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=self.timeout,
            http_client=openai.DefaultHttpxClient(trust_env=not local),
        )

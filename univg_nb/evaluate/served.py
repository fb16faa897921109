"""Replies by a vLLM server: `vllm serve MODEL`, then `evaluate generate --server URL`.

For large models on GPUs: vLLM batches by itself and keeps no ended row. The prompt, the
pixels and the ban on vision tokens are those of `replies`; the adapters must have been
merged into the folder that is served (`merge`).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import openai
from PIL.Image import Image

from univg_nb.cot.teacher import Teacher, client_of
from univg_nb.data import prompts
from univg_nb.data.images import open_image
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate.replies import VISION_TOKENS, Made
from univg_nb.fast.vllm import resized

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass(frozen=True)
class Served:
    """A model behind an OpenAI-compatible endpoint.

    Attributes:
        base_url: such as "http://127.0.0.1:8000/v1"; a key, where one is needed, is
            read from the environment (OPENAI_API_KEY).
        model: its name at the endpoint: for vLLM the folder or hub name it serves.
        timeout: seconds a reply may take.
    """

    base_url: str
    model: str
    timeout: float = 600.0

    def settings(self) -> dict[str, Any]:
        """What its replies depend on, as far as this side can know."""
        return {"attention": "server", "weights_hash": ["served", self.model]}

    def reply(
        self,
        processor: ProcessorMixin,
        samples: Sequence[GroundingSample],
        *,
        style: str = "univg",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> list[Made]:
        """One reply to each sample, all asked at once. See replies.reply.

        `processor` gives the pixel limits and the banned tokens' numbers: pictures are
        sent as it resizes them, since vLLM takes no limits with a request unless it is
        told to trust its clients. Raises ValueError for an unreadable image and for a
        server that cannot be reached or refuses.
        """
        banned = processor.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
        ask = partial(
            self._ask,
            client_of(Teacher(self.base_url, self.model, timeout=self.timeout)),
            {
                path: _url(resized(open_image(path, s.id), processor.image_processor))
                for s in samples
                for path in s.images
            },
            style=style,
            max_tokens=max_new_tokens,
            temperature=temperature,
            logit_bias={str(token): -100 for token in banned},
        )
        try:
            with ThreadPoolExecutor(max(1, len(samples))) as pool:
                return list(pool.map(ask, samples, seeds or [0] * len(samples)))
        except openai.APIError as error:
            raise ValueError(
                f"{self.base_url}, model {self.model!r}: {error}; start it with "
                f"`vllm serve {self.model}` and run again, what is finished is kept"
            ) from error

    def _ask(
        self,
        client: openai.OpenAI,
        urls: dict[str, str],
        sample: GroundingSample,
        seed: int,
        style: str,
        **options: Any,
    ) -> Made:
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": urls[path]}}
            for path in sample.images
        ]
        parts.append({"type": "text", "text": prompts.user_text(sample, style)})
        answer = client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": parts}],
            seed=seed,
            **options,
        )
        (choice,) = answer.choices
        return Made(
            response=choice.message.content or "",
            tokens=answer.usage.completion_tokens if answer.usage else 0,
            truncated=choice.finish_reason == "length",
        )


def _url(picture: Image) -> str:
    """It as a data URL; PNG loses nothing."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

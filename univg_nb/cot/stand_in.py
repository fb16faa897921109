"""A stand-in for the teacher: a small HTTP server that knows MiniMIG's scenes.

It speaks the protocol of OpenAI's chat completions on the loopback interface, knows a
picture it is sent, writes a sound chain or, at a known rate, one with an error of a
known kind (`ERRORS`), and selects among replies. So the client, the checks and the
selection can be run and measured without a model.
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from univg_nb.cot.checks import MAX_CHARS
from univg_nb.data.boxes import format_box
from univg_nb.data.images import image_url
from univg_nb.data.prompts import reply_text
from univg_nb.data.sample import GroundingSample, image_numbers
from univg_nb.minimig.compose import Draft
from univg_nb.minimig.items import make
from univg_nb.minimig.pictograms import COLORS, KINDS

# ---------------------------------------------------------------- what goes wrong


def _said(sample: GroundingSample, chain: str) -> str:
    return reply_text(replace(sample, chain=chain))


def _moved(sample: GroundingSample, by: int) -> str:
    """The reply with its box moved sideways, inside the picture."""
    x1, y1, x2, y2 = sample.answer
    by = by if x2 + by < 1000 else -by
    return reply_text(replace(sample, answer=(max(0, x1 + by), y1, x2 + by, y2)))


def _quoted(sample: GroundingSample) -> str:
    return _said(sample, f"{sample.chain} It is {format_box(sample.answer)}.")


def _corner(sample: GroundingSample) -> str:
    x1, y1, *_ = sample.answer
    return _said(sample, f"{sample.chain} It starts at ({x1}, {y1}).")


def _rambling(sample: GroundingSample) -> str:
    return _said(sample, f"{sample.chain} " * (1 + MAX_CHARS // len(sample.chain)))


def _chinese(sample: GroundingSample) -> str:
    number = image_numbers(sample.chain)[-1]
    text = f"先看每张图片，再比较其中的物体，排除不符的部分。目标在 image {number} 中。"
    return _said(sample, text)


def _wrong_image(sample: GroundingSample) -> str:
    """The last image the chain names exchanged for another."""
    before, _, after = sample.chain.rpartition("image ")
    other = "2" if after[0] == "1" else "1"
    return _said(sample, f"{before}image {other}{after[1:]}")


def _mirrored(sample: GroundingSample) -> str:
    """Left for right and right for left; may change nothing."""
    swapped = {"left": "right", "right": "left"}
    return _said(sample, re.sub("left|right", lambda m: swapped[m[0]], sample.chain))


def _draft(sample: GroundingSample, seed: int) -> Draft:
    """The scenes behind a sample of MiniMIG, from its id and the data's seed."""
    _, task, split, _, index = sample.id.split("-")
    return make(task, seed, split, int(index)).draft


def _wrong_thing(sample: GroundingSample, seed: int) -> str:
    """The conclusion names another thing of the same picture."""
    draft = _draft(sample, seed)
    scene = draft.scenes[draft.target_image - 1]
    others = [t.name for t in scene.things if t.name != draft.target.name]
    before, so, after = sample.chain.rpartition("So the target is ")
    other = others[0] if others else f"pale {draft.target.kind}"
    return _said(sample, before + so + after.replace(draft.target.name, other))


def _invented(sample: GroundingSample, seed: int) -> str:
    """A thing is seen that stands in none of the pictures."""
    there = {(t.kind, t.color) for s in _draft(sample, seed).scenes for t in s.things}
    kind, color = next((k, c) for k in KINDS for c in COLORS if (k, c) not in there)
    return _said(sample, f"There is one {color} {kind} as well. {sample.chain}")


# Each takes the sample and the seed of the data; the first eight are errors of form.
ERRORS: dict[str, Callable[[GroundingSample, int], str]] = {
    "wrong box": lambda s, _: _moved(s, 40),
    "box off by one": lambda s, _: _moved(s, 1),
    "box quoted": lambda s, _: _quoted(s),
    "corner quoted": lambda s, _: _corner(s),
    "no thinking": lambda s, _: _said(s, ""),
    "rambling": lambda s, _: _rambling(s),
    "tag left open": lambda s, _: reply_text(s).replace("</think>", ""),
    "polite opening": lambda s, _: "Sure! " + reply_text(s),
    "other language": lambda s, _: _chinese(s),
    "wrong image": lambda s, _: _wrong_image(s),
    "left for right": lambda s, _: _mirrored(s),
    "wrong thing": _wrong_thing,
    "invented thing": _invented,
}


def _looking_back(sample: GroundingSample) -> str:
    """True, and yet the last image named is not the one that was asked for."""
    number = image_numbers(sample.chain)[-1]
    other = next(n for n in range(1, len(sample.images) + 1) if n != number)
    return f"{sample.chain} That settles it; image {other} told what to look for."


# Sound chains in other words, which the checks ought to let pass.
WORDINGS: tuple[Callable[[GroundingSample], str], ...] = (
    lambda s: s.chain,
    lambda s: f"Let me look at the images one after another. {s.chain}",
    lambda s: f"{s.chain} Nothing to the left of it or to the right of it fits.",
    lambda s: re.sub(r"at the (left|right)\.$", r"on the \1-hand side.", s.chain),
    _looking_back,
)

# ---------------------------------------------------------------- the server


class StandIn:
    """The server, run by ``with StandIn(samples) as teacher:``; its address is `url`.

    Args:
        samples: MiniMIG samples with chains, two images or more each.
        seed: the data's; with the sample and the number of the candidate it decides
            what is written.
        rate: share of candidates with an error, every kind as often.
        judge: how often the selector picks a sound reply where there is one.
        busy: share of requests turned away once with status 503.
    """

    def __init__(
        self,
        samples: Iterable[GroundingSample],
        seed: int = 0,
        rate: float = 0.5,
        judge: float = 0.8,
        busy: float = 0.02,
    ) -> None:
        self.seed, self.rate, self.judge, self.busy = seed, rate, judge, busy
        self.turned_away: set[tuple[str, ...]] = set()
        self._by_pictures = {
            tuple(image_url(path, sample.id) for path in sample.images): sample
            for sample in samples
        }
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.stand_in = self
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def write(self, sample: GroundingSample, number: int) -> tuple[str, str]:
        """Candidate ``number`` for a sample, and its error ("" if it is sound)."""
        rng = random.Random(f"{self.seed}/{sample.id}/{number}")
        if rng.random() < self.rate:
            error = rng.choice(list(ERRORS))
            text = ERRORS[error](sample, self.seed)
            if text != reply_text(sample):
                return text, error
        return _said(sample, rng.choice(WORDINGS)(sample)), ""

    def select(self, sample: GroundingSample, replies: list[str]) -> int:
        """The number, from 1, of the reply it takes for the best."""
        rng = random.Random(f"{self.seed}/{sample.id}/select")
        sound = {_said(sample, wording(sample)) for wording in WORDINGS}
        good = [n for n, text in enumerate(replies, 1) if text in sound]
        able = rng.random() < self.judge
        return rng.choice(good if good and able else range(1, len(replies) + 1))

    def answer(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body of the response to a chat completion request."""
        parts = request["messages"][-1]["content"]
        pictures = tuple(
            part["image_url"]["url"] for part in parts if part["type"] == "image_url"
        )
        text, number = parts[-1]["text"], request.get("seed") or 0
        sample = self._by_pictures.get(pictures)
        if sample is None:
            return 400, {"error": {"message": "these pictures are not known here"}}
        once = (sample.id, str(number), text)
        rng = random.Random(f"{self.seed}/{once}/busy")
        if rng.random() < self.busy and once not in self.turned_away:
            self.turned_away.add(once)
            return 503, {"error": {"message": "busy"}}
        replies = re.findall(r"^Reply \d+: (.*)$", text, re.MULTILINE)
        reply = (
            str(self.select(sample, replies))
            if replies
            else self.write(sample, number)[0]
        )
        return 200, _completion(request["model"], text, len(pictures), reply)


def _completion(model: str, text: str, pictures: int, reply: str) -> dict[str, Any]:
    """A chat completion; tokens are estimated: four letters each, 81 a picture."""
    used = {"prompt_tokens": 81 * pictures + len(text) // 4}
    used["completion_tokens"] = len(reply) // 4
    message = {"role": "assistant", "content": reply}
    return {
        "id": "stand-in",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": used | {"total_tokens": sum(used.values())},
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    stand_in: StandIn


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept
    wbufsize = -1  # header and body in one packet: two would wait for each other

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = self.server.stand_in.answer(json.loads(body))
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 503:
            self.send_header("retry-after-ms", "20")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """A notebook is no place for a server's log."""

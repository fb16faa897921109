"""A stand-in for the teacher that knows MiniMIG's scenes, and a small server of it.

`StandInTeacher` writes a chain in one of several styles (`STYLES`) or, at a known
rate, one with an error of a known kind (`ERRORS`), and selects among replies. `StandIn`
serves one on the loopback interface by the protocol of OpenAI's chat completions: it
recognizes the images that it is sent. So the client, the checks and the selection can
be run and measured without a model. The replies are the same without HTTP.
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple, get_args

from univg_nb.cot.checks import MAX_CHARS
from univg_nb.data.boxes import format_box
from univg_nb.data.images import load_data_url
from univg_nb.data.prompts import reply_text
from univg_nb.data.sample import GroundingSample, find_target_image
from univg_nb.minimig.compose import Draft
from univg_nb.minimig.items import TASKS, make
from univg_nb.minimig.pictograms import COLORS, KINDS


def _write_reply(sample: GroundingSample, chain: str) -> str:
    return reply_text(replace(sample, chain=chain))


def _shift_box(sample: GroundingSample, by: int) -> str:
    """Return the reply with its box moved sideways, inside the picture."""
    x1, y1, x2, y2 = sample.answer
    by = by if x2 + by < 1000 else -by
    moved = (max(0, x1 + by), y1, x2 + by, y2)
    return reply_text(replace(sample, answer=moved, boxes=()))


def _mirror(sample: GroundingSample, seed: int) -> str:
    """Exchange left and right; this may change nothing."""
    swapped = {"left": "right", "right": "left"}
    chain = re.sub("left|right", lambda match: swapped[match[0]], sample.chain or "")
    return _write_reply(sample, chain)


def _make_draft(sample: GroundingSample, seed: int) -> Draft:
    """Return the scenes behind a MiniMIG sample, from its id and the data's seed."""
    _, task, split, _, index = sample.id.split("-")
    return make(task, seed, split, int(index)).draft


def _name_wrong_image(sample: GroundingSample, seed: int) -> str:
    start, found, rest = (sample.chain or "").rpartition("image ")
    other = "2" if rest[0] == "1" else "1"
    return _write_reply(sample, start + found + other + rest[1:])


def _name_wrong_thing(sample: GroundingSample, seed: int) -> str:
    """Name another thing of the same picture in the conclusion."""
    draft = _make_draft(sample, seed)
    target, scene = draft.target, draft.scenes[draft.target_image - 1]
    others = [thing.name for thing in scene.things if thing.name != target.name]
    other = others[0] if others else f"pale {target.kind}"
    start, found, rest = (sample.chain or "").rpartition("So the target is ")
    return _write_reply(sample, start + found + rest.replace(target.name, other))


def _invent_thing(sample: GroundingSample, seed: int) -> str:
    """Describe a thing that none of the pictures shows."""
    shown = {t.label for s in _make_draft(sample, seed).scenes for t in s.things}
    kind, color = next((k, c) for k in KINDS for c in COLORS if (k, c) not in shown)
    text = f"There is one {color} {kind} as well. {sample.chain}"
    return _write_reply(sample, text)


_CHINESE = "先看每张图片，再比较其中的物体，排除不符的部分。目标在 image {} 中。"
# Each takes the sample and the seed of the data; the first eight are errors of form.
ERRORS: dict[str, Callable[[GroundingSample, int], str]] = {
    "wrong box": lambda s, _: _shift_box(s, 40),
    "box off by one": lambda s, _: _shift_box(s, 1),
    "box quoted": lambda s, _: _write_reply(
        s, f"{s.chain} It is {format_box(s.answer)}."
    ),
    "corner quoted": lambda s, _: _write_reply(
        s, f"{s.chain} It starts at {s.answer[:2]}."
    ),
    "no thinking": lambda s, _: _write_reply(s, ""),
    "too long": lambda s, _: _write_reply(
        s, f"{s.chain} " * (1 + MAX_CHARS // len(s.chain or ""))
    ),
    "tag left open": lambda s, _: reply_text(s).replace("</think>", ""),
    "polite opening": lambda s, _: "Sure! " + reply_text(s),
    "other language": lambda s, _: _write_reply(
        s, _CHINESE.format(find_target_image(s))
    ),
    "wrong image": _name_wrong_image,
    "left for right": _mirror,
    "wrong thing": _name_wrong_thing,
    "invented thing": _invent_thing,
}


def _end_with_other_image(sample: GroundingSample) -> str:
    """Return a sound chain whose last image is not the target's."""
    other = 2 if find_target_image(sample) == 1 else 1
    return f"{sample.chain} That settles it; image {other} told what to look for."


Wording = Callable[[GroundingSample], str]
# Sound chains in other words, which the checks should let pass.
WORDINGS: tuple[Wording, ...] = (
    lambda s: s.chain or "",
    lambda s: f"What do the images show? {s.chain}",
    lambda s: f"{s.chain} Nothing to the left of it or to the right of it fits.",
    lambda s: re.sub(r"at the (left|right)\.$", r"on the \1-hand side.", s.chain or ""),
    _end_with_other_image,
)


def _list_wordings(sample: GroundingSample) -> Sequence[Wording]:
    """Return the wordings that fit; the last speaks of another image."""
    return WORDINGS if len(sample.images) > 1 else WORDINGS[:-1]


# A style makes the chain of a draft; they are listed from the most to the least useful.
STYLES: dict[str, Callable[[Draft], str]] = {
    "thorough": lambda draft: draft.chain or "",
    "conclusion first": lambda draft: (
        f"It is {draft.conclusion}. {draft.steps} So it is in image "
        f"{draft.target_image}."
    ),
    "terse": lambda draft: f"The target is {draft.conclusion}.",
    "glance": lambda draft: f"I see it in image {draft.target_image}.",
}
# The habits of the course's teacher: it says what it sees and why, but where one
# picture asks for a thing that is there to be seen in the other, it is often content
# with a glance.
_LOOK_ALIKE = {
    "thorough": 0.42,
    "terse": 0.05,
    "glance": 0.49,
    "conclusion first": 0.04,
}
HABITS: dict[str, Any] = {
    "styles": {
        "thorough": 0.95,
        "terse": 0.03,
        "glance": 0.01,
        "conclusion first": 0.01,
    },
    "task_styles": dict.fromkeys(
        ("refer_grounding", "reasoning", "correspondence"), _LOOK_ALIKE
    ),
}
Selector = Literal["first", "form", "good"]


def name_style(chain: str) -> str:
    """Return the style that a chain is written in, by how it begins."""
    beginnings = {
        "I see it": "glance",
        "The target is": "terse",
        "It is": "conclusion first",
    }
    found = (style for text, style in beginnings.items() if chain.startswith(text))
    return next(found, "thorough")


class Candidate(NamedTuple):
    """A reply, its error ("" if it is sound) and its style, a key of `STYLES`."""

    text: str
    error: str
    style: str


@dataclass(frozen=True)
class StandInTeacher:
    """Writes and selects chains of MiniMIG samples with two images or more.

    Attributes:
        seed: the data's; with the sample and the number of the candidate it decides
            what is written.
        error_rate: share of candidates with an error; all kinds are equally likely.
        styles: share of the candidates by style; what is left out is not written.
        task_styles: the same by task, for the tasks in which the habits differ.
        selector: "first" takes the first of the replies, which is no selection, "form"
            any of them, and "good" a sound one in the most useful style.
        selector_accuracy: how often the good selector sees which replies these are;
            else it takes any.
    """

    seed: int = 0
    error_rate: float = 0.5
    styles: Mapping[str, float] = field(default_factory=lambda: {"thorough": 1.0})
    task_styles: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    selector: Selector = "good"
    selector_accuracy: float = 0.8

    def __post_init__(self) -> None:
        if unknown := set(self.task_styles) - set(TASKS):
            raise ValueError(
                f"task_styles: no task {', '.join(sorted(unknown))}; name any of "
                f"{', '.join(TASKS)}"
            )
        for shares in (self.styles, *self.task_styles.values()):
            least, total = min(shares.values()), sum(shares.values())
            if set(shares) - set(STYLES) or total <= 0 or least < 0:
                raise ValueError(
                    f"styles {dict(shares)}: give shares of zero or more, one of them "
                    f"above zero, to any of {', '.join(STYLES)}"
                )
        if self.selector not in get_args(Selector):
            raise ValueError(
                f"selector {self.selector!r} is unknown; use one of "
                f"{', '.join(get_args(Selector))}"
            )

    def write(self, sample: GroundingSample, number: int) -> Candidate:
        """Return candidate `number` for a sample."""
        rng = random.Random(f"{self.seed}/{sample.id}/{number}")
        shares = self._get_shares(sample)
        (style,) = (
            shares
            if len(shares) == 1
            else rng.choices(list(shares), list(shares.values()))
        )
        if style != "thorough":
            draft = _make_draft(sample, self.seed)
            sample = replace(sample, chain=STYLES[style](draft))
        if rng.random() < self.error_rate:
            error = rng.choice(list(ERRORS))
            text = ERRORS[error](sample, self.seed)
            if text != reply_text(sample):
                return Candidate(text, error, style)
        if style != "thorough":
            return Candidate(reply_text(sample), "", style)
        wording = rng.choice(_list_wordings(sample))
        return Candidate(_write_reply(sample, wording(sample)), "", style)

    def _get_shares(self, sample: GroundingSample) -> Mapping[str, float]:
        return self.task_styles.get(sample.task, self.styles)

    def select(self, sample: GroundingSample, replies: Sequence[str]) -> int:
        """Return the number, from 1, of the reply that the selector takes."""
        if self.selector == "first":
            return 1
        rng = random.Random(f"{self.seed}/{sample.id}/select")
        numbers = range(1, len(replies) + 1)
        able = rng.random() < self.selector_accuracy
        if self.selector == "form" or not able:
            return rng.choice(numbers)
        for texts in self._list_sound(sample):
            if good := [n for n, text in enumerate(replies, 1) if text in texts]:
                return rng.choice(good)
        return rng.choice(numbers)

    def _list_sound(self, sample: GroundingSample) -> list[set[str]]:
        """Return the sound replies to a sample, by style, the most useful first."""
        thorough = {_write_reply(sample, w(sample)) for w in _list_wordings(sample)}
        shares = self._get_shares(sample)
        others = [style for style in list(STYLES)[1:] if style in shares]
        if not others:
            return [thorough]
        draft = _make_draft(sample, self.seed)
        return [thorough, *({_write_reply(sample, STYLES[s](draft))} for s in others)]

    def reply(self, sample: GroundingSample, text: str, number: int) -> str:
        """Return the reply to a prompt of `checks`, the teacher's or the selector's."""
        replies = re.findall(r"^Reply \d+: (.*)$", text, re.MULTILINE)
        if replies:
            return str(self.select(sample, replies))
        return self.write(sample, number).text


class StandIn:
    """The server, run by `with StandIn(samples) as server:`.

    Args:
        samples: MiniMIG samples with chains, two images or more each.
        teacher: what writes and selects.
        busy_rate: share of requests that are answered with status 503 the first time.

    Attributes:
        url: the base URL for a client.
        turned_away: the requests that were answered with 503.
    """

    def __init__(
        self,
        samples: Iterable[GroundingSample],
        teacher: StandInTeacher | None = None,
        busy_rate: float = 0.02,
    ) -> None:
        self.teacher = teacher or StandInTeacher()
        self.busy_rate = busy_rate
        self.turned_away: set[tuple[str, ...]] = set()
        self._by_images = {
            tuple(load_data_url(path, sample.id) for path in sample.images): sample
            for sample in samples
        }
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and body of the response to a chat completion request."""
        *images, last = request["messages"][-1]["content"]
        text, number = last["text"], request.get("seed") or 0
        urls = tuple(part["image_url"]["url"] for part in images)
        sample = self._by_images.get(urls)
        if sample is None:
            return 400, {"error": {"message": "these pictures are not known here"}}
        key = (sample.id, str(number), text)
        rng = random.Random(f"{self.teacher.seed}/{key}/busy")
        if rng.random() < self.busy_rate and key not in self.turned_away:
            self.turned_away.add(key)
            return 503, {"error": {"message": "busy"}}
        reply = self.teacher.reply(sample, text, number)
        # Tokens are estimated: four characters each, 81 an image.
        tokens = (81 * len(urls) + len(text) // 4, len(reply) // 4)
        usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
        message = {"role": "assistant", "content": reply}
        body = {"id": "stand-in", "object": "chat.completion", "created": 0}
        body["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        body["usage"] = usage | {"total_tokens": sum(tokens)}
        return 200, body | {"model": request["model"]}


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn
    protocol_version = "HTTP/1.1"  # connections are kept
    wbufsize = -1  # header and body in one packet: two would wait for each other

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = self.stand_in.answer(json.loads(body))
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 503:
            self.send_header("retry-after-ms", "20")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep the server's log out of notebooks."""

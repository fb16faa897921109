"""Chains from a teacher behind any OpenAI-compatible endpoint (PF sec. 2.1).

A vLLM server, Qwen-VL-Max and `univg_nb.cot.stand_in` all speak this protocol. For each
sample the teacher writes candidates, `cot.check_chain` drops the unsound, and of what
is left the teacher selects one. One JSON line a sample: a run that was cut off goes on
where it stopped and has lost no more than the requests in flight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from tqdm.auto import tqdm

from univg_nb import io
from univg_nb.cot import checks
from univg_nb.data.images import image_url
from univg_nb.data.sample import GroundingSample

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MOST_REFUSED = 5  # in a row: then it is the request that is wrong, not a sample


@dataclass(frozen=True)
class Teacher:
    """Where the teacher is and how it is asked. Holds no secret.

    Attributes:
        base_url: as the openai client takes it, such as "http://127.0.0.1:8000/v1".
        model: name of the model at the endpoint.
        key_variable: environment variable that holds the key. A server on this machine
            may have none.
        candidates: replies drawn for each sample (paper: 3).
        concurrency: requests in flight at once.
        temperature: of the candidates; the selection is greedy.
        max_tokens: limit on new tokens of a reply.
        retries: of a request that met a busy or failing server; the waits grow to 8 s,
            or are what the server asks for.
        timeout: seconds a request may take.
        max_pixels: larger images are sent smaller.
        price: of a million prompt tokens and of a million new tokens, any currency.
    """

    base_url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    candidates: int = 3
    concurrency: int = 8
    temperature: float = 0.9
    max_tokens: int = 1024
    retries: int = 6
    timeout: float = 120.0
    max_pixels: int = 1_003_520
    price: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name in ("candidates", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"Teacher: {name} is {getattr(self, name)}; give 1 or more"
                )

    def made_with(self) -> str:
        """Changes with whatever changes the replies: model, sampling, prompts."""
        sampling = (self.model, self.candidates, self.temperature, self.max_tokens)
        prompts = (checks.TEACHER, checks.STEPS, checks.SELECTOR)
        return io.config_hash([sampling, self.max_pixels, prompts])

    def cost(self, tokens: Sequence[int]) -> float:
        """Of (prompt, new) tokens."""
        return sum(n * p for n, p in zip(tokens, self.price, strict=True)) / 1e6


def client_of(teacher: Teacher) -> openai.OpenAI:
    """The openai client, its key from the environment alone.

    Raises ValueError if there is none and the endpoint is not on this machine.
    """
    here = urlsplit(teacher.base_url).hostname in _LOOPBACK
    key = os.environ.get(teacher.key_variable) or ("none" if here else "")
    if not key:
        raise ValueError(
            f"the environment variable {teacher.key_variable} holds no key for "
            f"{teacher.base_url}; export it, or name another in key_variable"
        )
    return openai.OpenAI(
        base_url=teacher.base_url,
        api_key=key,
        max_retries=teacher.retries,
        timeout=teacher.timeout,
        # a proxy of the environment does not lead to this machine
        http_client=openai.DefaultHttpxClient(trust_env=False) if here else None,
    )


@dataclass
class _Talk:
    """Questions about one sample's images, and the tokens they took."""

    client: openai.OpenAI
    teacher: Teacher
    sample: GroundingSample
    prompt_tokens: int = 0
    new_tokens: int = 0

    def __post_init__(self) -> None:
        urls = [
            image_url(path, self.sample.id, self.teacher.max_pixels)
            for path in self.sample.images
        ]
        self.parts = [{"type": "image_url", "image_url": {"url": u}} for u in urls]

    def ask(self, text: str, temperature: float, seed: int) -> str:
        """The reply; "" for one without text."""
        content = [*self.parts, {"type": "text", "text": text}]
        answer = self.client.chat.completions.create(
            model=self.teacher.model,
            messages=[{"role": "user", "content": content}],
            temperature=temperature,
            max_tokens=self.teacher.max_tokens,
            seed=seed,
        )
        if answer.usage is not None:
            self.prompt_tokens += answer.usage.prompt_tokens
            self.new_tokens += answer.usage.completion_tokens
        return answer.choices[0].message.content or ""


def _one(
    client: openai.OpenAI, teacher: Teacher, sample: GroundingSample, others: str
) -> dict[str, Any]:
    """The row of one sample: candidates, their problems, and which was chosen.

    What fails the checks is never selected, so the selector is asked only where it
    has a choice. A sample the endpoint refuses to answer gets a row that says why.
    """
    talk = _Talk(client, teacher, sample)
    row: dict[str, Any] = {"id": sample.id, "made_with": teacher.made_with()}
    row |= {"candidates": [], "selector": "", "chosen": None, "refused": ""}
    try:
        prompt = checks.teacher_prompt(sample, others)
        for number in range(teacher.candidates):
            text = talk.ask(prompt, teacher.temperature, number)
            problems = [p.kind for p in checks.check_chain(sample, text)]
            row["candidates"].append({"text": text, "problems": problems})
        sound = [n for n, c in enumerate(row["candidates"]) if not c["problems"]]
        if len(sound) > 1:
            texts = [row["candidates"][n]["text"] for n in sound]
            prompt = checks.selector_prompt(sample, texts)
            row["selector"] = talk.ask(prompt, 0.0, 0)
        if sound:  # a selector that names none leaves it at the first
            row["chosen"] = sound[checks.selected(row["selector"], len(sound)) or 0]
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        row["refused"] = str(error)[:300]
    return row | {"tokens": [talk.prompt_tokens, talk.new_tokens]}


def _recorded(path: Path, teacher: Teacher) -> dict[str, dict[str, Any]]:
    """Rows by sample id. Raises ValueError if they were made with other settings."""
    rows = io.read_jsonl(path) if path.is_file() else []
    for number, row in enumerate(rows, start=1):
        if row.get("made_with") != teacher.made_with():
            raise ValueError(
                f"{path}, line {number}: made with another model, sampling or prompt "
                "than is asked for now; use another file name or delete the file"
            )
    return {row["id"]: row for row in rows}


def _rows(
    samples: Sequence[GroundingSample], teacher: Teacher, others: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Rows in the order they are finished, `concurrency` samples at work at once."""
    waiting = iter(samples)
    running: set[Future[dict[str, Any]]] = set()
    pool = ThreadPoolExecutor(teacher.concurrency)
    try:
        with client_of(teacher) as client:
            while True:
                for sample in islice(waiting, teacher.concurrency - len(running)):
                    about = others.get(sample.id, "")
                    running.add(pool.submit(_one, client, teacher, sample, about))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def write_chains(
    samples: Sequence[GroundingSample],
    out: str | os.PathLike[str],
    teacher: Teacher,
    others: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Ask the teacher about every sample that `out` (JSONL) has no row of yet.

    others: further turns by sample id, as from `cot.other_turns`. Shows progress, time
    left, the share kept and the cost. Returns one row a sample, in their order: id,
    candidates (text, problems), selector (its reply), chosen (index or None), refused
    (why the endpoint would not answer), tokens (prompt, new), made_with.

    Raises ValueError for a sample that takes no chain, an image that cannot be opened,
    rows made with other settings, a missing key, an endpoint that cannot be reached or
    stays busy, and one that refuses several samples in a row.
    """
    out = Path(out)
    for sample in samples:
        if not sample.cot:
            raise ValueError(
                f"sample {sample.id} is single-image (cot=False) and takes no chain; "
                "leave it out"
            )
    found = _recorded(out, teacher)
    missing = [sample for sample in samples if sample.id not in found]
    facts = summary(list(found.values()), teacher)
    kept, cost, refused = facts["kept"], facts["cost"], 0
    bar = tqdm(total=len(samples), initial=len(samples) - len(missing), unit="sample")
    try:
        with bar:
            # no client, and so no key, for a file that is finished
            for row in _rows(missing, teacher, others or {}) if missing else ():
                refused = refused + 1 if row["refused"] else 0
                if refused == _MOST_REFUSED:
                    raise ValueError(
                        f"{teacher.base_url} refused {refused} samples in a row: "
                        f"{row['refused']}; check model {teacher.model!r} and settings"
                    )
                io.append_jsonl(out, row)
                found[row["id"]] = row
                kept += row["chosen"] is not None
                cost += teacher.cost(row["tokens"])
                bar.set_postfix(kept=kept, cost=f"{cost:.2f}")
                bar.update()
    except openai.APIError as error:
        raise ValueError(
            f"{teacher.base_url}, model {teacher.model!r}: {error}; what is finished "
            f"is in {out}: correct the cause and run again"
        ) from error
    return [found[sample.id] for sample in samples]


def summary(rows: Sequence[Mapping[str, Any]], teacher: Teacher) -> dict[str, Any]:
    """Counts over rows: samples, kept, refused, prompt_tokens, new_tokens, cost."""
    tokens = [sum(row["tokens"][i] for row in rows) for i in (0, 1)]
    return {
        "samples": len(rows),
        "kept": sum(row["chosen"] is not None for row in rows),
        "refused": sum(bool(row["refused"]) for row in rows),
        "prompt_tokens": tokens[0],
        "new_tokens": tokens[1],
        "cost": teacher.cost(tokens),
    }


def with_chains(
    samples: Sequence[GroundingSample], rows: Sequence[Mapping[str, Any]]
) -> list[GroundingSample]:
    """The samples something was chosen for, with the chosen chain in place."""
    kept = []
    for sample, row in zip(samples, rows, strict=True):
        if row["chosen"] is not None:
            text = row["candidates"][row["chosen"]]["text"]
            kept.append(replace(sample, chain=checks.thinking_of(text)))
    return kept

"""Chains from a teacher behind any OpenAI-compatible endpoint.

A vLLM server, Qwen-VL-Max and `univg_nb.cot.stand_in` all speak this protocol. For each
sample the teacher writes candidates, `checks.check_chain` drops the unsound, and of
what is left the teacher selects one (docs/paper_facts.md#chains). The file of results
has one JSON line for each sample, so an interrupted run continues where it stopped and
repeats only the requests that were in flight.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from tqdm.auto import tqdm

from univg_nb import io
from univg_nb.cot import checks
from univg_nb.data.images import check_images, load_data_url
from univg_nb.data.sample import GroundingSample

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MAX_REFUSED = 5  # in a row: then the request is wrong, not a sample


@dataclass(frozen=True)
class Teacher:
    """Where the teacher is and how it is asked. Holds no secret."""

    base_url: str  # as the openai client takes it: "http://127.0.0.1:8000/v1"
    model: str  # its name at the endpoint
    # Environment variable with the key. A server on this machine needs none.
    key_variable: str = "OPENAI_API_KEY"
    candidates: int = 3  # replies drawn for each sample, as in the paper
    concurrency: int = 8  # samples at work at once
    temperature: float = 0.9  # of the candidates; the selection is greedy
    max_tokens: int = 1024  # limit on new tokens of a reply
    # Of a request that met a busy or failing server. The waits grow to 8 s, or are what
    # the server asks for.
    retries: int = 6
    timeout: float = 120.0  # seconds that a request may take
    max_pixels: int = 1_003_520  # larger images are sent smaller
    # Of a million prompt tokens and of a million new tokens, in any currency.
    price: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name in ("candidates", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"Teacher: {name} is {getattr(self, name)}; give 1 or more"
                )

    @property
    def fingerprint(self) -> str:
        """A hash of all that changes the replies: model, sampling, prompts."""
        sampling = (self.model, self.candidates, self.temperature, self.max_tokens)
        prompts = (checks.TEACHER, checks.STEPS, checks.SELECTOR)
        return io.config_hash([sampling, self.max_pixels, prompts])

    def compute_cost(self, tokens: Sequence[int]) -> float:
        """Return the cost of (prompt, new) tokens."""
        return sum(n * p for n, p in zip(tokens, self.price, strict=True)) / 1e6


def make_client(teacher: Teacher) -> openai.OpenAI:
    """Return the openai client, with its key from the environment.

    Raises ValueError if there is none and the endpoint is not on this machine.
    """
    is_local = urlsplit(teacher.base_url).hostname in _LOOPBACK
    key = os.environ.get(teacher.key_variable) or ("none" if is_local else "")
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
        # A proxy of the environment does not lead to this machine.
        http_client=openai.DefaultHttpxClient(trust_env=False) if is_local else None,
    )


# Asks the teacher: text of the prompt, temperature and seed give the reply.
Ask = Callable[[str, float, int], str]


def _draw_row(
    ask: Ask, teacher: Teacher, sample: GroundingSample, others: str
) -> dict[str, Any]:
    """Return candidates, selector and chosen of one sample; see `write_chains`.

    What fails the checks is never selected, so the selector is asked only where it has
    a choice; if it names none of the replies, the first is taken.
    """
    row: dict[str, Any] = {"candidates": [], "selector": "", "chosen": None}
    prompt = checks.make_teacher_prompt(sample, others)
    for number in range(teacher.candidates):
        text = ask(prompt, teacher.temperature, number)
        problems = [problem.kind for problem in checks.check_chain(sample, text)]
        row["candidates"].append({"text": text, "problems": problems})
    sound = [n for n, c in enumerate(row["candidates"]) if not c["problems"]]
    if len(sound) > 1:
        texts = [row["candidates"][n]["text"] for n in sound]
        row["selector"] = ask(checks.make_selector_prompt(sample, texts), 0.0, 0)
    if sound:
        selection = checks.parse_selection(row["selector"], len(sound))
        row["chosen"] = sound[selection or 0]
    return row


def write_chain(
    ask: Callable[[GroundingSample, str, int], str],
    sample: GroundingSample,
    teacher: Teacher,
) -> dict[str, Any]:
    """Return the row of one sample from a teacher in this process, without HTTP.

    The row is that of `write_chains`, without tokens. `ask` gives the reply to sample,
    prompt and seed, such as `StandInTeacher.reply`. Of the teacher's settings only
    `candidates` counts; the others are for the record.
    """
    checks.require_chain(sample)
    row = _draw_row(lambda text, _, seed: ask(sample, text, seed), teacher, sample, "")
    return {"id": sample.id, "made_with": teacher.fingerprint, "refused": ""} | row


def _request_row(
    client: openai.OpenAI, teacher: Teacher, sample: GroundingSample, others: str
) -> dict[str, Any]:
    """Return the row of one sample from an endpoint, as `write_chains` describes it."""
    urls = [load_data_url(p, sample.id, teacher.max_pixels) for p in sample.images]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    tokens = [0, 0]
    row: dict[str, Any] = {"id": sample.id, "made_with": teacher.fingerprint}
    row |= {"candidates": [], "selector": "", "chosen": None, "refused": ""}

    def ask(text: str, temperature: float, seed: int) -> str:
        content: Any = [*images, {"type": "text", "text": text}]
        answer = client.chat.completions.create(
            model=teacher.model,
            messages=[{"role": "user", "content": content}],
            temperature=temperature,
            max_tokens=teacher.max_tokens,
            seed=seed,
        )
        if answer.usage is not None:
            tokens[0] += answer.usage.prompt_tokens
            tokens[1] += answer.usage.completion_tokens
        return answer.choices[0].message.content or ""

    try:
        row |= _draw_row(ask, teacher, sample, others)
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        row["refused"] = str(error)[:300]
    return row | {"tokens": tokens}


def _read_rows(path: Path, teacher: Teacher) -> dict[str, dict[str, Any]]:
    """Return rows by sample id; ValueError if they were made with other settings."""
    rows = io.read_jsonl(path) if path.is_file() else []
    for number, row in enumerate(rows, start=1):
        if row.get("made_with") != teacher.fingerprint:
            raise ValueError(
                f"{path}, line {number}: made with another model, sampling or prompt "
                "than is asked for now; use another file name or delete the file"
            )
    return {row["id"]: row for row in rows}


def _generate_rows(
    samples: Sequence[GroundingSample], teacher: Teacher, others: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Yield rows in the order in which they are finished."""
    pool = ThreadPoolExecutor(teacher.concurrency)
    try:
        with make_client(teacher) as client:
            futures = [
                pool.submit(_request_row, client, teacher, s, others.get(s.id, ""))
                for s in samples
            ]
            for future in as_completed(futures):
                yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def write_chains(
    samples: Sequence[GroundingSample],
    out: str | os.PathLike[str],
    teacher: Teacher,
    others: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Ask the teacher about every sample that the file has no row of yet.

    A progress bar shows time left, the samples that kept a chain, and the cost. `out`
    is a JSONL file; `others` has other turns by sample id, as from
    `checks.collect_other_turns`.

    Returns:
        One row for each sample, in their order: id, candidates (text, problems),
        selector (its reply), chosen (index or None), refused (why the endpoint would
        not answer), tokens (prompt, new), made_with.

    Raises:
        ValueError: for a sample that takes no chain, an id of two samples, an image
            that cannot be opened, rows made with other settings, a missing key, an
            endpoint that cannot be reached or stays busy, and one that refuses several
            samples in a row; and if another process writes to the file.
    """
    out = Path(out)
    known: dict[str, GroundingSample] = {}
    for sample in samples:
        checks.require_chain(sample)
        if (other := known.setdefault(sample.id, sample)) != sample:
            raise ValueError(
                f"{other.source} and {sample.source} have the same id {sample.id!r}, "
                "and chains are kept by id: give each sample its own"
            )
    with io.locked(out):
        found = _read_rows(out, teacher)
        missing = [sample for sample in samples if sample.id not in found]
        check_images(missing)
        totals = summarize(list(found.values()), teacher)
        kept, cost, refused = totals["kept"], totals["cost"], 0
        bar = tqdm(
            total=len(samples), initial=len(samples) - len(missing), unit="sample"
        )
        try:
            with bar:
                # No client, and so no key, for a file that is finished.
                rows = _generate_rows(missing, teacher, others or {}) if missing else ()
                for row in rows:
                    refused = refused + 1 if row["refused"] else 0
                    if refused == _MAX_REFUSED:
                        raise ValueError(
                            f"{teacher.base_url} refused {refused} samples in a row: "
                            f"{row['refused']}; check model {teacher.model!r} and "
                            "settings"
                        )
                    io.append_jsonl(out, row)
                    found[row["id"]] = row
                    kept += row["chosen"] is not None
                    cost += teacher.compute_cost(row["tokens"])
                    bar.set_postfix(kept=kept, cost=f"{cost:.2f}")
                    bar.update()
        except openai.APIError as error:
            raise ValueError(
                f"{teacher.base_url}, model {teacher.model!r}: {error}; what is "
                f"finished is in {out}: correct the cause and run again"
            ) from error
        return [found[sample.id] for sample in samples]


def summarize(rows: Sequence[Mapping[str, Any]], teacher: Teacher) -> dict[str, Any]:
    """Return counts over rows: samples, kept, refused, tokens, and the cost."""
    tokens = [sum(row["tokens"][i] for row in rows) for i in (0, 1)]
    return {
        "samples": len(rows),
        "kept": sum(row["chosen"] is not None for row in rows),
        "refused": sum(bool(row["refused"]) for row in rows),
        "prompt_tokens": tokens[0],
        "new_tokens": tokens[1],
        "cost": teacher.compute_cost(tokens),
    }


def insert_chains(
    samples: Sequence[GroundingSample], rows: Sequence[Mapping[str, Any]]
) -> list[GroundingSample]:
    """Return the samples that have a chosen chain, with that chain.

    `rows` holds the row of each sample, from `write_chains`. Raises ValueError if it
    belongs to another sample, or its sample has changed since.
    """
    kept = []
    for sample, row in zip(samples, rows, strict=True):
        if row["chosen"] is not None:
            text = row["candidates"][row["chosen"]]["text"]
            wrong = [p for p in checks.check_chain(sample, text) if p.kind == "answer"]
            if wrong or row["id"] != sample.id:
                raise ValueError(
                    f"sample {sample.id} ({sample.source}): the chain of {row['id']!r} "
                    f"was written for another question or box ({text[-60:]!r}); write "
                    "it again, into a new file"
                )
            kept.append(replace(sample, chain=checks.extract_thinking(text)))
    return kept

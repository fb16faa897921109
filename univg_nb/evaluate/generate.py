"""Recorded replies of a model: batched by length and resumable.

One row of `predictions.jsonl` per reply: {"index": i, "response": "...", "id": ...,
"tokens": n, "truncated": bool}; `index` is the item's position in the records file, and
"sample": k is added when several replies per item are drawn. Beside it,
`predictions.settings.json` holds what the replies depend on; a run resumes only under
equal settings. Several processes share the work by batches, each with a file of its own
(`predictions.part-0-of-8.jsonl`); the last to finish puts them together. torch is
imported when a reply is made: scoring does without.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from univg_nb import io
from univg_nb.data.images import missing_images
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate.predictions import settings_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from univg_nb.evaluate.served import Served

Cell = tuple[int, int]  # (index of the item, number of its reply)


class OtherSettings(ValueError):
    """A predictions file that was made under other settings, or under unknown ones."""


def generate(
    model: PreTrainedModel | Served,
    processor: ProcessorMixin,
    samples: Sequence[GroundingSample],
    out: str | Path,
    *,
    style: str = "univg",
    max_new_tokens: int = 256,
    batch_size: int = 64,
    temperature: float = 0.0,
    num_return_sequences: int = 1,
    seed: int = 0,
    indices: Iterable[int] | None = None,
    facts: dict | None = None,
    fresh: bool = False,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> dict:
    """Write a reply to every sample (or to `indices`) into the JSONL file `out`.

    `model` is one in this process, or one that a vLLM server holds (served.Served).
    temperature 0 is greedy. Above 0, `num_return_sequences` replies per item are
    sampled, each from its own noise fixed by (seed, index, k): neither the batch size
    nor a restart changes them. `facts` (names of model and records, say) are recorded
    with the settings but not compared: weights and items are, by their hashes. What
    `out` already holds is kept; `fresh` starts over. `shard` (k, n) makes every n-th
    batch from the k-th on; the n processes need nothing else from each other, and `out`
    is the file a single process would have written, once all have finished.

    Returns {"replies", "new", "truncated", "tokens", "seconds"}: replies now recorded
    (of this shard), and what this call made. Raises ValueError for a missing image, for
    an `out` made under other settings (OtherSettings), and for options out of range.
    """
    _check_options(max_new_tokens, batch_size, temperature, num_return_sequences)
    number, count = shard
    if not 0 <= number < count:
        raise ValueError(f"shard {number} of {count}: count from 0, as 0/{count}")
    wanted = _wanted(samples, indices)
    from univg_nb.fast.sampling import noise_seed

    made_by, reply = _model(model, processor)
    used = {
        "style": style,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "num_return_sequences": num_return_sequences,
        "seed": seed if temperature > 0 else None,
        "image_size": dict(processor.image_processor.size),
        "items_hash": _items_hash(samples),
    } | made_by
    whole = Path(out)
    out = part_path(whole, *shard)
    if fresh:
        for path in {out, whole}:
            path.unlink(missing_ok=True)
            settings_path(path).unlink(missing_ok=True)
    done = _recorded(whole, used).keys() | _recorded(out, used).keys()
    everything = plan_batches(
        processor, samples, wanted, style, batch_size, num_return_sequences
    )
    mine = everything[number::count]
    # A batch cut short by a kill is made anew in its old company, and only its missing
    # rows are added: the file ends up as if nothing had happened.
    plan = [batch for batch in mine if not done.issuperset(batch)]
    if not out.is_file():
        io.write_json(settings_path(out), used | (facts or {}))
        io.write_text(out, "")
    began = time.perf_counter()
    rows: list[dict] = []
    with tqdm(
        total=sum(map(len, plan)), desc=out.parent.name, disable=not progress
    ) as bar:
        for batch in plan:
            made = reply(
                [samples[i] for i, _ in batch],
                style=style,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seeds=[noise_seed(seed, i, k) for i, k in batch],
            )
            for (i, k), one in zip(batch, made, strict=True):
                if (i, k) in done:
                    continue
                row = {"index": i, "id": samples[i].id} | dataclasses.asdict(one)
                if num_return_sequences > 1:
                    row["sample"] = k
                io.append_jsonl(out, row)
                rows.append(row)
            bar.update(len(batch))
    if count > 1:
        _join(whole, count, everything, used)
    recorded = _recorded(whole, used) | _recorded(out, used)
    ours = {cell for batch in mine for cell in batch}
    kept = [row for cell, row in recorded.items() if count == 1 or cell in ours]
    return {
        "replies": len(kept),
        "new": len(rows),
        "truncated": sum(row["truncated"] for row in kept),
        "tokens": sum(r["tokens"] for r in rows),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _model(
    model: PreTrainedModel | Served, processor: ProcessorMixin
) -> tuple[dict, Callable[..., list]]:
    """What identifies a model among the settings, and how it is asked."""
    from univg_nb import models
    from univg_nb.evaluate import replies
    from univg_nb.evaluate.served import Served

    if isinstance(model, Served):
        return model.settings(), partial(model.reply, processor)
    weights = [models.weights_hash(model), models.weights_hash(model, adapter=True)]
    known = {"attention": model.config._attn_implementation, "weights_hash": weights}
    return known, partial(replies.reply, model, processor)


def _check_options(
    max_new_tokens: int, batch_size: int, temperature: float, replies: int
) -> None:
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
        ("num_return_sequences", replies),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if replies > 1 and temperature == 0:
        raise ValueError(
            f"num_return_sequences={replies} greedy replies would be equal; "
            "set a temperature above 0"
        )


def _wanted(
    samples: Sequence[GroundingSample], indices: Iterable[int] | None
) -> list[int]:
    """The indices to answer, in order; each must exist and have its images."""
    wanted = sorted(set(range(len(samples)) if indices is None else indices))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < len(samples):
        raise ValueError(
            f"indices {wanted[0]}..{wanted[-1]} reach beyond the {len(samples)} samples"
        )
    missing = missing_images(samples, wanted)
    if missing:
        index, path = next(iter(missing.items()))
        raise ValueError(
            f"{len(missing)} of {len(wanted)} items lack an image, first item "
            f"{samples[index].id!r} (index {index}): {path} does not exist; set the "
            "image root, or leave these items out with --allow-missing"
        )
    return wanted


def _items_hash(samples: Sequence[GroundingSample]) -> str:
    """Identifies the records' content; image folders may differ from place to place."""
    return io.config_hash([(s.id, s.task, s.question, s.answer) for s in samples])


def part_path(out: str | Path, number: int, count: int) -> Path:
    """The file of one of `count` processes; `out` itself if there is only one."""
    out = Path(out)
    if count == 1:
        return out
    return out.with_suffix(f".part-{number}-of-{count}{out.suffix}")


def _recorded(out: Path, used: dict) -> dict[Cell, dict]:
    """The rows `out` already holds, {} without such a file.

    Raises OtherSettings unless they were made under the settings `used`.
    """
    if not out.is_file():
        return {}
    beside = settings_path(out)
    if not beside.is_file():
        raise OtherSettings(
            f"{out} exists without {beside.name}, so what made it is unknown; "
            "choose another file, or replace it with --fresh"
        )
    before = io.read_json(beside)
    differ = [k for k in used if before.get(k) != used[k]]
    if differ:
        key = differ[0]
        raise OtherSettings(
            f"{out} was made under other settings ({', '.join(differ)}): "
            f"{key} = {before.get(key)!r} there, now {used[key]!r}; choose another "
            "file, or replace it with --fresh"
        )
    return {(row["index"], row.get("sample", 0)): row for row in io.read_jsonl(out)}


def _join(whole: Path, count: int, plan: list[list[Cell]], used: dict) -> None:
    """Write `whole` from the parts, if all of them are there.

    Every process tries; those that finish together write the same file.
    """
    parts = [part_path(whole, number, count) for number in range(count)]
    if not all(path.is_file() for path in parts):
        return
    rows = _recorded(whole, used)
    for path in parts:
        rows |= _recorded(path, used)
    cells = [cell for batch in plan for cell in batch]
    if not rows.keys() >= set(cells):
        return
    cells += rows.keys() - set(cells)  # items that an earlier run was asked for
    io.write_json(settings_path(whole), io.read_json(settings_path(parts[0])))
    lines = [json.dumps(rows[cell], ensure_ascii=False) + "\n" for cell in cells]
    io.write_text(whole, "".join(lines))


def plan_batches(
    processor: ProcessorMixin,
    samples: Sequence[GroundingSample],
    indices: Sequence[int],
    style: str,
    batch_size: int,
    num_return_sequences: int = 1,
) -> list[list[tuple[int, int]]]:
    """Batches of cells (index, k), items of like length together to waste no padding.

    Image tokens are foretold from the files' headers. Depends on all of `indices`, not
    on what is done, so that a resumed run makes the same batches.
    """
    from univg_nb.evaluate.replies import prompt_text
    from univg_nb.train.collator import expected_tokens

    texts = [prompt_text(processor, samples[i], style) for i in indices]
    lengths = (
        [len(ids) for ids in processor.tokenizer(texts).input_ids] if texts else []
    )
    sizes: dict[str, int] = {}
    for i in indices:
        for path in samples[i].images:
            if path not in sizes:
                sizes[path] = expected_tokens(path, processor, samples[i].id)
    order = sorted(
        (length + sum(sizes[path] for path in samples[i].images), i)
        for i, length in zip(indices, lengths, strict=True)
    )
    cells = [(i, k) for _, i in order for k in range(num_return_sequences)]
    return [cells[a : a + batch_size] for a in range(0, len(cells), batch_size)]

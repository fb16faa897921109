"""Recorded replies of a model: batched by length and resumable.

One row of `predictions.jsonl` per reply: {"index": i, "response": "...", "id": ...,
"tokens": n, "truncated": bool}; `index` is the item's position in the records file, and
"sample": k is added when several replies per item are drawn. Beside it,
`predictions.settings.json` holds what the replies depend on; a run resumes only under
equal settings. torch is imported when a reply is made: scoring does without.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from univg_nb import runs
from univg_nb.samples import GroundingSample
from univg_nb.scoring import read_predictions, settings_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


def generate(
    model: PreTrainedModel,
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
    progress: bool = True,
) -> dict:
    """Write a reply to every sample (or to `indices`) into the JSONL file `out`.

    temperature 0 is greedy. Above 0, `num_return_sequences` replies per item are
    sampled, each from its own noise fixed by (seed, index, k): neither the batch size
    nor a restart changes them. `facts` (names of model and records, say) are recorded
    with the settings but not compared: weights and items are, by their hashes. What
    `out` already holds is kept; `fresh` starts over.

    Returns {"replies", "new", "truncated", "tokens", "seconds"}; the last two are those
    of this call. Raises ValueError for a missing image, for an `out` made under other
    settings, and for options out of range.
    """
    _check_options(max_new_tokens, batch_size, temperature, num_return_sequences)
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
    from univg_nb.models import weights_hash
    from univg_nb.replies import noise_seed, reply

    used = {
        "style": style,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "num_return_sequences": num_return_sequences,
        "seed": seed if temperature > 0 else None,
        "attention": model.config._attn_implementation,
        "image_size": dict(processor.image_processor.size),
        "items_hash": _items_hash(samples),
        "weights_hash": [weights_hash(model), weights_hash(model, adapter=True)],
    }
    out = Path(out)
    done = _open_predictions(out, used, facts or {}, fresh)
    plan = plan_batches(
        processor, samples, wanted, style, batch_size, num_return_sequences
    )
    # A batch cut short by a kill is made anew in its old company, and only its missing
    # rows are added: the file ends up as if nothing had happened.
    plan = [batch for batch in plan if not done.issuperset(batch)]
    began = time.perf_counter()
    rows: list[dict] = []
    with tqdm(
        total=sum(map(len, plan)), desc=out.parent.name, disable=not progress
    ) as bar:
        for batch in plan:
            made = reply(
                model,
                processor,
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
                runs.append_jsonl(out, row)
                rows.append(row)
            bar.update(len(batch))
    return {
        "replies": len(done | {cell for batch in plan for cell in batch}),
        "new": len(rows),
        "truncated": sum(
            r.truncated for several in read_predictions(out).values() for r in several
        ),
        "tokens": sum(r["tokens"] for r in rows),
        "seconds": round(time.perf_counter() - began, 2),
    }


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


def missing_images(
    samples: Sequence[GroundingSample], indices: Iterable[int]
) -> dict[int, str]:
    """{index: its first image path that is no file}, where there is one."""
    known: dict[str, bool] = {}
    found: dict[int, str] = {}
    for i in indices:
        for path in samples[i].images:
            if path not in known:
                known[path] = Path(path).is_file()
            if not known[path]:
                found.setdefault(i, path)
    return found


def _items_hash(samples: Sequence[GroundingSample]) -> str:
    """Identifies the records' content; image folders may differ from place to place."""
    return runs.config_hash([(s.id, s.task, s.question, s.answer) for s in samples])


def _open_predictions(
    out: Path, used: dict, facts: dict, fresh: bool
) -> set[tuple[int, int]]:
    """Cells (index, k) that `out` already holds; checks or writes its settings."""
    beside = settings_path(out)
    if fresh:
        out.unlink(missing_ok=True)
        beside.unlink(missing_ok=True)
    if not out.is_file():
        runs.write_json(beside, used | facts)
        runs.write_text(out, "")
        return set()
    if not beside.is_file():
        raise ValueError(
            f"{out} exists without {beside.name}, so what made it is unknown; "
            "choose another file, or replace it with --fresh"
        )
    before = runs.read_json(beside)
    differ = [k for k in used if before.get(k) != used[k]]
    if differ:
        key = differ[0]
        raise ValueError(
            f"{out} was made under other settings ({', '.join(differ)}): "
            f"{key} = {before.get(key)!r} there, now {used[key]!r}; choose another "
            "file, or replace it with --fresh"
        )
    return {(row["index"], row.get("sample", 0)) for row in runs.read_jsonl(out)}


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
    from univg_nb.collator import expected_tokens
    from univg_nb.replies import prompt_text

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

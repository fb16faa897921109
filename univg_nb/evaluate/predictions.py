"""Recorded replies: the rows of `predictions.jsonl` and the settings beside them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from univg_nb.data.conventions import BoxConvention
from univg_nb.data.sample import GroundingSample
from univg_nb.io import config_hash, read_json, read_jsonl


@dataclass(frozen=True)
class Reply:
    """A reply of a model."""

    text: str  # without special tokens; boxes in thousandths, in the paper's notation
    truncated: bool = False  # it ended at the limit and not with an end token
    tokens: int = 0  # their number, the end token included; 0 if it was not recorded
    # From a file without settings, which `generate` did not write: nothing says in
    # which unit its boxes are.
    foreign: bool = False
    written: str = ""  # the model's own text where converting its boxes changed it


def convert_reply(
    reply: Reply, sample: GroundingSample, convention: BoxConvention
) -> Reply:
    """Return a model's reply to a sample as this project writes it."""
    text = convention.read(reply.text, convention.locate(sample))
    return (
        reply if text == reply.text else replace(reply, text=text, written=reply.text)
    )


def read_rows(path: str | Path) -> dict[int, dict[str, Any]]:
    """Read the rows of a predictions file into {index of the item: its row}, sorted.

    A file of JSON lines, as `generate` writes it, or one array. A last line cut short
    by a kill is left out; the next `generate` writes it again.

    Raises:
        ValueError: for a missing file, a malformed row or an index given twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such predictions file; run `generate` first")
    is_array, found = is_json_array(path), {}
    rows = read_json(path) if is_array else read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        where = f"{path}, {'row' if is_array else 'line'} {number}"
        known: dict[str, Any] = row if isinstance(row, dict) else {}
        index, text = known.get("index"), known.get("response")
        if type(index) is not int or index < 0 or not isinstance(text, str):
            raise ValueError(
                f'{where}: expected {{"index": i, "response": "..."}} with i >= 0, got '
                f"{str(row)[:80]}"
            )
        if index in found:
            raise ValueError(
                f"{where}: index {index} is predicted twice; two runs wrote into one "
                "file: generate it again with --fresh"
            )
        found[index] = row
    return dict(sorted(found.items()))


def is_json_array(path: Path) -> bool:
    """Return whether a file holds one JSON array and not a row in each line.

    Raises ValueError if it begins like neither.
    """
    with path.open("rb") as handle:
        start = handle.read(64).lstrip()
    if start[:1] not in (b"", b"[", b"{"):
        raise ValueError(
            f"{path} begins with {start[:16]!r}: no predictions, which are JSON lines; "
            "name the file that `generate` wrote"
        )
    return start.startswith(b"[")


def read_predictions(
    path: str | Path, items: Sequence[GroundingSample] | None = None
) -> dict[int, Reply]:
    """Read a predictions file into {index of the item: its reply}, sorted.

    Raises ValueError as `read_rows` does, or if the replies are not to `items`.
    """
    rows = read_rows(path)
    if items is not None:
        _check_items(Path(path), rows, items)
    foreign = not get_settings_path(path).is_file()
    return {
        index: Reply(
            row["response"], row.get("truncated", False), row.get("tokens", 0), foreign
        )
        for index, row in rows.items()
    }


def _check_items(
    path: Path, rows: Mapping[int, Mapping[str, Any]], items: Sequence[GroundingSample]
) -> None:
    remedy = "score with the records that were used, or generate the replies again"
    for index, row in rows.items():
        if index < len(items) and row.get("id", items[index].id) != items[index].id:
            raise ValueError(
                f"{path}: index {index} is {row['id']!r}, but {items[index].id!r} in "
                f"the records: these predictions belong to another file; {remedy}"
            )
    settings = read_generation_settings(path) or {}
    if settings.get("items_hash", made := hash_items(items)) != made:
        raise ValueError(
            f"{path}: generated for other questions or boxes than the records have, as "
            f"{get_settings_path(path).name} says; {remedy}"
        )


def hash_items(items: Sequence[GroundingSample]) -> str:
    """Return a hash of what is asked, without folders, which differ between places."""
    return config_hash([(s.id, s.task, s.question, s.answer) for s in items])


def get_settings_path(predictions: str | Path) -> Path:
    """Return the path of `predictions.settings.json` beside `predictions.jsonl`."""
    return Path(predictions).with_suffix(".settings.json")


def read_generation_settings(predictions: str | Path) -> dict[str, Any] | None:
    """Read what `generate` wrote beside a predictions file; None for other files."""
    path = get_settings_path(predictions)
    return read_json(path) if path.is_file() else None


def parse_named_files(arguments: Iterable[str]) -> dict[str, Path]:
    """Read "NAME=FILE" or "FILE" arguments into {name: file}, in the order given.

    Without a name, eval/MODEL/BENCHMARK/predictions.jsonl is called MODEL, another file
    by its stem. Raises ValueError for a name given twice.
    """
    found: dict[str, Path] = {}
    for text in arguments:
        is_named = "=" in text and not Path(text).is_file()
        name, _, file = text.partition("=") if is_named else ("", "", text)
        path = Path(file)
        if not name:
            in_run = path.name == "predictions.jsonl" and path.parent.parent.name
            name = in_run or path.stem
        if name in found:
            raise ValueError(f"two files are called {name!r}: write NAME={path}")
        found[name] = path
    return found

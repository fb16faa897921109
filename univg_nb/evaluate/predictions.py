"""Recorded replies: the rows of `predictions.jsonl` and the settings beside them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from univg_nb.io import read_json, read_jsonl


@dataclass(frozen=True)
class Reply:
    """One recorded reply; `truncated`: it used up its tokens without an end token."""

    text: str
    truncated: bool = False


def read_predictions(path: str | Path) -> dict[int, list[Reply]]:
    """Read `predictions.jsonl`.

    A last line cut short by a kill is left out; the next `generate` writes it again.

    Returns:
        {index of the item: its replies in sampling order, usually one}.

    Raises:
        ValueError: for a missing file, a malformed row or an index given twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such predictions file; run `generate` first")
    found: dict[int, dict[int, Reply]] = {}
    for line, row in enumerate(read_jsonl(path), start=1):
        _check_row(row, f"{path}, line {line}")
        replies = found.setdefault(row["index"], {})
        if row.get("sample", 0) in replies:
            raise ValueError(
                f"{path}, line {line}: index {row['index']} is predicted twice; two "
                "runs wrote into one file: generate it again with --fresh"
            )
        reply = Reply(row["response"], bool(row.get("truncated", False)))
        replies[row.get("sample", 0)] = reply
    return {i: [r[k] for k in sorted(r)] for i, r in sorted(found.items())}


def _check_row(row: Any, place: str) -> None:
    index = row.get("index") if isinstance(row, dict) else None
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ValueError(
            f'{place}: expected {{"index": i, "response": "..."}} with i >= 0, '
            f"got {str(row)[:80]}"
        )
    if not isinstance(row.get("response"), str):
        raise ValueError(f"{place}: item {index} has no text under 'response'")
    if not isinstance(row.get("sample", 0), int):
        raise ValueError(f"{place}: item {index}: 'sample' must be an integer")


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
    by its stem.

    Raises:
        ValueError: for a name given twice.
    """
    found: dict[str, Path] = {}
    for text in arguments:
        name, equals, rest = text.partition("=")
        path = Path(text if not equals or Path(text).is_file() else rest)
        if path == Path(text):
            in_run = path.name == "predictions.jsonl" and path.parent.parent.name
            name = path.parent.parent.name if in_run else path.stem
        if name in found:
            raise ValueError(f"two files are called {name!r}: write NAME={path}")
        found[name] = path
    return found

"""Recorded replies: the rows of `predictions.jsonl` and the settings beside them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from univg_nb.io import read_json, read_jsonl


@dataclass(frozen=True)
class Reply:
    """A reply of a model.

    Attributes:
        text: without special tokens.
        truncated: whether it ended at the limit and not with an end token.
        tokens: their number, the end token included; 0 if it was not recorded.
    """

    text: str
    truncated: bool = False
    tokens: int = 0


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
        if not _is_prediction(row):
            raise ValueError(
                f'{path}, line {line}: expected {{"index": i, "response": "..."}} with '
                f"i >= 0, got {str(row)[:80]}"
            )
        replies = found.setdefault(row["index"], {})
        number = row.get("sample", 0)
        if number in replies:
            raise ValueError(
                f"{path}, line {line}: index {row['index']} is predicted twice; two "
                "runs wrote into one file: generate it again with --fresh"
            )
        cut = bool(row.get("truncated", False))
        replies[number] = Reply(row["response"], cut, row.get("tokens", 0))
    return {i: [r[k] for k in sorted(r)] for i, r in sorted(found.items())}


def _is_prediction(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("response"), str):
        return False
    numbers = row.get("index"), row.get("sample", 0)
    return all(type(number) is int and number >= 0 for number in numbers)


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

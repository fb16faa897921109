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


def read_predictions(path: str | Path) -> dict[int, Reply]:
    """Read `predictions.jsonl` into {index of the item: its reply}, sorted.

    A last line cut short by a kill is left out; the next `generate` writes it again.

    Raises:
        ValueError: for a missing file, a malformed row or an index given twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such predictions file; run `generate` first")
    found: dict[int, Reply] = {}
    for line, row in enumerate(read_jsonl(path), start=1):
        known: dict[str, Any] = row if isinstance(row, dict) else {}
        index, text = known.get("index"), known.get("response")
        if type(index) is not int or index < 0 or not isinstance(text, str):
            raise ValueError(
                f'{path}, line {line}: expected {{"index": i, "response": "..."}} with '
                f"i >= 0, got {str(row)[:80]}"
            )
        if index in found:
            raise ValueError(
                f"{path}, line {line}: index {index} is predicted twice; two runs "
                "wrote into one file: generate it again with --fresh"
            )
        truncated, tokens = known.get("truncated", False), known.get("tokens", 0)
        found[index] = Reply(text, truncated, tokens)
    return dict(sorted(found.items()))


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

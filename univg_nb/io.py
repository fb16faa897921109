"""Files written whole: text, JSON, JSON lines, and hashes of contents."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------- files


def write_text(path: str | Path, text: str) -> None:
    """Write `text` so that `path` holds either the old or the whole new content."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False))


def read_json(path: str | Path) -> Any:
    """Read a JSON file; ValueError names the file and line if it is malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: malformed JSON ({error.msg}); "
            "repair the file or delete it and run its stage again"
        ) from error


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Append one row, after cutting off what an interrupted write left at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    with open(path, "a+b") as handle:
        end = handle.seek(0, os.SEEK_END)
        if end:
            handle.seek(end - 1)
            if handle.read(1) != b"\n":
                handle.seek(0)
                handle.truncate(handle.read().rfind(b"\n") + 1)
        handle.write(line)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All whole rows; a last line without its newline is a cut-off write: left out.

    Raises ValueError with file and line number for a malformed line elsewhere.
    """
    rows = []
    with open(path, encoding="utf-8", errors="replace") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.endswith("\n"):
                break
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: malformed JSON ({error.msg}); "
                    "delete the line or the file and run its stage again"
                ) from error
    return rows


def config_hash(obj: Any) -> str:
    """16 hex digits that change when any value in a JSON-like object changes."""
    text = json.dumps(obj, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file's bytes, as recorded in scores.json."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

"""Files written whole: text, JSON, JSON lines; assets read; hashes of contents."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

ASSETS = Path(__file__).parent / "assets"


@contextmanager
def open_atomically(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing that gets its name only when it is complete.

    The content goes to a temporary file in the same folder, which is renamed to `path`
    at the end of the `with` block and deleted if the block raises. So `path` holds
    either the old or the whole new content at any time. Missing folders are created.
    The mode is "w" for text in UTF-8 or "wb" for bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        encoding = None if "b" in mode else "utf-8"
        with temporary.open(mode, encoding=encoding) as handle:
            yield handle
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to a file in UTF-8, atomically."""
    with open_atomically(path) as handle:
        handle.write(text)


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False))


def _parse_json(text: str, path: str | Path, line: int = 1) -> Any:
    """Parse the text that begins in that line of a file, which an error names."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line + error.lineno - 1}: malformed JSON ({error.msg}); "
            "repair the file or delete it and run its stage again"
        ) from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file; ValueError names the file and line if it is malformed."""
    return _parse_json(Path(path).read_text(encoding="utf-8"), path)


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Append one row, after cutting off what an interrupted write left at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    with path.open("a+b") as handle:
        end = handle.seek(0, os.SEEK_END)
        if end:
            handle.seek(end - 1)
            if handle.read(1) != b"\n":
                handle.seek(0)
                handle.truncate(handle.read().rfind(b"\n") + 1)
        handle.write(line)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All whole rows; a last line without its newline is a cut-off write: left out."""
    rows = []
    with Path(path).open(encoding="utf-8", errors="replace") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.endswith("\n"):
                break
            rows.append(_parse_json(line.strip(), path, number))
    return rows


def read_asset(name: str) -> Any:
    """Return the content of a YAML file in `assets`; its lists become tuples."""
    return _freeze(yaml.safe_load((ASSETS / name).read_text(encoding="utf-8")))


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _freeze(entry) for key, entry in value.items()}
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def hash_text(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8 as 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def config_hash(obj: Any) -> str:
    """Return 16 hex digits that change when any value of a JSON-like object changes."""
    text = json.dumps(obj, sort_keys=True, ensure_ascii=False, default=str)
    return hash_text(text)[:16]


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def locked(path: str | Path, message: str) -> Iterator[IO[str]]:
    """Hold a lock file, open for appending; a child that inherits it holds it too.

    Raises ValueError with `message` if another process holds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(message) from error
        yield handle

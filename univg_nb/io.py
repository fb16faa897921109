"""Files written whole: text, JSON, JSON lines; locks, assets, hashes of contents."""

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

ASSETS = Path(__file__).parent / "assets"
HELD = "UNIVG_NB_LOCKS"  # in the environment: lock files that this process may pass


@contextmanager
def open_atomically(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing that gets its name only when it is complete.

    The content goes to a temporary file in the same folder, which is renamed to `path`
    at the end of the `with` block and deleted if the block raises. So `path` holds
    either the old or the whole new content at any time. Missing folders are created.
    The mode is "w" for text in UTF-8 or "wb" for bytes. What is no file, as /dev/null
    or a pipe, is written to directly.
    """
    path, encoding = Path(path), None if "b" in mode else "utf-8"
    if path.exists() and not path.is_file():
        with path.open(mode, encoding=encoding) as handle:
            yield handle
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open(mode, encoding=encoding) as handle:
            yield handle
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: str | Path) -> str:
    """Read a file of text in UTF-8; ValueError names it if it is something else."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error})") from error


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
    return _parse_json(read_text(path), path)


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Append one row to a file whose last line is ended first (`end_last_line`)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    end_last_line(path)
    with path.open("ab") as handle:
        handle.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def end_last_line(path: Path) -> None:
    """Give the last line of a JSONL file its newline, or cut off an unfinished one."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        if handle.read() == b"\n":
            return
        handle.seek(0)
        content = handle.read()
        start = content.rfind(b"\n") + 1
        if _is_whole_row(content[start:]):
            handle.write(b"\n")
        else:
            handle.truncate(start)


def _is_whole_row(line: bytes) -> bool:
    """Return whether a line without newline is an object, which no part of one is."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read all rows; a last line without newline counts if it is a whole object."""
    rows = []
    with Path(path).open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.endswith(b"\n") and not _is_whole_row(line):
                break
            text = line.decode(errors="replace").strip()
            if text:
                rows.append(_parse_json(text, path, number))
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


# ---------------------------------------------------------------- who writes where


@contextmanager
def locked(path: str | Path) -> Iterator[tuple[int, ...]]:
    """Let no other process work on a file or folder during the `with` block.

    `.NAME.lock` beside it is locked and says by whom. The system frees it when its
    holder ends, however it ends, so what a killed process left is taken over. The
    processes that the holder starts share it, and so do those of a distributed
    training, whose first process takes it.

    Yields the file descriptors (one or none) to hand to a process that may outlive this
    one (`pass_fds`): it holds the lock too then.

    Raises:
        ValueError: another process works there; says which and since when.
    """
    path = Path(path).resolve()
    lock = path.with_name(f".{path.name}.lock")
    held = os.environ.get(HELD, "")
    if str(lock) in held.split(os.pathsep) or int(os.environ.get("RANK", 0)):
        yield ()
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _take(lock, path) as handle:
        handle.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        handle.write(f"{socket.gethostname()}, process {os.getpid()}, since {since}\n")
        handle.flush()
        os.environ[HELD] = f"{held}{os.pathsep}{lock}"
        try:
            yield (handle.fileno(),)
        finally:
            os.environ[HELD] = held
            lock.unlink(missing_ok=True)


def _take(lock: Path, path: Path) -> IO[str]:
    """Return the lock file of `path`, open and locked."""
    while True:
        handle = lock.open("a+", encoding="utf-8")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            who = handle.read().strip() or "another process"
            handle.close()
            raise ValueError(
                f"{path}: {who} works on it; wait until that ends or end it, or choose "
                "another place"
            ) from error
        except OSError as error:  # a file system without locks
            print(f"{lock}: {error.strerror}; another writer would not be noticed")
            return handle
        with suppress(FileNotFoundError):  # its last holder removes it
            if os.path.samestat(os.fstat(handle.fileno()), lock.stat()):
                return handle
        handle.close()


def set_aside(path: Path, target: Path) -> None:
    """Move a file or folder to `target`, or to TARGET.1, .2, ... if there is one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free, number = target, 0
    while free.exists():
        number += 1
        free = target.with_name(f"{target.name}.{number}")
    path.replace(free)
    print(f"{path.name}: what was there is kept in {free}")

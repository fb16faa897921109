"""Whole files of samples: read, stream, write, and the audit's command line.

    python -m univg_nb audit FILE --image-root DIR

Files are JSON arrays or JSON lines. Formats: `ALL_FORMATS`; schemas in PF sec. 2.3, 9.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from univg_nb.data.boxes import GRID
from univg_nb.data.rows import Place, RowError, training_box
from univg_nb.data.sample import GroundingSample
from univg_nb.data.zero_shot_formats import ALL_FORMATS

__all__ = [
    "ALL_FORMATS",
    "GroundingSample",
    "RowError",
    "detect_format",
    "iter_rows",
    "iter_samples",
    "read",
    "write",
]

_CHUNK = 1 << 18  # bytes read at once
_MAX_ROW = 1 << 24  # a "row" longer than this is a file without an end
_COMMA = re.compile(r"[ \t\r\n]*+,[ \t\r\n]*+")
_DECODE = json.JSONDecoder().raw_decode

# What makes a row of each format: shown when detection gives up.
_EXPECTED = {
    "stage1_cotsft": "conversations or messages with <answer> in the reply; images",
    "stage2_rl": f"images, question, answer as four numbers 0-{GRID}",
    "mgrounding": "conversations with <|box_start|> in a reply, type; images",
    "mig_bench": "task, images, question, answer, additional_info, need_format",
    "mig_bench_revised": f"as mig_bench, answers 0-{GRID} (read as mig_bench too)",
    "lisa": "image_path, instruction, boxes",
    "llmseg": "image_path, question, bbox",
    "reasonvos": "image_list, question, bbox_list",
    "revos": "video_id, frames, question, bbox_list",
    "refcoco": "image, problem, solution",
}


def detect_format(row: dict[str, Any], where: str = "row") -> str:
    """The format of a file by the keys of a row; ``where`` it is, for the message.

    Raises ValueError listing what was expected when the keys fit none or several.
    """
    keys = set(row)
    found = []
    if keys & {"conversations", "messages"}:
        turns = json.dumps(row.get("conversations", row.get("messages")))
        if "type" in keys or ("<|box_start|>" in turns and "<answer>" not in turns):
            found.append("mgrounding")
        if keys & {"task", "cot"} or "<answer>" in turns or "messages" in keys:
            found.append("stage1_cotsft")
    if keys >= {"images", "question", "answer"}:
        answer = row["answer"] if isinstance(row["answer"], list) else []
        numeric = [v for v in answer if isinstance(v, int | float)]
        if keys & {"additional_info", "need_format"}:
            found.append("mig_bench")
        elif numeric and not (max(numeric) <= 2 and "task" in keys):
            found.append("stage2_rl")
    for name, needed in (
        ("lisa", {"image_path", "instruction", "boxes"}),
        ("llmseg", {"image_path", "question", "bbox"}),
        ("reasonvos", {"image_list", "question", "bbox_list"}),
        ("revos", {"video_id", "frames", "question", "bbox_list"}),
        ("refcoco", {"image", "problem", "solution"}),
    ):
        if keys >= needed:
            found.append(name)
    if len(found) != 1:
        expected = "".join(f"\n  {k}: {v}" for k, v in _EXPECTED.items())
        raise ValueError(
            f"{where}: its keys {sorted(keys)} fit {found or 'no format'}; "
            f"pass format=, one of:{expected}"
        )
    return found[0]


class _Scanner:
    """JSON values out of a stream of UTF-8, of which only a few chunks are held.

    Decoded chunk by chunk here: a text file of Python's does it in many small steps.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path = stream, path
        self.text = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.buffer, self.at, self.row = "", 0, 0
        self.gone = 0  # characters forgotten

    def error(self, problem: str) -> RowError:
        return RowError(
            "bad_json",
            f"{self.path}, row {self.row}: {problem}; expected a JSON array of objects "
            "or one object a line, whole and in UTF-8",
        )

    def more(self, chunks: int = 1) -> bool:
        """Append what comes next, forgetting what was used; False at the end."""
        chunk = self.stream.read(chunks * _CHUNK)
        try:
            text = self.text(chunk, not chunk)
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8 ({error})") from error
        if text:
            self.gone += self.at
            self.buffer, self.at = self.buffer[self.at :] + text, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def value(self) -> dict[str, Any]:
        """The object that begins here."""
        try:
            value, self.at = _DECODE(self.buffer, self.at)
        except (ValueError, RecursionError):
            value = self._cut_value()
        if type(value) is not dict:
            raise self.error(f"{value!r:.60} is not an object")
        self.row += 1
        return value

    def _cut_value(self) -> Any:
        """The value that begins here, which is broken or cut by the chunk's end."""
        chunks = 1
        while True:
            try:
                value, self.at = _DECODE(self.buffer, self.at)
                return value
            except RecursionError as error:
                raise self.error("nested too deeply") from error
            except ValueError as error:
                long = len(self.buffer) - self.at > _MAX_ROW
                if long or not self.more(chunks):
                    raise self.error(self._what(error)) from error
                chunks *= 2  # a long row is not parsed anew at every chunk

    def _what(self, error: ValueError) -> str:
        if not isinstance(error, json.JSONDecodeError):
            return str(error)
        # where in the file; the decoder knows only where in the buffer
        return f"{error.msg} at character {self.gone + error.pos}"

    def comma(self) -> bool:
        """Go past a comma and blanks; False, and not moved, if no comma comes next."""
        found = _COMMA.match(self.buffer, self.at)
        if found is None:
            if self.peek() != ",":
                return False
            found = _COMMA.match(self.buffer, self.at)
        self.at = found.end()
        if self.at == len(self.buffer):
            self.peek()
        return True


def iter_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The raw rows of a JSON array or JSON-lines file, one at a time.

    Memory stays at a few chunks however long the file. Raises ValueError naming file,
    row and position for a missing file, broken JSON or a row that is no object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path or build the data")
    with open(path, "rb") as stream:
        scan = _Scanner(stream, path)
        first = scan.peek()
        if first == "[":
            yield from _array(scan)
        elif first == "{":
            while scan.peek():
                yield scan.value()
        else:
            raise scan.error(f"{first!r} begins the file" if first else "empty file")


def _array(scan: _Scanner) -> Iterator[dict[str, Any]]:
    scan.at += 1  # the bracket
    more = scan.peek() != "]"
    while more:
        yield scan.value()
        more = scan.comma()
    if (mark := scan.peek()) != "]":
        raise scan.error(f"{mark!r} where a comma or ] belongs")
    scan.at += 1
    if rest := scan.peek():
        raise scan.error(f"{rest!r} after the closing bracket")


def _check_name(name: str) -> None:
    if name not in ALL_FORMATS:
        raise ValueError(f"format {name!r} is unknown; use one of {list(ALL_FORMATS)}")


def iter_samples(
    path: str | os.PathLike[str],
    format: str | None = None,
    image_root: str | os.PathLike[str] | None = None,
) -> Iterator[GroundingSample]:
    """Samples of a file, one at a time; memory does not grow with the file.

    Args:
        format: one of `ALL_FORMATS`; None detects it from the first row.
        image_root: joined to relative image paths (PF T7: really used).

    Raises ValueError naming file, row and remedy for the first row that cannot be used.
    Boxes outside their range are errors in training files and are clipped in
    benchmarks; `univg_nb.data.audit` lists all of either.
    """
    if format is not None:
        _check_name(format)
    root = os.fspath(image_root) if image_root is not None else None
    place = Place(os.fspath(path), image_root=root)
    read_row = ALL_FORMATS[format].read if format else None
    for place.row, row in enumerate(iter_rows(path)):
        if read_row is None:
            name = detect_format(row, f"{place.file}, row {place.row}")
            read_row = ALL_FORMATS[name].read
        yield from read_row(row, place)


def read(
    path: str | os.PathLike[str],
    format: str | None = None,
    image_root: str | os.PathLike[str] | None = None,
) -> list[GroundingSample]:
    """All samples of a file; see `iter_samples`."""
    return list(iter_samples(path, format, image_root))


def write(
    samples: Iterable[GroundingSample],
    path: str | os.PathLike[str],
    format: str,
    image_root: str | os.PathLike[str] | None = None,
) -> int:
    """Write samples as a file of this format; returns how many.

    Reading it back with the same image_root gives equal samples: what the format has no
    place for (id, task, cot, chain, boxes) goes to extra keys the released loaders do
    not look at. Image paths below image_root are written relative to it. One row a
    line; ".jsonl" in the name makes JSON lines. Written to a temporary name first.

    Raises ValueError for an unknown format or a sample it cannot hold.
    """
    _check_name(format)
    path = Path(path)
    root = os.fspath(image_root) if image_root is not None else None
    place = Place(os.fspath(path), image_root=root)
    lines = path.suffix == ".jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as out:
            out.write("" if lines else "[")
            for sample in samples:
                place.row = count
                if ALL_FORMATS[format].training:
                    training_box(sample.answer, place)
                row = ALL_FORMATS[format].write(sample, place)
                out.write("" if lines else ",\n" if count else "\n")
                out.write(json.dumps(row, ensure_ascii=False))
                out.write("\n" if lines else "")
                count += 1
            out.write("" if lines else "\n]\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


if __name__ == "__main__":
    from univg_nb.data.audit import main

    sys.exit(main(sys.argv[1:]))

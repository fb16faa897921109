"""Read, stream and write whole files of samples.

Files are JSON arrays or JSON lines. Formats: `ALL_FORMATS`; schemas:
docs/paper_facts.md#files. `python -m univg_nb audit FILE` checks a file.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from univg_nb import io
from univg_nb.data.boxes import GRID
from univg_nb.data.formats import (
    Format,
    RowContext,
    RowError,
    StrPath,
    parse_training_box,
)
from univg_nb.data.sample import GroundingSample
from univg_nb.data.zero_shot_formats import ALL_FORMATS

_CHUNK = 1 << 14  # bytes read at once; the events of more leave a processor's cache
_MAX_DEPTH = 100  # rows have a depth of four
# ijson's events
_STARTS = frozenset(("start_map", "start_array"))
_ENDS = frozenset(("end_map", "end_array"))
# An escape in a JSON string; "lone" is half of a surrogate pair without the other.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<lone>u[dD][89a-fA-F]..)|.)", re.DOTALL
)
_LONGEST_ESCAPE = 12  # bytes, of a pair
# Keys that make a row of each format; shown when detection fails.
_EXPECTED = {
    "stage1_cotsft": "conversations or messages with <answer> in the reply; images",
    "stage2_rl": f"images, question, answer as four numbers 0-{GRID}",
    "mgrounding": "conversations with <|box_start|> in a reply, type; images",
    "mig_bench": "task, images, question, answer, additional_info, need_format",
    "lisa": "image_path, instruction, boxes",
    "llmseg": "image_path, question, bbox",
    "reasonvos": "image_list, question, bbox_list",
    "revos": "video_id, frames, question, bbox_list",
    "refcoco": "image, problem, solution",
}


def detect_format(row: dict[str, Any], where: str = "row") -> str:
    """Return the format of a file by the keys of one of its rows.

    Raises a ValueError that names `where` and lists what was expected if the keys fit
    no format or several.
    """
    keys = set(row)
    zero_shot = ("lisa", "llmseg", "reasonvos", "revos", "refcoco")
    found = [n for n in zero_shot if keys >= set(_EXPECTED[n].split(", "))]
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
    if len(found) == 1:
        return found[0]
    expected = "".join(f"\n  {k}: {v}" for k, v in _EXPECTED.items())
    problem = f"its keys {sorted(keys)} fit {found or 'no format'}"
    raise ValueError(f"{where}: {problem}; pass format=, one of:{expected}")


class _Marked:
    """A stream of JSON in which half of a surrogate pair reads as U+FFFF.

    ijson would make a question mark of it, which nobody could tell from a typed one.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream

    def read(self, size: int) -> bytes:
        """Return at least `size` bytes if there are so many; no escape is cut."""
        data = more = self.stream.read(size)
        while more and b"\\" in data[-_LONGEST_ESCAPE:]:
            data += (more := self.stream.read(_LONGEST_ESCAPE))
        if b"\\ud" not in data and b"\\uD" not in data:
            return data
        return _ESCAPE.sub(lambda m: rb"\uffff" if m["lone"] else m[0], data)


def _build_rows(stream: BinaryIO, level: int) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that stand `level` containers deep.

    ijson's own builder takes any depth and lets a repeated key replace the first; here
    both raise ValueError, and so does a row that is no object.
    """
    marked, several = _Marked(stream), level == 0
    events = ijson.basic_parse(
        marked, buf_size=_CHUNK, use_float=True, multiple_values=several
    )
    stack: list[Any] = []  # the containers around `top`
    top: Any = []  # the container that is being filled
    key = ""
    for event, value in events:
        if event == "map_key":
            if value in top:
                raise ValueError(f"key {value!r} appears twice in one object")
            key = value
        elif event in _ENDS:
            top = stack.pop()
            if len(stack) == level:
                yield top.pop()
        elif event in _STARTS:
            if len(stack) == level and event == "start_array":
                raise ValueError("an array is not an object")
            new: Any = {} if event == "start_map" else []
            if type(top) is dict:
                top[key] = new
            else:
                top.append(new)
            stack.append(top)
            top = new
            if len(stack) > _MAX_DEPTH:
                raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")
        elif type(top) is dict:
            top[key] = value
        elif len(stack) > level:
            top.append(value)
        else:
            raise ValueError(f"{value!r:.60} is not an object")


def iter_rows(path: StrPath) -> Iterator[dict[str, Any]]:
    """Yield the raw rows of a JSON array or JSON-lines file in UTF-8.

    Memory does not grow with the file.

    Raises:
        ValueError: the file is missing, the JSON is broken or nested too deeply, a row
            is no object or holds a key twice; names file and row.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path or build the data")
    number = 0
    with path.open("rb") as stream:
        try:
            if stream.peek(3).startswith(codecs.BOM_UTF8):
                stream.read(3)
            while stream.peek(1)[:1].isspace():
                stream.read(1)
            first = stream.peek(1)[:1]
            if first not in (b"[", b"{"):
                begin = f"{first.decode(errors='replace')!r} begins the file"
                raise ValueError(begin if first else "empty file")
            for row in _build_rows(stream, level=int(first == b"[")):
                yield row
                number += 1
        except (ValueError, ijson.JSONError) as error:
            # ijson's with the text around the broken place; Unicode's begins otherwise
            is_coding = isinstance(error, UnicodeError)
            text = str(error) if is_coding else error.args[0]
            text = text if isinstance(text, str) else text.decode(errors="replace")
            problem = " ".join(text.partition("(right here)")[0].split())
            problem += "; expected an array of objects or an object a line, whole"
            raise RowError("bad_json", f"{path}, row {number}: {problem}") from error


def _get_format(name: str) -> Format:
    if name not in ALL_FORMATS:
        raise ValueError(f"format {name!r} is unknown; use one of {list(ALL_FORMATS)}")
    return ALL_FORMATS[name]


def iter_samples(
    path: StrPath,
    format: str | None = None,
    image_root: StrPath | None = None,
    *,
    training: bool = False,
) -> Iterator[GroundingSample]:
    """Yield the samples of a file; memory does not grow with the file.

    Boxes outside their range are errors in training files and are clipped in
    benchmarks; `univg_nb.data.audit` lists all of either.

    Args:
        path: the file; ValueError with file, row and remedy if a row cannot be used.
        format: one of `ALL_FORMATS`; None detects it from the first row.
        image_root: folder that relative image paths are joined to.
        training: also refuse what can be evaluated and not trained on: the few boxes
            without area that benchmarks hold.
    """
    entry = _get_format(format) if format else None
    context = RowContext(path, image_root)
    for context.row, row in enumerate(iter_rows(path)):
        entry = entry or ALL_FORMATS[detect_format(row, context.place)]
        context.doubts.clear()
        yield from entry.read(row, context)
        if training and (wrong := [d for d in context.doubts if not d.clipped]):
            raise wrong[0]


def read(
    path: StrPath,
    format: str | None = None,
    image_root: StrPath | None = None,
    *,
    training: bool = False,
) -> list[GroundingSample]:
    """Return all samples of a file; arguments and errors as in `iter_samples`."""
    return list(iter_samples(path, format, image_root, training=training))


def write(
    samples: Iterable[GroundingSample],
    path: StrPath,
    format: str,
    image_root: StrPath | None = None,
) -> int:
    """Write samples as a file, atomically, one row a line; return their number.

    Reading the file with the same image_root gives equal samples: what the format has
    no place for (id, task, cot, chain, boxes, target_image) goes to extra keys that the
    released loaders do not look at.

    Args:
        samples: what to write.
        path: the file; a name that ends in ".jsonl" makes JSON lines, else an array.
        format: one of `ALL_FORMATS`; ValueError if it cannot hold a sample.
        image_root: image paths below this folder are written relative to it.
    """
    entry, context = _get_format(format), RowContext(path, image_root)
    lines = Path(path).suffix == ".jsonl"
    count = 0
    with io.open_atomically(Path(path)) as out:
        out.write("" if lines else "[\n")
        for context.row, sample in enumerate(samples):
            if entry.training:
                parse_training_box(sample.answer, context)
            row = json.dumps(entry.write(sample, context), ensure_ascii=False)
            out.write(",\n" if count and not lines else "")
            out.write(row + "\n" * lines)
            count += 1
        out.write("" if lines else "\n]\n")
    return count

"""What is in a data file, and what in it would break or bias training or evaluation.

python -m univg_nb audit FILE --image-root DIR
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from univg_nb.data.files import detect_format, iter_rows
from univg_nb.data.images import image_tokens, open_image
from univg_nb.data.prompts import user_text
from univg_nb.data.rows import Place, RowError
from univg_nb.data.sample import IMAGE_MARKER, GroundingSample
from univg_nb.data.zero_shot_formats import ALL_FORMATS

_BOX_KINDS = ("box_out_of_range", "box_inverted", "box_degenerate")
_HASH_SIDE = 16
_HASH_NEAR = 10  # of 256 bits: re-encoded or rescaled copies, not similar scenes
_CHARS_PER_TOKEN = 3  # low on purpose: English has about four in Qwen2's tokenizer


@dataclass
class _State:
    """What is gathered while the rows of one file go by."""

    place: Place
    format: str
    decode: bool
    max_pixels: int
    tasks: Counter[str] = field(default_factory=Counter)
    per_item: Counter[int] = field(default_factory=Counter)
    problems: list[dict[str, Any]] = field(default_factory=list)
    seen: dict[int, tuple[int, str]] = field(default_factory=dict)
    images: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    hashes: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    samples: int = 0
    no_sample: int = 0

    def add(self, kind: str, severity: str, sample_id: str, detail: str) -> None:
        row = self.place.row
        self.problems.append(
            {
                "kind": kind,
                "severity": severity,
                "row": row,
                "id": sample_id,
                "detail": detail,
            }
        )


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """Difference hash: 256 bits as 4 uint64; copies of a picture differ in few bits."""
    gray = image.convert("L").resize((_HASH_SIDE + 1, _HASH_SIDE))
    pixels = np.asarray(gray, dtype=np.int16)  # (16, 17)
    bits = pixels[:, 1:] > pixels[:, :-1]  # (16, 16)
    return np.packbits(bits).view(np.uint64)  # (4,)


def _read_row(row: dict[str, Any], state: _State) -> list[GroundingSample]:
    """Samples of a row; every problem of reading it noted on the way.

    A bad box of a benchmark is noted, and the row then read as evaluation reads it.
    """
    entry, place = ALL_FORMATS[state.format], state.place
    for place.strict in (True, False):
        try:
            return list(entry.read(row, place))
        except RowError as error:
            clipped = error.kind == "box_out_of_range" and not entry.training
            severity = "warning" if clipped else "error"
            problem = str(error).removeprefix(f"{place.file}, row {place.row}: ")
            state.add(error.kind, severity, str(row.get("id", "")), problem)
            if entry.training or error.kind not in _BOX_KINDS:
                break
    return []


def _check_image(path: str, sample: GroundingSample, state: _State) -> None:
    if path in state.images:
        return
    state.images[path] = None
    try:
        image = open_image(path, sample.id)
    except ValueError as error:
        kind = "image_corrupt" if os.path.isfile(path) else "image_missing"
        state.add(kind, "error", sample.id, str(error))
        return
    state.images[path] = image.size
    state.hashes[path] = perceptual_hash(image)


def _check_sample(sample: GroundingSample, state: _State, max_tokens: int) -> None:
    state.samples += 1
    state.tasks[sample.task or "(none)"] += 1
    state.per_item[len(sample.images)] += 1
    key = hash((sample.images, sample.question))
    if key in state.seen:
        row, name = state.seen[key]
        detail = f"same images and question as row {row} ({name})"
        state.add("duplicate", "warning", sample.id, detail)
    state.seen.setdefault(key, (state.place.row, sample.id))
    tokens = -(-len(user_text(sample)) // _CHARS_PER_TOKEN)
    for path in sample.images:
        if state.decode:
            _check_image(path, sample, state)
        size = state.images.setdefault(path, None)
        # unknown size: the most an image can take
        side = int(state.max_pixels**0.5)
        width, height = size or (side, side)
        tokens += image_tokens(width, height, max_pixels=state.max_pixels)
    state.tokens.append(tokens)
    if tokens > max_tokens:
        detail = f"about {tokens} prompt tokens, more than {max_tokens}"
        state.add("over_token_budget", "error", sample.id, detail)


def _gather(
    path: Path, format: str | None, root: str | None, max_pixels: int, max_tokens: int
) -> _State:
    place = Place(os.fspath(path), image_root=root, strict=True)
    state = _State(place, format or "", root is not None, max_pixels)
    try:
        for place.row, row in enumerate(iter_rows(path)):
            if not state.format:
                state.format = detect_format(row, f"{place.file}, row {place.row}")
            markers = str(row.get("question", "")).count(IMAGE_MARKER)
            named = row.get("images")
            if markers and isinstance(named, list) and markers != len(named):
                detail = f"{markers} {IMAGE_MARKER} markers for {len(named)} images"
                state.add("marker_mismatch", "warning", str(row.get("id", "")), detail)
            found = _read_row(row, state)
            state.no_sample += not found
            for sample in found:
                _check_sample(sample, state, max_tokens)
    except RowError as error:  # the file itself is broken from here on
        state.add(error.kind, "error", "", str(error))
    return state


def _name(path: str) -> str:
    """Last two parts of a path: enough to tell datasets' images apart."""
    return "/".join(path.split("/")[-2:])


def _near(ours: _State, theirs: _State) -> Iterator[tuple[str, str, int]]:
    """(our image, their image, differing bits) of near-identical pictures."""
    if not ours.hashes or not theirs.hashes:
        return
    names = list(theirs.hashes)
    table = np.stack(list(theirs.hashes.values()))  # (N, 4)
    for path, value in ours.hashes.items():
        if not value.any():
            continue  # a flat picture is like every other flat picture
        distance = np.bitwise_count(table ^ value).sum(axis=1)  # (N,)
        best = int(distance.argmin())
        if distance[best] <= _HASH_NEAR:
            yield path, names[best], int(distance[best])


def _leakage(ours: _State, theirs: _State) -> None:
    other = {_name(p) for p in theirs.images}
    for path in ours.images:
        if _name(path) in other:
            detail = f"{path} is named in {theirs.place.file} too"
            ours.add("leak_by_name", "warning", "", detail)
    for path, twin, bits in _near(ours, theirs):
        detail = f"{path} looks like {twin} of {theirs.place.file} ({bits}/256 bits)"
        ours.add("leak_by_picture", "warning", "", detail)


def audit(
    path: str | os.PathLike[str],
    format: str | None = None,
    image_root: str | os.PathLike[str] | None = None,
    *,
    against: Sequence[str | os.PathLike[str]] = (),
    max_tokens: int = 6000,
    max_pixels: int = 401_408,
) -> dict[str, Any]:
    """Go through a file and list everything wrong with it, without raising on rows.

    Args:
        image_root: where the images lie; None checks everything but the images.
        against: other files (the test set) to look for shared images in, by name and,
            where the images are at hand, by perceptual hash.
        max_tokens: budget of a prompt, image tokens included (PF sec. 3: 6000).
        max_pixels: the processor's limit, for the image tokens.

    Returns a JSON-ready report: rows, samples, rows_without_sample, tasks,
    images_per_item, prompt_tokens, images, counts (by kind), problems (kind, severity,
    row, id, detail) and breaks_training: whether any problem is an error. A box without
    area is one in a benchmark too, though its item is read: no answer can hit it, and
    trained on it would teach nothing. One that leaves the image is clipped: a warning.
    Raises ValueError for a missing file or a format that cannot be told.
    """
    root = os.fspath(image_root) if image_root is not None else None
    if root is not None and not os.path.isdir(root):
        raise ValueError(f"image root {root} is no folder; check --image-root")
    for file in (path, *against):
        if not os.path.isfile(file):
            raise ValueError(f"{file}: no such file; check the path")
    state = _gather(Path(path), format, root, max_pixels, max_tokens)
    for other in against:
        _leakage(state, _gather(Path(other), None, root, max_pixels, max_tokens))
    counts = Counter(p["kind"] for p in state.problems)
    return {
        "file": os.fspath(path),
        "format": state.format,
        "rows": state.place.row + 1 if state.samples or state.no_sample else 0,
        "samples": state.samples,
        "rows_without_sample": state.no_sample,
        "tasks": dict(state.tasks.most_common()),
        "images_per_item": dict(sorted(state.per_item.items())),
        "prompt_tokens": {
            "median": median(state.tokens) if state.tokens else 0,
            "max": max(state.tokens, default=0),
        },
        "images": {
            "distinct": len(state.images),
            "checked": root is not None,
            "usable": sum(size is not None for size in state.images.values()),
        },
        "counts": dict(counts.most_common()),
        "problems": state.problems,
        "breaks_training": any(p["severity"] == "error" for p in state.problems),
    }


def table(report: dict[str, Any], show: int = 5) -> str:
    """The report as text; ``show`` examples of each kind of problem."""
    images, tokens = report["images"], report["prompt_tokens"]
    checked = f"{images['usable']} usable" if images["checked"] else "not checked"
    lines = [
        f"{report['file']}: {report['format']}",
        f"  rows {report['rows']}, samples {report['samples']}, "
        f"rows without a sample {report['rows_without_sample']}",
        f"  images {images['distinct']} ({checked}); prompt tokens about "
        f"{tokens['median']:g} (median), {tokens['max']} (most)",
    ]
    for title, key in (("task", "tasks"), ("images per item", "images_per_item")):
        lines += ["", f"  {title:<28}{'samples':>9}"]
        lines += [f"  {name!s:<28}{n:>9}" for name, n in report[key].items()]
    lines += ["", f"  {'problem':<28}{'count':>9}"]
    for kind, n in report["counts"].items():
        mine = [p for p in report["problems"] if p["kind"] == kind]
        lines.append(f"  {kind:<28}{n:>9}  ({mine[0]['severity']})")
        lines += [f"    row {p['row']}: {p['detail']}" for p in mine[:show]]
        lines += [f"    … {n - show} more"] if n > show else []
    lines += [] if report["counts"] else ["  none"]
    verdict = "would break training" if report["breaks_training"] else "usable"
    return "\n".join([*lines, "", f"  verdict: {verdict}"])


def main(argv: Sequence[str]) -> int:
    """Command line; 0 if the file is usable, 1 if not, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m univg_nb.data.files")
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("audit", help="check a data file")
    sub.add_argument("file")
    sub.add_argument("--image-root", help="folder of the images; without it unchecked")
    sub.add_argument("--format", choices=list(ALL_FORMATS))
    sub.add_argument("--against", nargs="*", default=[], help="test files, for leakage")
    sub.add_argument("--max-tokens", type=int, default=6000)
    sub.add_argument("--max-pixels", type=int, default=401_408)
    sub.add_argument("--out", help="write the report here as JSON")
    sub.add_argument("--show", type=int, default=5, help="examples of each problem")
    args = parser.parse_args(argv)
    try:
        report = audit(
            args.file,
            args.format,
            args.image_root,
            against=args.against,
            max_tokens=args.max_tokens,
            max_pixels=args.max_pixels,
        )
    except ValueError as error:
        print(f"error: {error}")
        return 2
    if args.out:
        temporary = f"{args.out}.{os.getpid()}.tmp"
        text = json.dumps(report, indent=1, ensure_ascii=False)
        Path(temporary).write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, args.out)
    print(table(report, args.show))
    return int(report["breaks_training"])

"""What is in a data file, and what in it would break or bias training or evaluation."""

import os.path
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from univg_nb import io
from univg_nb.config import make_parser, output_file, within
from univg_nb.data.files import detect_format, iter_rows
from univg_nb.data.formats import RowContext, RowError, StrPath
from univg_nb.data.images import estimate_image_tokens, open_image
from univg_nb.data.prompts import (
    COT_SUFFIX,
    SINGLE_IMAGE_PREFIX,
    reply_text,
    user_text,
)
from univg_nb.data.sample import IMAGE_MARKER, GroundingSample, find_target_image
from univg_nb.data.zero_shot_formats import ALL_FORMATS

_HASH_SIDE = 16
_HASH_NEAR = 10  # of 256 bits: re-encoded or rescaled copies, not similar scenes
_REQUESTS = (COT_SUFFIX, SINGLE_IMAGE_PREFIX)
_CHARS_PER_TOKEN = 3  # low on purpose: English has about four in Qwen2's tokenizer


class _FileScan:
    """What is gathered while the rows of one file go by."""

    def __init__(
        self, context: RowContext, format: str, max_pixels: int, max_tokens: int
    ) -> None:
        self.context, self.format = context, format
        self.max_pixels, self.max_tokens = max_pixels, max_tokens
        self.rows = self.rows_without_sample = 0
        self.tasks: Counter[str] = Counter()
        self.images_per_item: Counter[int] = Counter()
        self.target_images: Counter[str] = Counter()
        self.problems: list[dict[str, Any]] = []
        self.seen: dict[int, tuple[int, str]] = {}
        self.ids: dict[str, tuple[int, int]] = {}  # row and content
        self.images: dict[str, tuple[int, int] | None] = {}
        self.hashes: dict[str, np.ndarray] = {}
        self.tokens: list[int] = []
        try:
            for self.context.row, row in enumerate(iter_rows(context.file)):
                self.check_row(row)
                self.rows += 1
        except RowError as error:  # the file itself is broken from here on
            self.context.row = self.rows
            self.add(error.kind, str(error), error=True)
        if not self.tokens and not self.has_errors():
            detail = "the file holds no sample; check that it is the right one"
            self.add("no_samples", detail, error=True)

    def has_errors(self) -> bool:
        return any(problem["severity"] == "error" for problem in self.problems)

    def add(self, kind: str, detail: str, id: str = "", error: bool = False) -> None:
        severity = "error" if error else "warning"
        problem = {"kind": kind, "severity": severity, "row": self.context.row}
        self.problems.append(problem | {"id": id, "detail": detail})

    def check_row(self, row: dict[str, Any]) -> None:
        context, row_id = self.context, str(row.get("id", ""))
        self.format = self.format or detect_format(row, context.place)
        entry = ALL_FORMATS[self.format]
        markers = str(row.get("question", "")).count(IMAGE_MARKER)
        named = row.get("images")
        if markers and isinstance(named, list) and markers != len(named):
            detail = f"{markers} {IMAGE_MARKER} markers for {len(named)} images"
            self.add("marker_mismatch", detail, row_id)
        context.doubts, samples = [], []
        try:
            samples = list(entry.read(row, context))
        except RowError as error:
            context.doubts.append(error)
        for doubt in context.doubts:
            detail = str(doubt).removeprefix(f"{context.place}: ")
            self.add(doubt.kind, detail, row_id, error=not doubt.clipped)
        self.rows_without_sample += not samples
        for sample in samples:
            self.check_sample(sample)

    def check_sample(self, sample: GroundingSample) -> None:
        self.tasks[sample.task or "(none)"] += 1
        self.images_per_item[len(sample.images)] += 1
        target = "unknown" if find_target_image(sample) is None else "inferred"
        self.target_images["given" if sample.target_image else target] += 1
        key = hash((sample.images, sample.question))
        if key in self.seen:
            row, name = self.seen[key]
            detail = f"same images and question as row {row} ({name})"
            self.add("duplicate", detail, sample.id)
        self.seen.setdefault(key, (self.context.row, sample.id))
        self.check_texts(sample)
        tokens = -(-len(user_text(sample)) // _CHARS_PER_TOKEN)
        side = int(self.max_pixels**0.5)
        for path in sample.images:
            if path not in self.images:
                self.images[path] = self.check_image(path, sample.id)
            # an image of unknown size takes the most that an image can take
            width, height = self.images[path] or (side, side)
            tokens += estimate_image_tokens(width, height, self.max_pixels)
        self.tokens.append(tokens)
        if tokens > self.max_tokens:
            detail = f"about {tokens} prompt tokens, more than {self.max_tokens}"
            self.add("over_token_budget", detail, sample.id, error=True)

    def check_texts(self, sample: GroundingSample) -> None:
        content = hash((sample.images, sample.question, sample.answer))
        row, other = self.ids.setdefault(sample.id, (self.context.row, content))
        if content != other:
            detail = f"same id as row {row}; chains are kept by id: give each its own"
            self.add("duplicate_id", detail, sample.id)
        if any(text.strip() in sample.question for text in _REQUESTS):
            detail = "the question holds the request that every prompt gets; remove it"
            self.add("request_twice", detail, sample.id)
        if self.format == "stage1_cotsft":
            try:
                reply_text(sample)
            except ValueError as error:
                self.add("no_chain", str(error), sample.id, error=True)

    def check_image(self, path: str, sample_id: str) -> tuple[int, int] | None:
        """Return the size of an image and keep its hash; None if it is not read."""
        if self.context.image_root is None:
            return None
        try:
            image = open_image(path, sample_id)
        except ValueError as error:
            # Path.is_file fails on a name that is too long to be one.
            there = os.path.isfile(path)  # noqa: PTH113
            kind = "image_corrupt" if there else "image_missing"
            self.add(kind, str(error), sample_id, error=True)
            return None
        self.hashes[path] = _compute_hash(image)
        return image.size


def _compute_hash(image: Image.Image) -> np.ndarray:
    """Return a difference hash: 256 bits as 4 uint64, of which copies differ in few."""
    gray = image.convert("L").resize((_HASH_SIDE + 1, _HASH_SIDE))
    pixels = np.asarray(gray, dtype=np.int16)  # (16, 17)
    bits = pixels[:, 1:] > pixels[:, :-1]  # (16, 16)
    return np.packbits(bits).view(np.uint64)  # (4,)


def _check_leakage(ours: _FileScan, theirs: _FileScan) -> None:
    """Note images that both files name, or that look alike."""
    file = theirs.context.file
    if broken := [p for p in theirs.problems if p["severity"] == "error"]:
        detail = f"{len(broken)} errors in {file} (see its own audit), first "
        detail += f"row {broken[0]['row']}: {broken[0]['kind']}"
        ours.add("leak_unknown", f"{detail}; what is broken there is not compared")
    names = {Path(path).parts[-2:] for path in theirs.images}  # folder and file
    for path in ours.images:
        if Path(path).parts[-2:] in names:
            ours.add("leak_by_name", f"{path} is named in {file} too")
    twins = list(theirs.hashes)
    table = np.array(list(theirs.hashes.values()), np.uint64).reshape(-1, 4)  # (N, 4)
    for path, value in ours.hashes.items():
        if not twins or not value.any():
            continue  # a flat picture is like every other flat picture
        distance = np.bitwise_count(table ^ value).sum(axis=1)  # (N,)
        best = int(distance.argmin())
        if distance[best] <= _HASH_NEAR:
            detail = f"{path} looks like {twins[best]} of {file}"
            ours.add("leak_by_picture", f"{detail} ({distance[best]}/256 bits)")


def audit(
    path: StrPath,
    format: str | None = None,
    image_root: StrPath | None = None,
    *,
    against: Sequence[StrPath] = (),
    max_tokens: int = 6000,
    max_pixels: int = 401_408,
) -> dict[str, Any]:
    """Go through a file and list everything wrong with it, without raising on rows.

    A box without area is an error in a benchmark too, though its item is read: no
    answer can hit it. A benchmark's box that leaves the image is clipped: a warning.

    Args:
        path: the file; ValueError if it is missing or its format cannot be told.
        format: one of `ALL_FORMATS`; None detects it from the first row.
        image_root: folder of the images; None checks everything but the images.
        against: other files (the test set) in which to look for shared images, by name
            and, where the images are at hand, by perceptual hash.
        max_tokens: budget of a prompt, image tokens included
            (docs/paper_facts.md#training-configuration).
        max_pixels: the processor's limit, for the image tokens.

    Returns:
        A JSON-ready report: file, format, rows, samples, rows_without_sample, tasks,
        images_per_item, target_images (given by the file, inferred, unknown),
        prompt_tokens, images, counts (by kind), problems (kind, severity, row, id,
        detail) and breaks_training: whether any problem is an error.
    """
    if image_root is not None and not Path(image_root).is_dir():
        raise ValueError(f"image root {image_root} is no folder; check --image-root")
    for file in (path, *against):
        if not Path(file).is_file():
            raise ValueError(f"{file}: no such file; check the path")
    context = RowContext(path, image_root)
    scan = _FileScan(context, format or "", max_pixels, max_tokens)
    for file in against:
        other = _FileScan(RowContext(file, image_root), "", max_pixels, max_tokens)
        _check_leakage(scan, other)
    counts = Counter(problem["kind"] for problem in scan.problems)
    tokens = scan.tokens or [0]
    return {
        "file": context.file,
        "format": scan.format,
        "rows": scan.rows,
        "samples": len(scan.tokens),
        "rows_without_sample": scan.rows_without_sample,
        "tasks": dict(scan.tasks.most_common()),
        "images_per_item": dict(sorted(scan.images_per_item.items())),
        "target_images": dict(scan.target_images.most_common()),
        "prompt_tokens": {"median": median(tokens), "max": max(tokens)},
        "images": {
            "distinct": len(scan.images),
            "checked": image_root is not None,
            "usable": sum(size is not None for size in scan.images.values()),
        },
        "counts": dict(counts.most_common()),
        "problems": scan.problems,
        "breaks_training": scan.has_errors(),
    }


def render_table(report: dict[str, Any], examples: int = 5) -> str:
    """Return the report of `audit` as text, with `examples` problems of each kind."""
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
        lines += [f"    row {p['row']}: {p['detail']}" for p in mine[:examples]]
        lines += [f"    … {n - examples} more"] if n > examples else []
    lines += [] if report["counts"] else ["  none"]
    verdict = "would break training" if report["breaks_training"] else "usable"
    return "\n".join([*lines, "", f"  verdict: {verdict}"])


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 1 if the file would break training, else 0."""
    parser = make_parser(
        "audit",
        __doc__ or "",
        "stage2_rl.json --image-root images",
    )
    parser.add_argument("path", metavar="FILE")
    parser.add_argument("--image-root", help="folder of the images; else unchecked")
    parser.add_argument("--format", choices=list(ALL_FORMATS))
    parser.add_argument("--against", nargs="*", default=[], help="test files (leakage)")
    parser.add_argument("--max-tokens", type=within(int, 1), default=6000)
    parser.add_argument("--max-pixels", type=within(int, 1), default=401_408)
    parser.add_argument("--out", type=output_file, help="write the report here as JSON")
    parser.add_argument(
        "--show", type=within(int, 0), default=5, help="examples of each problem"
    )
    options = vars(parser.parse_args(arguments))
    out, examples = options.pop("out"), options.pop("show")
    report = audit(**options)
    if out:
        io.write_json(out, report)
    print(render_table(report, examples))
    return int(report["breaks_training"])

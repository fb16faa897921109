"""Fill the measured tables of README.md from a run: `... study.readme runs/tiny`.

Everything between ``<!-- name -->`` and ``<!-- /name -->`` is replaced: ``results``
by the run's result table, ``minutes`` by the time of each notebook, ``base`` by the
evaluation of the shipped model, ``bench`` by what `make bench` measured of an update,
``reference`` by what `study.reference` found over seeds and in a longer training. No
number in them is typed. The pictures of README are drawn too.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from univg_nb.fast.packed_rows import block_mask
from univg_nb.figures import drawing
from univg_nb.io import read_json, write_text
from univg_nb.launch.notebooks import read_notebook
from univg_nb.minimig import items
from univg_nb.models import ASSETS
from univg_nb.runs import repo_root

ROOT = repo_root()
PICTURE = ROOT / "notebooks" / "images" / "minimig.png"
MASK_PICTURE = ROOT / "notebooks" / "images" / "shared_prefix.png"
REFERENCES = ROOT / "notebooks" / "reference_runs"
SHOWN = (("common_object", 4), ("reasoning", 4), ("correspondence", 4))


def fill(text: str, name: str, content: str) -> str:
    """Return `text` with the part called `name` replaced; ValueError without it."""
    marks = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(
        f"({re.escape(marks[0])}).*?({re.escape(marks[1])})", re.DOTALL
    )
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"README needs one part between {marks[0]} and {marks[1]}")
    return pattern.sub(lambda found: f"{found[1]}\n{content.strip()}\n{found[2]}", text)


def format_table(header: str, rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; the names of its columns are separated by "|"."""
    lines = [f"| {header} |", "|" + "---|" * (header.count("|") + 1)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def format_minutes(run_dir: Path) -> str:
    """Return a table of the notebooks: title, and minutes from the manifest."""
    ran = read_json(run_dir / "manifest.json")["notebooks"]
    rows, total = [], 0.0
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        seconds = ran.get(path.stem, {}).get("seconds")
        title = read_notebook(path).cells[0].source.splitlines()[0].lstrip("# ")
        shown = "" if seconds is None else f"{seconds / 60:.1f}"
        rows.append((f"[{path.stem}](notebooks/{path.name})", title, shown))
        total += seconds or 0.0
    rows.append(("all", "", f"{total / 60:.1f}"))
    return format_table("notebook | what it does | minutes", rows)


def format_base() -> str:
    """Return what the shipped base model can do, from its committed evaluation."""
    rows = []
    for name, row in read_json(ASSETS / "evaluation.json")["tests"].items():
        low, high = (f"{100 * end:.1f}" for end in row["ci_05"])
        rows.append((name, row["n"], f"{100 * row['acc_05']:.1f}", f"{low} to {high}"))
    header = "test on held-out scenes | items | Acc@0.5 | 95 % interval"
    return format_table(header, rows)


def format_difference(
    found: dict[str, Any], intervals: Sequence[str], factor: float, form: str
) -> list[str]:
    """Return a mean difference and its intervals, each as the text of a cell."""
    cells = [f"{factor * found['mean_diff']:{form}}"]
    for name in intervals:
        ends = [f"{factor * end:{form}}" for end in found[name] or ()]
        cells.append(" to ".join(ends) or "one seed")
    return cells


def format_reference() -> str:
    """Return differences between GRPO trainings, from the committed reference runs."""
    rows = []
    for path in sorted(REFERENCES.glob("*_tiny.json"), reverse=True):
        for pair, found in read_json(path)["comparisons"].items():
            both = ("items_95", "seeds_95")
            cells = format_difference(found["expected_iou"], both, 1, "+.3f")
            cells += format_difference(found["hit"], both[:1], 100, "+.1f")
            rows.append((path.stem, pair, *cells))
    header = "run | difference | sampled: expected IoU | over items | over seeds "
    return format_table(header + "| greedy: points | over items", rows)


def format_bench() -> str:
    """Return one update, TRL's trainer and ours, from the committed measurement."""
    measured = read_json(REFERENCES / "bench_grpo.json")
    rows = []
    pairs = zip(measured["rows"][::2], measured["rows"][1::2], strict=True)
    for stock, shared in pairs:
        assert (stock["way"], shared["way"]) == ("stock", "shared")
        case = [stock[key] for key in ("images", "prompt", "completion", "group")]
        case += [f"{row['seconds']['update']:.2f}" for row in (stock, shared)]
        rows.append(case + [row["peak_mb"] - row["base_mb"] for row in (stock, shared)])
    header = "images | prompt | reply | G | TRL, s | shared, s | TRL, MB | shared, MB"
    lines = [format_table(header, rows), ""]
    lines += [f"{measured['device']}, commit {measured['commit']}. Aimed at:", ""]
    for bar in measured["bars"]:
        verdict = "met" if bar["met"] else "not met"
        lines.append(
            f"- {bar['bar']} {bar['needed']}: {bar['measured']:.2f}, {verdict}"
        )
    short = measured["growth_of_short_replies"]
    lines += ["", f"With replies of {short['completion']} tokens, in proportion to the"]
    lines += [f"prompt as at full scale, the third is {short['ratio']:.2f}."]
    return "\n".join(lines)


def draw_mask(prompt: int = 8, replies: int = 3, length: int = 4) -> Image.Image:
    """Draw which token of a shared row (down) sees which (across): blue squares."""
    owner = [0] * prompt + [r + 1 for r in range(replies) for _ in range(length)]
    seen = block_mask(torch.tensor([owner]))[0]  # (T, T)
    side = 14
    sheet = Image.new("RGB", (len(owner) * side + 1,) * 2, "#d9d9d9")
    for row, column in torch.cartesian_prod(*(torch.arange(len(owner)),) * 2).tolist():
        color = drawing.BLUE if seen[row, column] else "white"
        corner = (column * side + 1, row * side + 1)
        sheet.paste(Image.new("RGB", (side - 1, side - 1), color), corner)
    return sheet


def draw_items() -> Image.Image:
    """Draw three MiniMIG items, a row each: their images, the true box in green."""
    side, gap = 256, 8
    rows = [items.make(task, 0, "val", index) for task, index in SHOWN]
    columns = max(len(item.images) for item in rows)
    size = (columns * (side + gap) - gap, len(rows) * (side + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for row, item in enumerate(rows):
        target = drawing.get_target_index(item.sample)
        for column, image in enumerate(item.images):
            marked = [(item.sample.answer, drawing.TARGET_COLOR, "")]
            image = drawing.draw_boxes(image, marked if column == target else [], side)
            sheet.paste(image, (column * (side + gap), row * (side + gap)))
    return sheet


def main(run_dir: Path) -> None:
    """Write the tables into README.md and draw its pictures."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    results = (run_dir / "tables" / "results.md").read_text(encoding="utf-8")
    for name, content in (
        ("results", results),
        ("minutes", format_minutes(run_dir)),
        ("bench", format_bench()),
        ("reference", format_reference()),
        ("base", format_base()),
    ):
        text = fill(text, name, content)
    write_text(readme, text)
    draw_mask().save(MASK_PICTURE, optimize=True)
    draw_items().save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

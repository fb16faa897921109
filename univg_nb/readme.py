"""Fills the measured tables of README.md from a run folder.

    python -m univg_nb.readme runs/tiny

Everything between ``<!-- name -->`` and ``<!-- /name -->`` is replaced: ``results``
by the run's result table, ``minutes`` by the time of each notebook, ``base`` by the
evaluation of the shipped model. No number in them is typed.
"""

import re
import sys
from pathlib import Path

from PIL import Image

from univg_nb import drawing
from univg_nb.minimig import items
from univg_nb.models import ASSETS
from univg_nb.notebook_tools import read_notebook
from univg_nb.runs import read_json, repo_root, write_text

PICTURE = "notebooks/images/minimig.png"
SHOWN = (("common_object", 4), ("reasoning", 4), ("correspondence", 4))


def fill(text: str, name: str, content: str) -> str:
    """``text`` with the part called ``name`` replaced; ValueError without the part."""
    marks = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"({re.escape(marks[0])}).*?({re.escape(marks[1])})", re.S)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"README needs one part between {marks[0]} and {marks[1]}")
    return pattern.sub(lambda found: f"{found[1]}\n{content.strip()}\n{found[2]}", text)


def minutes(run_dir: Path) -> str:
    """A Markdown table of the notebooks: title and minutes as the manifest has them."""
    manifest = read_json(run_dir / "manifest.json")
    rows = ["| notebook | what it does | minutes |", "|---|---|---|"]
    total = 0.0
    for path in sorted((repo_root() / "notebooks").glob("[0-9]*.ipynb")):
        seconds = manifest["notebooks"].get(path.stem, {}).get("seconds")
        title = read_notebook(path).cells[0].source.splitlines()[0].lstrip("# ")
        shown = "" if seconds is None else f"{seconds / 60:.1f}"
        rows.append(f"| [{path.stem}](notebooks/{path.name}) | {title} | {shown} |")
        total += seconds or 0.0
    rows.append(f"| all | | {total / 60:.1f} |")
    return "\n".join(rows)


def base_table() -> str:
    """What the shipped base model can do, from its committed evaluation."""
    rows = ["| test on held-out scenes | items | Acc@0.5 | 95 % interval |"]
    rows.append("|---|---|---|---|")
    for name, row in read_json(ASSETS / "evaluation.json")["tests"].items():
        low, high = row["ci_05"]
        rows.append(
            f"| {name} | {row['n']} | {100 * row['acc_05']:.1f} "
            f"| {100 * low:.1f} to {100 * high:.1f} |"
        )
    return "\n".join(rows)


def picture() -> Image.Image:
    """Three MiniMIG items, a row each: their images, the true box in green."""
    side, gap = 256, 8
    rows = [items.make(task, 0, "val", index) for task, index in SHOWN]
    columns = max(len(item.images) for item in rows)
    size = (columns * (side + gap) - gap, len(rows) * (side + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for row, item in enumerate(rows):
        target = drawing.target_image(item.sample)
        for column, image in enumerate(item.images):
            marked = [(item.sample.answer, drawing.TARGET_COLOUR, "")]
            image = drawing.draw_boxes(image, marked if column == target else [], side)
            sheet.paste(image, (column * (side + gap), row * (side + gap)))
    return sheet


def main() -> None:
    """Command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m univg_nb.readme RUN_DIR")
    run_dir = Path(sys.argv[1])
    readme = repo_root() / "README.md"
    text = readme.read_text(encoding="utf-8")
    results = (run_dir / "tables" / "results.md").read_text(encoding="utf-8")
    text = fill(text, "results", results)
    text = fill(text, "minutes", minutes(run_dir))
    write_text(readme, fill(text, "base", base_table()))
    picture().save(repo_root() / PICTURE, optimize=True)


if __name__ == "__main__":
    main()

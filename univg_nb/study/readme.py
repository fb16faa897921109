"""Fills the measured tables of README.md from a run folder.

    python -m univg_nb.study.readme runs/tiny

Everything between ``<!-- name -->`` and ``<!-- /name -->`` is replaced: ``results``
by the run's result table, ``minutes`` by the time of each notebook, ``base`` by the
evaluation of the shipped model, ``bench`` by what `make bench` measured of an update,
``reference`` by what `univg_nb.study.reference` found over seeds and in a longer training.
No number in them is typed. The pictures of README are drawn too.
"""

import re
import sys
from pathlib import Path

import torch
from PIL import Image

from univg_nb.fast.packed_rows import block_mask
from univg_nb.figures import drawing
from univg_nb.io import read_json, write_text
from univg_nb.launch.notebooks import read_notebook
from univg_nb.minimig import items
from univg_nb.models import ASSETS
from univg_nb.runs import repo_root

PICTURE = "notebooks/images/minimig.png"
MASK_PICTURE = "notebooks/images/shared_prefix.png"
REFERENCES = "notebooks/reference_runs"
BENCH = f"{REFERENCES}/bench_grpo.json"
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


def difference_cells(
    found: dict, lucks: tuple[str, ...], factor: float, form: str
) -> list[str]:
    """A mean difference and its intervals, each as the text of a cell."""
    cells = [f"{factor * found['mean_diff']:{form}}"]
    for luck in lucks:
        ends = [f"{factor * end:{form}}" for end in found[luck] or ()]
        cells.append(" to ".join(ends) or "one seed")
    return cells


def reference_table() -> str:
    """Differences between GRPO trainings, from the committed reference runs."""
    rows = [
        "| run | difference | sampled: expected IoU | over items | over seeds "
        "| greedy: points | over items |"
    ]
    rows.append("|---|---|---|---|---|---|---|")
    for path in sorted((repo_root() / REFERENCES).glob("*_tiny.json"), reverse=True):
        for pair, found in read_json(path)["comparisons"].items():
            both = ("items_95", "seeds_95")
            cells = [path.stem, pair]
            cells += difference_cells(found["expected_iou"], both, 1, "+.3f")
            cells += difference_cells(found["hit"], both[:1], 100, "+.1f")
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def bench_table() -> str:
    """One update, TRL's own trainer and ours, from the committed measurement."""
    measured = read_json(repo_root() / BENCH)
    rows = [
        "| images | prompt | reply | G | TRL, s | shared, s | TRL, MB | shared, MB |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|")
    for stock, shared in zip(
        measured["rows"][::2], measured["rows"][1::2], strict=True
    ):
        assert (stock["way"], shared["way"]) == ("stock", "shared")
        case = [str(stock[k]) for k in ("images", "prompt", "completion", "group")]
        case += [f"{row['seconds']['update']:.2f}" for row in (stock, shared)]
        case += [f"{row['peak_mb'] - row['base_mb']}" for row in (stock, shared)]
        rows.append(f"| {' | '.join(case)} |")
    rows += ["", f"{measured['device']}, commit {measured['commit']}. Aimed at:", ""]
    for bar in measured["bars"]:
        verdict = "met" if bar["met"] else "not met"
        rows.append(f"- {bar['bar']} {bar['needed']}: {bar['measured']:.2f}, {verdict}")
    short = measured["growth_of_short_replies"]
    rows += ["", f"With replies of {short['completion']} tokens, in proportion to the"]
    rows += [f"prompt as at full scale, the third is {short['ratio']:.2f}."]
    return "\n".join(rows)


def mask_picture(prompt: int = 8, replies: int = 3, length: int = 4) -> Image.Image:
    """Who sees whom in a shared row: a blue square where the token of the row (down)
    sees that of the column."""
    owner = [0] * prompt + [r + 1 for r in range(replies) for _ in range(length)]
    seen = block_mask(torch.tensor([owner]))[0]  # (T, T)
    side = 14
    sheet = Image.new("RGB", (len(owner) * side + 1,) * 2, "#d9d9d9")
    for row, column in torch.cartesian_prod(*(torch.arange(len(owner)),) * 2).tolist():
        colour = drawing.BLUE if seen[row, column] else "white"
        corner = (column * side + 1, row * side + 1)
        sheet.paste(Image.new("RGB", (side - 1, side - 1), colour), corner)
    return sheet


def picture() -> Image.Image:
    """Three MiniMIG items, a row each: their images, the true box in green."""
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


def main() -> None:
    """Command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m univg_nb.study.readme RUN_DIR")
    run_dir = Path(sys.argv[1])
    readme = repo_root() / "README.md"
    text = readme.read_text(encoding="utf-8")
    results = (run_dir / "tables" / "results.md").read_text(encoding="utf-8")
    text = fill(text, "results", results)
    text = fill(text, "minutes", minutes(run_dir))
    text = fill(text, "bench", bench_table())
    text = fill(text, "reference", reference_table())
    write_text(readme, fill(text, "base", base_table()))
    mask_picture().save(repo_root() / MASK_PICTURE, optimize=True)
    picture().save(repo_root() / PICTURE, optimize=True)


if __name__ == "__main__":
    main()

"""Write the tables and figures of `exhibits` as files for a paper, and check them.

A figure becomes PDF with TrueType fonts and PNG of 300 dpi, a table becomes CSV (full
precision), Markdown and LaTeX for booktabs. NAME.json beside them says from which files
of which runs they were made. `--check` fails when one of those files changed, came or
went, when a file was made from nothing, and when README or a notebook shows a table
that the run, which the notebooks name, does not have.
"""

import json
import os
import re
import runpy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from univg_nb import io
from univg_nb.config import make_parser
from univg_nb.figures import exhibits, tables
from univg_nb.figures.exhibits import FIGURES, SPECS, TABLES, Runs
from univg_nb.runs import git_hash, repo_root, versions

WIDTHS = {"column": 3.25, "page": 6.75}  # inches
# Text of at least 7 pt at print size; "small" is 0.83 of the font's size.
STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.handlelength": 2.4,
    "figure.titlesize": 8.5,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.7,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}
_MANY = 6  # columns; a LaTeX table of more spans the page


# ---------------------------------------------------------------- writing


def write_exhibits(
    runs: Runs, out: str | Path, width: str = "column", command: str = ""
) -> list[Path]:
    """Write every table and figure and its NAME.json; return the files of the former.

    `width` is a name of `WIDTHS`; the command that made them is written down.
    """
    out = Path(out)
    used = versions() | {"matplotlib": mpl.__version__}
    facts = {"command": command, "width": width, "versions": used, "git": git_hash()}
    facts["runs"] = [os.path.relpath(f, out.resolve()) for f in runs.folders]
    written = []
    for name in (*TABLES, *FIGURES):
        read = hash_artifacts(name, runs.folders)  # before: it may change meanwhile
        if name in TABLES:
            files = _write_table(TABLES[name](runs), out / name)
        else:
            with mpl.rc_context({**STYLE}):
                figure = exhibits.draw(name, runs, WIDTHS[width])
                files = _write_figure(figure, out / name)
        hashes = {path.name: io.sha256_of(path) for path in files}
        sidecar = {"caption": SPECS[name]["caption"], "files": hashes}
        io.write_json(out / f"{name}.json", sidecar | {"artifacts": read} | facts)
        written += files
    return written


def _write_figure(figure: Figure, path: Path) -> list[Path]:
    kinds = (Line2D, FancyArrowPatch)
    lines: list[Any] = [line for kind in kinds for line in figure.findobj(kind)]
    for line in lines:  # made for a screen, too heavy in print
        line.set_linewidth(0.65 * line.get_linewidth())
    files = [path.with_suffix(suffix) for suffix in (".pdf", ".png")]
    for file in files:
        # without a date the same artifacts give the same bytes
        facts = {"CreationDate": None} if file.suffix == ".pdf" else {}
        with io.open_atomically(file, "wb") as handle:
            figure.savefig(handle, format=file.suffix[1:], metadata=facts)
    return files


def _write_table(frame: pd.DataFrame, path: Path) -> list[Path]:
    shown = exhibits.format_table(frame) if "AVG" in frame else frame
    texts = {
        ".csv": frame.to_csv(),
        ".md": tables.format_markdown(shown),
        ".tex": format_latex(shown, SPECS[path.name]["caption"], path.name),
    }
    for suffix, text in texts.items():
        io.write_text(path.with_suffix(suffix), text)
    return [path.with_suffix(suffix) for suffix in texts]


def format_latex(frame: pd.DataFrame, caption: str, label: str) -> str:
    r"""Format a table as LaTeX that needs the package booktabs, to be \input."""
    frame = tables.format_cells(frame).reset_index()
    frame.columns = [name.replace("RefCOCO", "RC") for name in frame.columns]
    kinds = ["r" if k > 1 else "l" for k in range(frame.shape[1])]
    for place, column in enumerate(frame):
        if frame[column].str.len().max() > 24:
            kinds[place] = "p{2.9cm}"
    text = frame.to_latex(
        index=False,
        escape=True,
        caption=caption.replace("%", r"\%"),
        label=f"tab:{label}",
        position="t",
        column_format="".join(kinds),
    )
    size = "footnotesize" if len(kinds) < 2 * _MANY else "scriptsize"
    begin = r"\begin{tabular}"
    text = text.replace(
        begin, f"\\centering\n\\{size}\n\\setlength{{\\tabcolsep}}{{2pt}}\n{begin}"
    )
    if len(kinds) > _MANY:
        text = re.sub(r"\\(begin|end){table}", r"\\\1{table*}", text)
    return f"% needs \\usepackage{{booktabs}}\n{text.replace('–', '--')}"


def hash_artifacts(name: str, folders: Sequence[Path]) -> list[dict[str, str]]:
    """Return the SHA-256 of what an exhibit is made from, by path.

    One dictionary for each run folder, then one for the assets of the package.
    """
    patterns = [*SPECS[name].get("needs", ()), *SPECS[name].get("also", ())]
    found = []
    for folder in folders:
        paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        found.append({p.relative_to(folder).as_posix(): io.sha256_of(p) for p in paths})
    assets = SPECS[name].get("assets", ())
    return [*found, {asset: io.sha256_of(io.ASSETS / asset) for asset in assets}]


# ---------------------------------------------------------------- checking


def check_exhibits(folder: str | Path) -> Iterator[str]:
    """Yield what is wrong with written exhibits: stale, changed or made from nothing.

    Then what README and the notebooks show and their run does not have. Raises
    ValueError if there are no exhibits at all.
    """
    folder = Path(folder)
    found = {path: io.read_json(path) for path in sorted(folder.glob("*.json"))}
    sidecars = {path: row for path, row in found.items() if "files" in row}
    if not sidecars:
        raise ValueError(f"{folder}: no exhibits there; write them with --out {folder}")
    known = {name for sidecar in sidecars.values() for name in sidecar["files"]}
    for path in sorted(folder.iterdir()):
        if path.suffix != ".json" and path.name not in known:
            yield f"{path.name}: no NAME.json names it: there is no artifact behind it"
    runs: set[Path] = set()
    for path, sidecar in sidecars.items():
        yield from _check_one(path, sidecar)
        runs |= {(folder / run).resolve() for run in sidecar["runs"]}
    for run in sorted(runs):
        yield from check_texts(run)


def _check_one(path: Path, sidecar: Mapping[str, Any]) -> Iterator[str]:
    name = path.stem
    for file, written in sidecar["files"].items():
        target = path.with_name(file)
        if not target.is_file():
            yield f"{file}: missing, though {path.name} names it"
        elif io.sha256_of(target) != written:
            yield f"{file}: changed since it was written"
    if name not in SPECS:
        yield f"{name}: nothing makes it any more"
        return
    folders = [(path.parent / run).resolve() for run in sidecar["runs"]]
    now = hash_artifacts(name, folders)
    places = [*map(str, folders), str(io.ASSETS)]
    for place, old, new in zip(places, sidecar["artifacts"], now, strict=True):
        for file in sorted(old.keys() | new.keys()):
            if old.get(file) != new.get(file):
                gone, came = file not in new, file not in old
                what = "no longer there" if gone else "new" if came else "changed"
                yield f"{name}: stale, {place}/{file} is {what}"


def check_texts(run: Path) -> Iterator[str]:
    """Yield the tables of README and notebooks that differ from those of their run.

    A notebook names its run in what `runs.start` printed; README means the same run.
    Nothing is yielded for other runs.
    """
    root, named = repo_root(), False
    for path in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
        shown = path.read_text(encoding="utf-8")
        match = re.search(r"seed \d+ · ([^\s\\\"]+)", shown)
        if not match or (root / match[1]).resolve() != run:
            continue
        named = True
        executed = run / "notebooks" / path.name
        if not executed.is_file():
            yield f"{path.name}: no artifact behind its outputs: {executed} is missing"
        elif _read_tables(shown) != _read_tables(executed.read_text(encoding="utf-8")):
            yield f"{path.name}: its tables are not those of {executed}; run --record"
    script = root / "docs" / "fill_readme.py"
    if named and script.is_file():
        filler = runpy.run_path(str(script))
        content = filler["build_parts"](run)
        for page, parts in filler["PAGES"].items():
            text = (root / page).read_text(encoding="utf-8")
            for part in parts:
                if filler["fill"](text, part, content[part]) != text:
                    yield f"{page}: {part} is not what the artifacts say; run {script}"


def _read_tables(notebook: str) -> list[str]:
    """Return the tables among the outputs of a notebook file, as text."""
    cells = json.loads(notebook)["cells"]
    outputs = [output.get("data", {}) for c in cells for output in c.get("outputs", [])]
    shown = [data for data in outputs if "<table" in "".join(data.get("text/html", ""))]
    return ["".join(data["text/plain"]).strip() for data in shown]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `figures`; return 0, or 1 if a check found something."""
    parser = make_parser(
        "figures",
        "Write every table and figure from runs, or check those written.",
        "runs/tiny --out paper --width page",
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run folders")
    add("--out", help="folder to write to (default: RUN/paper)")
    add("--width", choices=WIDTHS, default="column", help="of figures: 3.25 or 6.75 in")
    add("--check", metavar="DIR", help="check the files in DIR and write nothing")
    options = parser.parse_args(arguments)
    if bool(options.runs) == bool(options.check):
        parser.error("give run folders, or --check DIR")
    if options.check:
        problems = list(check_exhibits(options.check))
        print("\n".join(problems) or f"{options.check}: all as its artifacts say")
        return int(bool(problems))
    runs = Runs(options.runs)
    out = Path(options.out or runs.folders[0] / "paper")
    command = ["python -m univg_nb figures", *options.runs, "--out", str(out)]
    command += ["--width", options.width]
    written = write_exhibits(runs, out, options.width, " ".join(command))
    print((out / "table4.md").read_text(encoding="utf-8"))
    print(f"{len(written)} files in {out}; --check {out} tells when they are stale")
    return 0

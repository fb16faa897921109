"""Write the executed notebooks and the documentation as one HTML site.

    python docs/make_book.py OUTPUT_FOLDER [NOTEBOOK ...]

`make book` installs what it needs, the extra `book`: Sphinx with myst-nb and the theme
of Jupyter Book, whose scripts, fonts and formulas are files of the site, so it reads
without a network. Nothing is executed: outputs are those that stand in the notebooks.
Without names all notebooks of the course are taken.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import main as build_site

ROOT = Path(__file__).parents[1]
TITLE = "UniVG-R1 as a course"
PAGES = (
    "results",
    "model_card",
    "data_card",
    "fast_step",
    "differences",
    "paper_facts",
)
PAGES += ("at_scale", "gpu", "architecture")
CONFIGURATION = f"""
project = {TITLE!r}
extensions = ["myst_nb", "sphinx-mathjax-offline"]
html_theme = "sphinx_book_theme"
html_title = project
html_show_copyright = html_show_sourcelink = html_copy_source = False
html_theme_options = {{"use_download_button": False, "home_page_in_toc": True}}
html_theme_options["navbar_persistent"] = []  # the search of the contents is enough
html_static_path = ["static"]
html_css_files = ["book.css"]
nb_execution_mode = "off"
nb_ipywidgets_js = {{}}
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst", "mystnb", "misc.highlighting_failure", "toc.not_included"]
"""
# On a phone, wide tables, code and formulas scroll by themselves, and not the page.
STYLE = """
.cell_output, table, .math { overflow-x: auto; max-width: 100%; }
table { display: block; }
img { max-width: 100%; height: auto; }
.cell_output svg { max-width: 100%; height: auto; }
code { overflow-wrap: anywhere; }
"""


def list_contents(caption: str, pages: list[str]) -> str:
    """Return one part of the contents in MyST."""
    lines = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]
    return "\n".join(lines) + "\n\n"


def write_sources(folder: Path, names: list[str]) -> None:
    """Lay out what Sphinx reads: README as the first page, notebooks, documentation."""
    course = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    course = [path for path in course if not names or path.name[:2] in names]
    if not course:
        raise ValueError(f"no notebook begins with {' or '.join(names)}; write e.g. 03")
    solutions = [
        ROOT / "notebooks" / "solutions" / f"{path.name[:2]}_solutions.ipynb"
        for path in course
    ]
    documents = [ROOT / "docs" / f"{name}.md" for name in PAGES]
    images = (ROOT / "notebooks" / "images").iterdir()
    for path in (*course, *solutions, *documents, *images):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    (folder / "static").mkdir()
    (folder / "static" / "book.css").write_text(STYLE, encoding="utf-8")
    (folder / "conf.py").write_text(CONFIGURATION, encoding="utf-8")
    parts = {"Notebooks": course, "Solutions": solutions, "Documentation": documents}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for caption, pages in parts.items():
        listed = [str(page.relative_to(ROOT).with_suffix("")) for page in pages]
        text += "\n" + list_contents(caption, listed)
    (folder / "index.md").write_text(text, encoding="utf-8")


def make_book(out: Path, names: list[str]) -> int:
    """Write the site to a folder; return the exit code of Sphinx."""
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder), names)
        trees = ["-d", f"{folder}/trees"]
        return build_site(["-q", "-b", "html", *trees, folder, str(out)])


if __name__ == "__main__":
    code = make_book(Path(sys.argv[1]), sys.argv[2:])
    print(f"open {Path(sys.argv[1]) / 'index.html'} in a browser")
    sys.exit(code)

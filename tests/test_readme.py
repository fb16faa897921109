"""The pages of README and docs/: their tables are fresh, and they read well."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "fill_readme.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fill_readme", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROOT = SCRIPT.parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
NOTEBOOKS = sorted(ROOT.glob("notebooks/**/*.ipynb"))


@pytest.mark.parametrize(
    ("page", "part"),
    [
        ("docs/model_card.md", "models"),
        ("docs/results.md", "other_seed"),
        ("docs/fast_step.md", "bench"),
        ("docs/fast_step.md", "gpu"),
        ("README.md", "gpu_line"),
    ],
)
def test_a_table_is_not_older_than_its_file(script, page, part):
    text = (ROOT / page).read_text(encoding="utf-8")
    table = getattr(script, f"format_{part}")()
    assert script.fill(text, part, table) == text, "python docs/fill_readme.py RUN_DIR"


def texts():
    """Every text that is rendered as Markdown, by where it stands."""
    for page in PAGES:
        yield page.name, page.read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            if cell["cell_type"] == "markdown":
                yield f"{path.name}, cell {number}", "".join(cell["source"])


def test_no_measure_becomes_a_mail_link():
    """Renderers make a link of any word with an @ before a dot, but not of code."""
    for where, text in texts():
        plain = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        found = re.findall(r"\S*\w@\d\.\d", plain)
        assert not found, f"{where}: write {found[0]} as code"


def test_readme_is_short_and_has_what_each_reader_looks_for():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(r"[^\s|:-]+", text)) < 1200
    lines = text.splitlines()
    assert lines[2].startswith("![")  # a picture comes first
    (picture,) = re.findall(r"\]\((.*)\)", lines[2])
    assert (ROOT / picture).is_file()
    assert text.count("\n### … ") == 5
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), link


def test_every_notebook_says_what_one_learns(script):
    course = [p.name[:2] for p in NOTEBOOKS if p.parent.name == "notebooks"]
    assert list(script.LEARNED) == course


def test_a_part_that_is_not_there_is_an_error(script):
    with pytest.raises(ValueError, match="<!-- prices -->"):
        script.fill("<!-- price -->", "prices", "none")


def test_minutes_of_the_notebooks(script, tmp_path):
    ran = {"00_start_here": {"seconds": 30}, "03_cot_sft_lora": {"seconds": 90}}
    manifest = {"notebooks": ran, "speed": {"gflops": 43.2, "million_steps": 80.0}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    lines = script.format_minutes(tmp_path).splitlines()
    named = "| [00_start_here](notebooks/00_start_here.ipynb) | the paper in five "
    assert lines[2].startswith(named)
    assert lines[2].endswith(" | 0.5 |") and lines[3].endswith(" | – |")
    assert lines[-3] == "| all |  | 2.0 |"
    assert lines[-1].startswith("Machine: 43 GFLOP/s") and "80 million" in lines[-1]


def test_what_an_interval_looks_like(script):
    assert script.format_interval([0.0374, 0.065], 100, "+.1f") == "+3.7 to +6.5"
    assert script.format_interval(None, 1, "+.3f") == "one seed"

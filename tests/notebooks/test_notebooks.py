"""Conventions of the committed notebooks, and all of them executed.

Execution is in course order, because later notebooks read what earlier ones made:
split over processes, the tests of a file stay together (xdist's loadfile).
"""

import ast
import linecache
from pathlib import Path

import pytest
from matplotlib import pyplot

from univg_nb.launch import notebooks, runner

FOLDER = Path(__file__).parents[2] / "notebooks"
COURSE = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted(FOLDER.glob("solutions/*.ipynb"))
ALL = COURSE + SOLUTIONS
MAX_LINES, MAX_COLUMNS, MAX_BYTES = 25, 88, 700_000


def ids(path):
    return path.stem


course = pytest.mark.parametrize("path", COURSE, ids=ids)
every = pytest.mark.parametrize("path", ALL, ids=ids)


def test_the_course_is_whole():
    assert {path.name[:2] for path in COURSE} == {f"{i:02}" for i in range(12)}


@course
def test_one_parameters_cell_with_the_common_names(path):
    notebook = notebooks.read_notebook(path)
    tagged = [c for c in notebook.cells if "parameters" in notebooks.tags(c)]
    assert len(tagged) == 1 and tagged[0].cell_type == "code"
    parameters = notebooks.read_parameters(notebook, path.name)
    common = {"SCALE": "tiny", "RUN_DIR": "", "SEED": 0, "FRESH": False}
    assert common.items() <= parameters.items()


@course
def test_it_begins_with_a_title(path):
    cells = notebooks.read_notebook(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")


@every
def test_code_cells_are_short(path):
    for number, cell in enumerate(
        notebooks.code_cells(notebooks.read_notebook(path)), 1
    ):
        lines = cell.source.rstrip().splitlines()
        where = f"{path.name}, code cell {number}"
        assert len(lines) <= MAX_LINES, f"{where}: {len(lines)} lines"
        longest = max(map(len, lines), default=0)
        assert longest <= MAX_COLUMNS, f"{where}: a line of {longest} columns"


@every
def test_code_cells_hold_plain_python(path):
    """Magics and shell lines need IPython; the course runs without their help."""
    for cell in notebooks.code_cells(notebooks.read_notebook(path)):
        ast.parse(cell.source)


@every
def test_no_error_is_committed(path):
    for cell in notebooks.code_cells(notebooks.read_notebook(path)):
        assert all(output.output_type != "error" for output in cell.outputs)


@every
def test_it_is_small(path):
    assert path.stat().st_size <= MAX_BYTES


@course
def test_outputs_are_there_and_not_stale(path):
    notebook = notebooks.read_notebook(path)
    recorded = notebook.metadata.get("univg", {}).get("code_sha256")
    remedy = f"run it, then make record NB={path.stem}"
    assert recorded, f"{path.name} has no recorded outputs; {remedy}"
    assert recorded == notebooks.code_sha256(notebook), (
        f"{path.name} is stale; {remedy}"
    )
    assert notebooks.ran_to_end(notebook)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


@course
def test_it_runs_at_smoke_scale(path, smoke_run, capsys):
    arguments = [str(path), "--scale", "smoke", "--run-dir", str(smoke_run)]
    code = runner.main(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err[-4000:]


@pytest.mark.parametrize("path", SOLUTIONS, ids=ids)
def test_solutions_pass_their_checks(path, capsys):
    """Here, without a kernel: they are functions and the exercises' own checkers.

    A wrong answer gets a line from each of them and raises nothing.
    """
    names = {}
    for number, cell in enumerate(
        notebooks.code_cells(notebooks.read_notebook(path)), 1
    ):
        name = f"{path.name}, code cell {number}"
        # As IPython does, so that the source of a function can be found.
        lines = cell.source.splitlines(keepends=True)
        linecache.cache[name] = (len(cell.source), None, lines, name)
        exec(compile(cell.source, name, "exec"), names)
    pyplot.close("all")  # what the solutions draw is no other test's
    said = capsys.readouterr().out
    assert " solved" in said and "not solved" not in said
    checks = [name for name in names if name.startswith("check_")]
    arguments = {"check_1_2": (0.3,)}  # what a checker gets beside the function
    for answer in (None, -1, "?", (1, 2), [0.5]):
        for name in checks:
            names[name](lambda *_, given=answer, **__: given, *arguments.get(name, ()))
            line = capsys.readouterr().out
            assert line.count("not solved: ") == 1 == len(line.splitlines()), line

"""pyproject.toml, constraints.txt and environment.yml say the same."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(r) for r in PROJECT["dependencies"]]
DIRECT += [Requirement(r) for r in EXTRAS["course"] + EXTRAS["dev"]]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
}


def test_constraints_are_plain_exact_pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) == len(PINS)  # nothing but name==version, none twice
    assert not [line for line in pins if "+" in line or "@" in line]


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda r: r.name)
def test_every_dependency_is_pinned_within_its_range_and_installed(requirement):
    name = canonicalize_name(requirement.name)
    assert name in PINS, f"constraints.txt lacks {name}"
    assert PINS[name] in requirement.specifier
    installed = importlib.metadata.version(name).partition("+")[0]
    assert installed == PINS[name], f"{name}: installed and pinned versions differ"


def imported(path):
    """Top-level names of all imports in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("folder", ["univg_nb", "tests"])
def test_what_is_imported_is_declared(folder):
    declared = {canonicalize_name(requirement.name) for requirement in DIRECT}
    optional = EXTRAS["gpu"] + EXTRAS["photos"]
    declared |= {canonicalize_name(Requirement(r).name) for r in optional}
    owners = importlib.metadata.packages_distributions()
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in set(imported(path)) - sys.stdlib_module_names - {"univg_nb"}:
            distributions = {canonicalize_name(d) for d in owners.get(name, [])}
            assert not distributions or distributions & declared, (
                f"{path.relative_to(ROOT)} imports {name}: add it to pyproject.toml"
            )


@pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info[:2] != (3, 11),
    reason="the list was made on Linux with Python 3.11",
)
def test_what_the_dependencies_pull_in_is_pinned():
    todo = [(r.name, tuple(r.extras)) for r in DIRECT]
    seen = set(todo)
    while todo:
        name, extras = todo.pop()
        assert canonicalize_name(name) in PINS, f"constraints.txt lacks {name}"
        for text in importlib.metadata.requires(name) or []:
            wanted = Requirement(text)
            marker = wanted.marker
            if marker is None or any(
                marker.evaluate({"extra": extra}) for extra in extras or ("",)
            ):
                key = (wanted.name, tuple(wanted.extras))
                if key not in seen:
                    seen.add(key)
                    todo.append(key)


def test_conda_environment_installs_the_same():
    text = (ROOT / "environment.yml").read_text()
    environment = yaml.safe_load(text)
    assert environment["name"] == PROJECT["name"]
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == ["-c constraints.txt", "-e .[course,dev]"]
    (python,) = [d.partition("=")[2] for d in conda if d.startswith("python=")]
    assert f"{python}.0" in SpecifierSet(PROJECT["requires-python"])
    for requirement in EXTRAS["gpu"]:
        assert Requirement(requirement).name in text


def test_the_makefile_installs_torch_first_from_the_constraints():
    recipe = (ROOT / "Makefile").read_text()
    assert recipe.index("(torch|torchvision)==") < recipe.index("-e '.[course,dev]'")
    assert {"torch", "torchvision"} <= set(PINS)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "RUN_DIR=runs/my run"], '--run-dir "runs/my run"'),
        (["record", "RUN_DIR=runs/my run"], '--record "runs/my run"'),
        (
            ["figures", "RUN_DIR=runs/my run"],
            'figures "runs/my run" notebooks/reference_runs --out "runs/my run/paper"',
        ),
        (["figures", "RUN=a b"], 'figures a b --out "a/paper"'),
        (["lab", "ARGS=--no-browser --port 1"], "lab notebooks --no-browser --port 1"),
        (["plan", "SCALE=full", "ARGS=--price 2 --mfu 0.3"], "--price 2 --mfu 0.3"),
        (["full", "ARGS=--set sft.seed=1"], "--set sft.seed=1"),
    ],
)
def test_make_takes_folders_with_spaces_and_passes_options_on(words, said):
    command = ["make", "-n", "-C", str(ROOT), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = re.sub(r"\s*\\\n\s*", " ", done.stdout)  # a recipe may go on
    assert said in printed

"""What the runner and the tests know about a notebook file.

Its parameters cell (the one tagged `parameters`, plain `NAME = literal` lines), the
hash of its code cells that tells whether recorded outputs are stale, and recording:
copying the outputs of an executed copy back into the committed notebook.
"""

import ast
import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from PIL import Image

from univg_nb.config import accepts, describe, parse_value
from univg_nb.io import hash_text, read_text, write_text
from univg_nb.runs import repo_root


def read_notebook(path: str | Path) -> NotebookNode:
    """Read a notebook; ValueError names the file if it is not one."""
    invalid: dict[str, Exception] = {}
    text = read_text(path)
    try:
        found = nbformat.reads(text, as_version=4, capture_validation_error=invalid)
    except Exception:  # the conversion of JSON that is no notebook fails anywhere
        found = None
    if found is None or invalid:
        raise ValueError(f"{path}: not a notebook; restore it, or name another file")
    return found


def tags(cell: NotebookNode) -> list[str]:
    """Return the tags of a cell."""
    return cell.metadata.get("tags", [])


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the code cells as written: without the one that papermill injects."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if "injected-parameters" not in tags(cell)]


def code_sha256(notebook: NotebookNode) -> str:
    """Hash the text of the code cells; outputs, markdown and metadata do not count."""
    sources = (cell.source.rstrip() for cell in code_cells(notebook))
    return hash_text("\n# next cell\n".join(sources))


# ---------------------------------------------------------------- parameters


def read_parameters(notebook: NotebookNode, where: str) -> dict[str, Any]:
    """Return names and default values of the parameters cell; {} without such a cell.

    Raises ValueError, naming `where`, when there are several such cells or a line is
    not `NAME = literal`: a derived value would keep its old value there, because
    papermill puts its own cell behind this one.
    """
    cells = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    if len(cells) > 1:
        raise ValueError(f"{where}: {len(cells)} cells are tagged 'parameters'; keep 1")
    found: dict[str, Any] = {}
    try:
        statements = ast.parse(cells[0].source).body if cells else []
    except SyntaxError as error:
        raise ValueError(f"{where}, parameters cell: {error}; correct it") from error
    for statement in statements:
        try:
            if not isinstance(statement, ast.Assign):
                raise TypeError
            name = ast.unparse(statement.targets[0])
            found[name] = ast.literal_eval(statement.value)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{where}, parameters cell: {ast.unparse(statement)!r} is not "
                "'NAME = plain value'; move it to the next cell"
            ) from error
    return found


def parse_parameter(name: str, text: str, default: Any, where: str) -> Any:
    """Return the value of `-p NAME TEXT`, of the type of the notebook's default.

    A default of None takes any value. Raises ValueError with name, text and type.
    """
    kind: Any = Any if default is None else type(default)
    wanted = list if kind is tuple else kind
    try:
        value = parse_value(text, wanted)
    except ValueError as error:
        raise ValueError(f"{where}: -p {name}: {error}") from error
    if not accepts(wanted, value):
        raise ValueError(
            f"{where}: -p {name} {text}: expected {describe(wanted)}; "
            f"the notebook has {name} = {default!r}"
        )
    return kind(value) if kind in (float, tuple) else value


def fill_parameters(
    parameters: Mapping[str, Any], texts: Mapping[str, str], where: str
) -> dict[str, Any]:
    """Return the values of the parameters that `texts` names, of their types."""
    return {
        name: parse_parameter(name, texts[name], default, where)
        for name, default in parameters.items()
        if name in texts
    }


# ---------------------------------------------------------------- outputs


def _clean(output: NotebookNode) -> NotebookNode | None:
    """Return an output fit for the committed notebook, or None.

    Messages on stderr and live widgets, which need their kernel, stay out, and so do
    absolute paths of this checkout.
    """
    here = f"{repo_root()}/"
    if output.output_type == "stream":
        output.text = output.text.replace(here, "")
        return None if output.name == "stderr" else output
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return None
    for kind in {"text/plain", "text/html"} & data.keys():
        data[kind] = data[kind].replace(here, "")
    if "image/png" in data:
        data["image/png"] = _compress(data["image/png"])
    return output


def _compress(png: str) -> str:
    """Return a PNG (base64) with 256 colors if that is smaller; a plot looks the same.

    Octree colors: median cut gives a thin line the color of a larger area near it.
    """
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    reduced = picture.quantize(256, method=Image.Quantize.FASTOCTREE)
    reduced.save(buffer, "PNG", optimize=True)
    return min(png, base64.b64encode(buffer.getvalue()).decode(), key=len)


def record(source: Path, executed: Path) -> int:
    """Copy the outputs of an executed copy into the committed notebook `source`.

    The notebook gets the hash of its code cells as a stamp. Returns its new size in
    bytes. Raises ValueError if the copy was made from other code or did not run to its
    end.
    """
    notebook, copy = read_notebook(source), read_notebook(executed)
    if code_sha256(notebook) != code_sha256(copy):
        raise ValueError(
            f"{executed} was made from other code than {source}; run it again first"
        )
    if not ran_to_end(copy):
        raise ValueError(f"{executed} did not run to its last cell; run it again first")
    pairs = zip(code_cells(notebook), code_cells(copy), strict=True)
    for number, (cell, ran) in enumerate(pairs, start=1):
        cell.outputs = [output for output in map(_clean, ran.outputs) if output]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
        cell.execution_count = number
    notebook.metadata.pop("widgets", None)
    notebook.metadata.pop("papermill", None)
    notebook.metadata["univg"] = {"code_sha256": code_sha256(notebook)}
    text = nbformat.writes(notebook).rstrip("\n") + "\n"
    write_text(source, text)
    return len(text.encode())


def ran_to_end(notebook: NotebookNode) -> bool:
    """Return whether every code cell was executed and none ended in an error."""
    cells = [cell for cell in code_cells(notebook) if cell.source.strip()]
    executed = all(cell.execution_count is not None for cell in cells)
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    return executed and "error" not in kinds

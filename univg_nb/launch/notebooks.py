"""What the runner and the tests know about a notebook file.

Its parameters cell (the one tagged `parameters`, plain `NAME = literal` lines), the
hash of its code cells that tells whether recorded outputs are stale, and recording:
copying the outputs of an executed copy back into the committed notebook.
"""

import ast
import base64
import hashlib
import io
import re
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from PIL import Image

from univg_nb.config import parse_value, suggestion
from univg_nb.io import write_text
from univg_nb.runs import repo_root


def read_notebook(path: str | Path) -> NotebookNode:
    """Read a notebook; ValueError names the file if it is not one."""
    try:
        return nbformat.read(path, as_version=4)
    except nbformat.reader.NotJSONError as error:
        raise ValueError(f"{path}: not a notebook (malformed JSON): {error}") from error


def tags(cell: NotebookNode) -> list[str]:
    """Tags of a cell."""
    return cell.metadata.get("tags", [])


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Code cells as written: without the one the runner injects."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if "injected-parameters" not in tags(cell)]


def code_sha256(notebook: NotebookNode) -> str:
    """Hash of the code cells' text; outputs, markdown and metadata do not count."""
    sources = (cell.source.rstrip() for cell in code_cells(notebook))
    return hashlib.sha256("\n# next cell\n".join(sources).encode()).hexdigest()


def read_parameters(notebook: NotebookNode, where: str) -> dict[str, Any]:
    """Names and default values of the parameters cell; {} without such a cell.

    Raises ValueError when there are several such cells or a line is not
    `NAME = literal`: a value derived there would keep its old value (papermill puts
    its own cell behind this one).
    """
    cells = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    if len(cells) > 1:
        raise ValueError(f"{where}: {len(cells)} cells are tagged 'parameters'; keep 1")
    found: dict[str, Any] = {}
    for statement in ast.parse(cells[0].source).body if cells else []:
        line = ast.unparse(statement)
        if not isinstance(statement, ast.Assign | ast.AnnAssign):
            raise ValueError(
                f"{where}, parameters cell: {line!r} is not 'NAME = value'; "
                "move it to the next cell"
            )
        annotated = isinstance(statement, ast.AnnAssign)
        target = statement.target if annotated else statement.targets[0]
        try:
            found[ast.unparse(target)] = ast.literal_eval(statement.value)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{where}, parameters cell: {line!r} is not a plain value; "
                "derive it in the next cell"
            ) from error
    return found


def parse_parameter(name: str, text: str, default: Any, where: str) -> Any:
    """The value of `-p NAME TEXT`, of the type of the notebook's default.

    A default of None takes any value. Raises ValueError with name, text and type.
    """
    if isinstance(default, str):
        return text
    value = parse_value(text)
    kind = type(default)
    fits = default is None or type(value) is kind
    if kind is float and type(value) is int:
        value, fits = float(value), True
    if kind is tuple and isinstance(value, list):
        value, fits = tuple(value), True
    if not fits:
        raise ValueError(
            f"{where}: -p {name} {text}: expected {kind.__name__} "
            f"as in the notebook's {name} = {default!r}"
        )
    return value


def check_parameters(
    given: dict[str, str], notebooks: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Typed values of `given` for each notebook that has the name.

    given: name -> text. notebooks: notebook name -> its parameters. Raises ValueError
    for a name that none of them has, or a text that does not fit the type.
    """
    everywhere = {name for parameters in notebooks.values() for name in parameters}
    for name in given:
        if name not in everywhere:
            raise ValueError(
                f"-p {name}: no such parameter in {', '.join(notebooks)}"
                f"{suggestion(name, everywhere)}"
            )
    return {
        notebook: {
            name: parse_parameter(name, text, parameters[name], notebook)
            for name, text in given.items()
            if name in parameters
        }
        for notebook, parameters in notebooks.items()
    }


def _readable(output: NotebookNode) -> NotebookNode | None:
    """An output fit for the committed notebook: no stderr chatter, no live widgets
    (they need their kernel), no absolute path of this checkout."""
    if output.output_type == "stream":
        if output.name == "stderr":
            return None
        output.text = output.text.replace(f"{repo_root()}/", "")
    elif "data" in output:
        if "application/vnd.jupyter.widget-view+json" in output.data:
            return None
        for kind in ("text/plain", "text/html"):
            if kind in output.data:
                output.data[kind] = output.data[kind].replace(f"{repo_root()}/", "")
        if "image/png" in output.data:
            output.data["image/png"] = _lighter(output.data["image/png"])
    return output


def _lighter(png: str) -> str:
    """A PNG (base64) with 256 colours where that is smaller; a plot looks the same.

    Octree colours: median cut gives a thin line the colour of a larger area near it.
    """
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(256, method=Image.Quantize.FASTOCTREE).save(
        buffer, "PNG", optimize=True
    )
    made = base64.b64encode(buffer.getvalue()).decode()
    return min(png, made, key=len)


def record(source: Path, executed: Path) -> int:
    """Copy the outputs of `executed` into the notebook `source` and stamp it with the
    hash of its code cells. Returns the new size in bytes.

    Raises ValueError if the copy was made from other code or did not run to its end.
    """
    notebook, copy = read_notebook(source), read_notebook(executed)
    if code_sha256(notebook) != code_sha256(copy):
        raise ValueError(
            f"{executed} was made from other code than {source}; run it again first"
        )
    if not ran_to_end(copy):
        raise ValueError(f"{executed} did not run to its last cell; run it again first")
    for number, (cell, ran) in enumerate(
        zip(code_cells(notebook), code_cells(copy), strict=True), start=1
    ):
        outputs = [_readable(output) for output in ran.outputs]
        cell.outputs = [output for output in outputs if output is not None]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
        cell.execution_count = number
    notebook.metadata.pop("widgets", None)
    notebook.metadata.pop("papermill", None)
    notebook.metadata["univg"] = {"code_sha256": code_sha256(notebook)}
    text = nbformat.writes(notebook)
    write_text(source, text if text.endswith("\n") else text + "\n")
    return len(text.encode())


def ran_to_end(notebook: NotebookNode) -> bool:
    """Whether every code cell was executed and none ended in an error."""
    cells = [cell for cell in code_cells(notebook) if cell.source.strip()]
    return all(
        cell.execution_count is not None
        and not any(output.output_type == "error" for output in cell.outputs)
        for cell in cells
    )


def error_text(notebook: NotebookNode) -> str:
    """Traceback of the first failed cell without colours, "" if none failed."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "error":
                return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.traceback))
    return ""

"""A Jupyter kernel at work: cells in, what a reader would see out."""

import contextlib
import queue
import time
from pathlib import Path

from jupyter_client.manager import KernelManager

from univg_nb.launch import notebooks

FOLDER = Path(__file__).parents[1] / "notebooks"


def code_of(name):
    """The code cells of a notebook of the course, as {cell id: source}."""
    (path,) = FOLDER.glob(f"{name}_*.ipynb")
    cells = notebooks.code_cells(notebooks.read_notebook(path))
    return {cell.id: cell.source for cell in cells}


class Seen(list):
    """The outputs of one cell, as nbformat has them."""

    def text(self, *kinds):
        """All text of streams (by name) and errors (their tracebacks)."""
        parts = [o["text"] for o in self if o.get("name") in kinds]
        if "error" in kinds:
            parts += ["\n".join(o["traceback"]) for o in self if "traceback" in o]
        return "".join(parts)


class Kernel:
    """A kernel of this Python that works in `notebooks/`."""

    def __init__(self):
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(FOLDER))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=180)

    def run(self, source, interrupt_when=None, limit=300):
        """Run a cell; interrupt it once when `interrupt_when()` becomes true."""
        sent, seen, deadline = self.client.execute(source), Seen(), time.time() + limit
        while time.time() < deadline:
            if interrupt_when and interrupt_when():
                self.manager.interrupt_kernel()
                interrupt_when = None
            with contextlib.suppress(queue.Empty):
                message = self.client.get_iopub_msg(timeout=0.1)
                if message["parent_header"].get("msg_id") != sent:
                    continue
                content, kind = message["content"], message["msg_type"]
                if kind == "status" and content["execution_state"] == "idle":
                    return seen
                if kind in ("stream", "error", "display_data", "execute_result"):
                    seen.append(content)
        raise TimeoutError(f"a cell took over {limit} s: {source[:200]}")

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

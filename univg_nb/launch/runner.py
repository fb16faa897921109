"""Execute notebooks strictly: ``python -m univg_nb run [NAME...] [OPTIONS]``.

papermill executes them. Around it: parameters are checked by name and type before any
kernel starts (papermill only warns), the kernel is this Python and works offline,
SIGTERM and Ctrl-C reach it and it gets time to end, and a notebook counts as done only
when its last cell ran. Executed copies go to RUN_DIR/notebooks/, seconds and status to
RUN_DIR/manifest.json.

Several values for a parameter make a sweep: -p WEIGHT exp,power,none -p SEED 0:3 runs
nine jobs, each in its own folder of RUN_DIR (see `launch.queue`).
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import papermill
import psutil
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from papermill.engines import (
    NBClientEngine,
    NotebookExecutionManager,
    papermill_engines,
)
from papermill.exceptions import PapermillExecutionError, strip_color

from univg_nb.config import (
    AppendOnce,
    add_scale_arguments,
    dump,
    load_scale,
    make_parser,
    output_folder,
    scale_path,
    suggestion,
)
from univg_nb.io import locked, write_text
from univg_nb.launch.notebooks import (
    fill_parameters,
    ran_to_end,
    read_notebook,
    read_parameters,
    record,
)
from univg_nb.launch.queue import list_jobs, run_jobs
from univg_nb.runs import (
    peak_memory_mb,
    record_stage,
    repo_root,
    resolve_run_dir,
)

COURSE = "[0-9][0-9]_*.ipynb"
SAVE_EVERY = 5  # seconds
# A kernel dies at SIGTERM; with this the cell ends as at Ctrl-C. And bitsandbytes warns
# of an optional kernel that is missing on newer CPUs.
STARTUP = (
    "import logging, signal, sys; "
    "signal.signal(signal.SIGTERM, lambda n, _: sys.exit(128 + n)); "
    "logging.getLogger('bitsandbytes.backends.cpu.ops').setLevel(logging.ERROR)"
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences a debugger notice
    # glibc keeps freed memory instead of returning it page by page, which costs torch
    # on a CPU much system time. Other systems ignore these.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}


class Kernel(AsyncKernelManager):
    """The kernel at work, of this Python; signals to the runner are passed on to it."""

    kernel_spec = KernelSpec(**get_kernel_dict())
    running: ClassVar["Kernel | None"] = None
    signals: ClassVar[list[int]] = []  # received so far

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        Kernel.running = self

    @classmethod
    def pass_on(cls, number: int, _: Any = None) -> None:
        """Signal handler: the kernel's process group, which it leads, gets it too."""
        cls.signals.append(number)
        if cls.running is not None and cls.running.has_kernel:
            os.killpg(cls.running.provisioner.process.pid, number)


class PatientEngine(NBClientEngine):
    """papermill's engine, but it writes the copy every few seconds and at the end.

    Written before and after every cell, copies full of pictures took half a minute of
    the course.
    """

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: NotebookExecutionManager, kernel_name: str, **options: Any
    ) -> None:
        """Execute the cells; how they went is in the file, also after a failure."""
        save = nb_man.save

        def save_if_due(**_: Any) -> None:
            if (nb_man.now() - nb_man.last_save_time).total_seconds() >= SAVE_EVERY:
                save()

        nb_man.save = save_if_due
        try:
            super().execute_managed_notebook(nb_man, kernel_name, **options)
        finally:
            nb_man.save = save
            save()


papermill_engines.register("patient", PatientEngine)


def find_notebooks(names: Sequence[str], folder: Path) -> list[Path]:
    """Return the notebook files of `names`: paths, stems, or how stems begin ("03").

    Without names these are all notebooks of the course. Raises ValueError for a name
    that finds none.
    """
    paths = [] if names else sorted(folder.glob(COURSE))
    if not names and not paths:
        raise ValueError(f"no notebooks in {folder}; go to the repository")
    for name in names:
        if Path(name).is_file():
            if not name.endswith(".ipynb"):
                raise ValueError(f"{name} is no notebook; name an .ipynb file")
            paths.append(Path(name))
            continue
        wanted = folder / name.removesuffix(".ipynb")  # `folder` or an absolute path
        all_there = sorted(wanted.parent.glob("*.ipynb"))
        found = [p for p in all_there if name and p.name.startswith(wanted.name)]
        if not found:
            known = ", ".join(path.stem for path in all_there)
            raise ValueError(
                f"no notebook {name!r}: looked for {wanted}*.ipynb; that folder has "
                f"{known or 'none: go to the repository, or name the file'}"
            )
        paths += found
    return paths


def execute(
    path: Path, run_dir: Path, parameters: dict[str, Any], position: str
) -> bool:
    """Execute one notebook into run_dir/notebooks; return whether its last cell ran.

    Prints one line, and the end of the traceback after a failure.
    """
    out = run_dir / "notebooks" / path.name
    out.parent.mkdir(parents=True, exist_ok=True)
    began, failure = time.perf_counter(), ""
    bar = {"desc": path.stem, "leave": False}
    try:
        papermill.execute_notebook(
            path,
            out,
            parameters,
            engine_name="patient",
            kernel_name="python3",
            language="python",
            kernel_manager_class=Kernel,
            # No log: errors of cells are in the notebook, and what a kernel logs as an
            # error when it is told to end is none.
            extra_arguments=["--log-level=50", f"--IPKernelApp.exec_lines={STARTUP}"],
            cwd=path.resolve().parent,  # where JupyterLab would run it
            progress_bar=sys.stderr.isatty() and bar,
        )
    except PapermillExecutionError as error:
        failure = strip_color("\n".join(error.traceback))
    except RuntimeError as error:  # it died, while it started or later
        used, memory = peak_memory_mb(), psutil.virtual_memory().total >> 20
        failure = (
            f"the kernel died, likely out of memory ({used} of {memory} MiB used): "
            f"take a smaller scale or batch, or fewer pixels ({error})"
        )
    except OSError:  # the disk is full
        out.unlink(missing_ok=True)  # half a notebook
        raise
    seconds = time.perf_counter() - began
    executed = read_notebook(out)
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    ran = sum(cell.execution_count is not None for cell in cells)
    done = not failure and ran_to_end(executed)
    status = "done" if done else "stopped" if Kernel.signals else "failed"
    facts = {"status": status, "cells": len(cells), "cells_run": ran}
    record_stage(run_dir, path.stem, seconds, group="notebooks", **facts)
    line = f"{status:<7} {seconds:7.1f} s  cell {ran}/{len(cells)}"
    print(f"{position:>6} {path.stem:<24} {line}", flush=True)
    if status == "failed":
        lines = failure.splitlines() or ["it ended before its last cell"]
        if lines[0].startswith("error: "):  # shortened by the kernel
            lines = ["; ".join(map(str.strip, lines)).removeprefix("error: ")]
        print(*lines[-25:-1], sep="\n", end="\n" * (len(lines) > 1), file=sys.stderr)
        begun = [c for c in cells if c.metadata.get("papermill", {}).get("start_time")]
        where = f"{path.stem}, cell {len(begun)}"
        print(f"error: {where}: {lines[-1]}; executed copy: {out}", file=sys.stderr)
    return done


def run(paths: Sequence[Path], run_dir: Path, values: Sequence[dict[str, Any]]) -> bool:
    """Execute notebooks in order with their parameters; stop at the first failure.

    Returns whether all are done. Raises KeyboardInterrupt or SystemExit after SIGINT or
    SIGTERM.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    done = True
    logging.getLogger("papermill").addHandler(logging.NullHandler())
    Kernel.signals.clear()
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, Kernel.pass_on) for number in numbers}
    try:
        for number, path in enumerate(paths, start=1):
            position = f"{number}/{len(paths)}"
            done = done and not Kernel.signals
            done = done and execute(path, run_dir, values[number - 1], position)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signal.SIGINT in Kernel.signals:
        raise KeyboardInterrupt
    if Kernel.signals:
        raise SystemExit(128 + signal.SIGTERM)
    return done


def report(run_dir: Path, seconds: float) -> None:
    """Print the result table, if the run has one, and where everything lies."""
    table = run_dir / "tables" / "results.md"
    if table.is_file():
        print(f"\n{table.read_text(encoding='utf-8').rstrip()}")
    print(f"\ndone in {seconds / 60:.1f} min; see")
    for name in ("notebooks", "figures", "tables", "manifest.json"):
        if (run_dir / name).exists():
            print(f"  {name:<14} {run_dir / name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `run`; return 0, or 1 if a notebook failed."""
    parser = make_parser(
        "run",
        "Execute notebooks of the course; finished stages are reused.",
        "05 06 --scale tiny -p WEIGHT exp,power",
    )
    parser.add_argument("names", nargs="*", help="e.g. 03; none: the course")
    add_scale_arguments(parser, default="tiny")
    parser.add_argument(
        "-p",
        dest="given",
        nargs=2,
        action=AppendOnce,
        default=[],
        metavar=("KEY", "VALUE"),
        help="set a notebook parameter (true, false, numbers, lists are understood); "
        "several values, as a,b or 0:3, make a sweep",
    )
    parser.add_argument(
        "--gpus",
        nargs="+",
        default=[None],
        help="a sweep's GPUs, one job on each: 0 1, or 0,1 2,3",
    )
    parser.add_argument("--run-dir", default="", help="default: runs/SCALE")
    parser.add_argument("--fresh", action="store_true", help="reuse no finished stage")
    parser.add_argument(
        "--record",
        metavar="RUN_DIR",
        help="copy executed outputs from there into notebooks/ and run nothing",
    )
    options = parser.parse_args(arguments)
    paths = find_notebooks(options.names, repo_root() / "notebooks")
    if options.record:
        copies = resolve_run_dir(options.record) / "notebooks"
        for path in paths:
            size = record(path, copies / path.name)
            print(f"{path.stem:<24} {size / 1000:7.0f} KB")
        return 0
    given, began = dict(options.given), time.perf_counter()
    scale_path(options.scale)  # before anything is written
    target = resolve_run_dir(options.run_dir, options.scale)
    output_folder(target / "notebooks")
    # Every notebook reads the same changed scale.
    scale = str(target / "scale.yaml") if options.set else options.scale
    own = {path: read_parameters(read_notebook(path), path.stem) for path in paths}
    known = {name: value for values in own.values() for name, value in values.items()}
    for name in given.keys() - known.keys():
        notebooks = ", ".join(path.stem for path in paths)
        hint = suggestion(name, known)
        raise ValueError(f"-p {name}: no such parameter in {notebooks}{hint}")
    jobs = list_jobs(given, known)
    common = {"SCALE": scale, "RUN_DIR": str(target), "FRESH": str(options.fresh)}
    for job in jobs.values():
        texts = common | job
        values = [fill_parameters(own[path], texts, path.stem) for path in paths]
    with locked(target):
        if options.set:
            write_text(scale, dump(load_scale(options.scale, options.set)))
        if len(jobs) > 1:
            command = [sys.executable, "-m", "univg_nb", "run", *options.names]
            command += ["--scale", scale, *["--fresh"] * options.fresh]
            return int(not run_jobs(target, jobs, command, options.gpus, options.fresh))
        done = run(paths, target, values)
    if done:
        report(target, time.perf_counter() - began)
    return int(not done)

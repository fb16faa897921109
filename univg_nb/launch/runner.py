"""The kernel that the notebook runner starts: it hears of SIGTERM."""

import argparse
import errno
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import papermill
import psutil
from jupyter_client import AsyncKernelManager
from papermill.exceptions import PapermillExecutionError

from univg_nb.config import dump, load_scale, override, scale_path
from univg_nb.io import write_text
from univg_nb.launch.children import alive
from univg_nb.launch.notebooks import (
    check_parameters,
    error_text,
    ran_to_end,
    read_notebook,
    read_parameters,
    record,
)
from univg_nb.launch.queue import Queue, combinations, job_name
from univg_nb.runs import record_stage, repo_root, resolve_run_dir

# DOC of run_notebooks:
# """Execute notebooks strictly: python -m univg_nb run [NAME...] [options].

# papermill does the executing. Around it: parameters are checked by name and type
# before any kernel starts (papermill only warns), the kernel is this Python and works
# offline, SIGTERM reaches it and its children, and a notebook counts as done only when
# its last cell ran. Executed copies lie in RUN_DIR/notebooks/, seconds and status in
# RUN_DIR/manifest.json.

# Several values for a parameter make a sweep: -p WEIGHT exp,power,none -p SEED 0:3 runs
# nine jobs, each in its own folder of RUN_DIR (see job_queue).
# """


class Kernel(AsyncKernelManager):
    """A kernel that hears of SIGTERM, with all it started, and gets time to end."""

    running: ClassVar["Kernel | None"] = None
    told: list[psutil.Process] | None = None  # what was running when told to stop
    shutdown_wait_time = 20.0  # seconds

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        Kernel.running = self

    def terminate(self) -> None:
        """SIGTERM to the kernel's process group, which it leads."""
        if self.provisioner is not None and self.provisioner.has_process:
            pid = self.provisioner.process.pid
            self.told = psutil.Process(pid).children(recursive=True)
            os.killpg(pid, signal.SIGTERM)

    async def _async_interrupt_kernel(self) -> None:
        """Shutting down begins with SIGINT, which would cut a checkpoint short."""
        if self.told is None:
            await super()._async_interrupt_kernel()

    def wait_for_children(self, seconds: float = 600.0) -> None:
        """Wait until a trainer that the kernel launched has written its checkpoint:
        Slurm, for one, kills what is left when this process ends."""
        deadline = time.monotonic() + seconds
        while any(map(alive, self.told or [])) and time.monotonic() < deadline:
            time.sleep(0.1)


COURSE = "[0-9][0-9]_*.ipynb"
# glibc keeps freed memory instead of giving it back page by page, which costs torch on
# a CPU much system time. Other systems take no notice.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences a debugger notice
}


def _stop(number: int, frame: FrameType | None) -> None:
    if Kernel.running is not None:
        Kernel.running.terminate()
    raise SystemExit(128 + number)


def find_notebooks(names: list[str], folder: Path) -> list[Path]:
    """Notebook files for `names`: a path, a stem, or how the stem begins ("03").

    No names: the course, all of them. Raises ValueError for a name that finds none.
    """
    if not names:
        found = sorted(folder.glob(COURSE))
        if not found:
            raise ValueError(
                f"{folder}: no notebooks {COURSE} there; go to the repository"
            )
        return found
    paths: list[Path] = []
    for name in names:
        if name.endswith(".ipynb") and Path(name).is_file():
            paths.append(Path(name))
            continue
        found = sorted(folder.glob(f"{name.removesuffix('.ipynb')}*.ipynb"))
        if not found:
            known = ", ".join(path.stem for path in sorted(folder.glob("*.ipynb")))
            raise ValueError(f"no notebook {name!r} in {folder}; there are: {known}")
        paths += found
    return paths


def execute(
    path: Path, run_dir: Path, parameters: dict[str, Any], position: str = ""
) -> bool:
    """Execute one notebook into run_dir/notebooks; True if its last cell ran.

    Prints one line, and the traceback's end on failure.
    """
    out = run_dir / "notebooks" / path.name
    out.parent.mkdir(parents=True, exist_ok=True)
    live = sys.stdout.isatty()
    label = f"{position:>6} {path.stem:<24}"
    if not live:
        print(label, end="", flush=True)
    began = time.perf_counter()
    failure = ""
    try:
        papermill.execute_notebook(
            path,
            out,
            parameters,
            kernel_name="python3",
            language="python",
            kernel_manager_class=Kernel,
            extra_arguments=["--log-level=40"],  # no notices about its sockets
            cwd=path.resolve().parent,  # where JupyterLab would run it
            progress_bar=live
            and {
                "desc": label,
                "leave": False,
                "bar_format": "{desc} cell {n_fmt}/{total_fmt}  {elapsed}",
            },
        )
    except PapermillExecutionError as error:
        failure = error_text(read_notebook(out)) or str(error)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            out.unlink(missing_ok=True)  # half a notebook
        raise
    seconds = time.perf_counter() - began
    executed = read_notebook(out)
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    ran = sum(cell.execution_count is not None for cell in cells)
    done = not failure and ran_to_end(executed)
    status = "done" if done else "failed"
    facts = {"status": status, "cells": len(cells), "cells_run": ran}
    record_stage(run_dir, path.stem, seconds, group="notebooks", **facts)
    line = f"{status:<6} {seconds:7.1f} s  cell {ran}/{len(cells)}"
    print(f"{label} {line}" if live else f" {line}", flush=True)
    if not done:
        tail = failure.splitlines()[-25:] or ["it ended before its last cell"]
        print("\n".join(tail), f"\nthe executed copy: {out}", sep="\n", file=sys.stderr)
    return done


def run(
    names: list[str],
    scale: str,
    run_dir: str,
    given: dict[str, str],
    fresh: bool,
    folder: Path,
    slots: list[str | None],
) -> int:
    """Check everything, then execute in order; 0, or 1 at the first failure.

    given: parameter -> text; several values make a sweep, a job for each combination,
    as many at once as there are slots (see Queue).
    Raises ValueError (before any kernel starts) for what the user got wrong.
    """
    scale_path(scale)
    target = resolve_run_dir(run_dir, scale)
    paths = find_notebooks(names, folder)
    own = {p.stem: read_parameters(read_notebook(p), p.name) for p in paths}
    known = {name: value for values in own.values() for name, value in values.items()}
    wanted = combinations(given, known)
    for one in wanted:
        typed = check_parameters(one, own)
    if len(wanted) > 1:
        swept = [name for name in given if len({one[name] for one in wanted}) > 1]
        jobs = {job_name(one, swept): one for one in wanted}
        if len(jobs) < len(wanted):
            raise ValueError(f"-p {' '.join(swept)}: a value is listed twice")
        module = [sys.executable, "-m", "univg_nb", "run"]
        command = [*module, *names, "--scale", scale, *["--fresh"] * fresh]
        return Queue(target, jobs, command, slots).run(fresh)
    common = {"SCALE": scale, "RUN_DIR": str(target), "FRESH": fresh}
    for name, value in (OFFLINE | KEEP_MEMORY).items():
        os.environ.setdefault(name, value)
    kernels = Path(sys.prefix) / "share" / "jupyter"  # this venv's kernel comes first
    others = os.environ.get("JUPYTER_PATH", "")
    os.environ["JUPYTER_PATH"] = f"{kernels}{os.pathsep}{others}".rstrip(os.pathsep)
    signal.signal(signal.SIGTERM, _stop)
    began = time.perf_counter()
    for number, path in enumerate(paths, start=1):
        mine = own[path.stem]
        values = {k: v for k, v in common.items() if k in mine} | typed[path.stem]
        if not execute(path, target, values, f"{number}/{len(paths)}"):
            return 1
    report(target, time.perf_counter() - began)
    return 0


def changed_scale(scale: str, assignments: list[str], run_dir: str) -> str:
    """The scale with options set, written to the run folder; `scale` if none are.

    Every notebook then reads the same file. Raises ValueError as `override` does.
    """
    if not assignments:
        return scale
    config = load_scale(scale)
    for assignment in assignments:
        config = override(config, assignment)
    path = resolve_run_dir(run_dir, scale) / "scale.yaml"
    write_text(path, dump(config))
    return str(path)


def report(run_dir: Path, seconds: float) -> None:
    """Print the result table, if the run has one, and where everything lies."""
    table = run_dir / "tables" / "results.md"
    if table.is_file():
        print(f"\n{table.read_text(encoding='utf-8').rstrip()}")
    print(f"\ndone in {seconds / 60:.1f} min; see")
    for name in ("notebooks", "figures", "tables", "manifest.json"):
        if (run_dir / name).exists():
            print(f"  {name:<14} {run_dir / name}")


def record_all(names: list[str], run_dir: Path, folder: Path) -> None:
    """record() every notebook of `folder` that run_dir holds an executed copy of."""
    for path in find_notebooks(names, folder):
        copy = run_dir / "notebooks" / path.name
        if not copy.is_file():
            raise ValueError(f"{copy} is missing; run {path.stem} first")
        print(f"{path.stem:<24} {record(path, copy) / 1000:7.0f} KB")


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 1 a notebook failed, 2 wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m univg_nb run", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("names", nargs="*", help="e.g. 03; none: the course")
    parser.add_argument("--scale", default="tiny", help="a shipped scale or a .yaml")
    parser.add_argument(
        "-p",
        dest="given",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help="set a notebook parameter (true, false, numbers, lists are understood); "
        "several values, as a,b or 0:3, make a sweep",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="jobs of a sweep at once (without --gpus)"
    )
    parser.add_argument(
        "--gpus", nargs="+", help="a sweep's GPUs, one job on each: 0 1, or 0,1 2,3"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="an option of the scale, for all notebooks",
    )
    parser.add_argument("--run-dir", default="", help="default: runs/SCALE")
    parser.add_argument("--fresh", action="store_true", help="reuse no finished stage")
    parser.add_argument(
        "--record",
        metavar="RUN_DIR",
        help="copy executed outputs from there into notebooks/ and run nothing",
    )
    options = parser.parse_args(arguments)
    folder = repo_root() / "notebooks"
    try:
        if options.record:
            record_all(options.names, resolve_run_dir(options.record), folder)
            return 0
        run_dir = options.run_dir or f"runs/{Path(options.scale).stem}"
        return run(
            options.names,
            changed_scale(options.scale, options.set, run_dir),
            run_dir,
            dict(options.given),
            options.fresh,
            folder,
            options.gpus or [None] * max(1, options.jobs),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        place = error.filename or run_dir
        print(
            f"error: no space left on the disk of {place}; free some and call again: "
            "finished stages are reused, what was half-written is made anew",
            file=sys.stderr,
        )
        return 1
    finally:
        if Kernel.running is not None:
            Kernel.running.wait_for_children()


if __name__ == "__main__":
    sys.exit(main())

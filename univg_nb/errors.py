"""One way to end: errors and exit codes of commands, processes and notebooks.

* 0: done.
* 1: the work failed (the disk is full, a training diverged) or a check found something.
* 2: a user's mistake, printed as one line ``error: …``.
* 130 or 143: ended by Ctrl-C or SIGTERM; 141: the reader of the output went away.
* A traceback means a defect of this package and nothing else. With ``python -X dev``
  every error has its traceback.
"""

import dis
import errno
import linecache
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import UnsupportedOperation
from typing import Any

MISTAKES = (  # what a user got wrong, whoever noticed it
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    UnicodeError,
)
WRONG_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, or what a user may take
FAILURES = (FloatingPointError, MemoryError, OSError)
# A server or the network failed, or a GPU is full: by name, as these are not imported.
OUTSIDE = {"httpx", "httpx2", "huggingface_hub", "openai", "OutOfMemoryError"}
# Libraries whose ValueErrors are about the options and models that a user names.
CHECKING = ("accelerate", "huggingface_hub", "peft", "transformers", "trl")
COURSE = (
    "IPython",
    "ipywidgets",
    "jupyter_client",
    "nbclient",
    "nbformat",
    "papermill",
    "voila",
)


def describe(error: BaseException) -> tuple[str, int] | None:
    """Return what to say of an error, and the exit code; None for a defect."""
    text, source = " ".join(str(error).split("\n")), _raised_in(error)
    if _is_disk_full(error):
        where = getattr(error, "filename", None) or "the output"
        remedy = "free some and call again: finished stages are reused"
        return f"no space left on the disk of {where}; {remedy}", 1
    if isinstance(error, ModuleNotFoundError) and error.name in COURSE:
        return f'{error.name} is missing: pip install "univg-nb[course]"', 2
    said = isinstance(error, ValueError) and source in ("univg_nb", *CHECKING)
    if isinstance(error, OSError):
        said = error.errno in WRONG_PATHS
    if said or isinstance(error, MISTAKES):
        return text, 2
    if isinstance(error, RuntimeError) and source == "univg_nb":
        return str(error), 1  # its further lines are the end of a log
    names = {type(error).__module__.partition(".")[0], type(error).__name__}
    if isinstance(error, FAILURES) or names & OUTSIDE:
        return text or "out of memory", 1
    return None


def _raised_in(error: BaseException) -> str:
    """Return the top package whose `raise` statement made an error, else "".

    A ValueError that int() or an unpacking raises is a defect of who called it.
    """
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None:
        return ""
    code, names = trace.tb_frame.f_code, trace.tb_frame.f_globals
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return str(names.get("__package__") or "").partition(".")[0] if raised else ""


def _is_disk_full(error: BaseException | None) -> bool:
    """Return whether a full disk is behind an error or what it was raised from."""
    if error is None:
        return False
    full = getattr(error, "errno", None) in FULL
    full |= any(os.strerror(code) in str(error) for code in FULL)  # of safetensors
    return full or _is_disk_full(error.__cause__ or error.__context__)


def run(work: Callable[[], int | None]) -> int:
    """Do the work of a command or module; return its exit code, errors printed."""
    try:
        try:
            return work() or 0
        finally:
            if sys.stdout:
                sys.stdout.flush()  # here, where a failure can still be handled
    except KeyboardInterrupt as interrupt:
        said = f": {interrupt}" if str(interrupt) else ""
        _say(f"interrupted{said}")
        return 130
    except Exception as error:
        found = None if sys.flags.dev_mode else describe(error)
        if isinstance(error, BrokenPipeError) or _is_disk_full(error):
            # What could not be printed must not be tried again at the exit.
            with suppress(UnsupportedOperation):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader, as `head`, has seen enough
            return 141
        if found is None:
            raise
        _say(f"error: {found[0]}")
        return found[1]


def _say(text: str) -> None:
    """Print a line to stderr, which is not to stand behind a progress bar."""
    bars = sys.modules.get("tqdm")
    (bars.tqdm.write if bars else print)(text, file=sys.stderr)


def shorten_in_notebooks() -> None:
    """In a notebook, show a mistake or failure as its line and that of the cell."""
    module = sys.modules.get("IPython")
    if module and (shell := module.get_ipython()):
        shell.set_custom_exc((Exception, KeyboardInterrupt), _show)


def _show(
    shell: Any, kind: type, error: BaseException, trace: Any, tb_offset: Any
) -> None:
    if isinstance(error, KeyboardInterrupt):
        error.__traceback__ = None  # its frames hold the model that was in training
        said = str(error) or "run the cell again to go on"
        shell._showtraceback(kind, error, [f"interrupted: {said}"])
        return
    found = describe(error)
    if found is None or sys.flags.dev_mode:
        shell.showtraceback((kind, error, trace), tb_offset, running_compiled_code=True)
        return
    where = ""
    while trace:  # the innermost line that stands in a cell
        code, number = trace.tb_frame.f_code, trace.tb_lineno
        if trace.tb_frame.f_globals.get("__name__") == "__main__":
            line = linecache.getline(code.co_filename, number).strip()
            where = f"\n  line {number}: {line}"
        trace = trace.tb_next
    shell._showtraceback(kind, error, [f"error: {found[0]}{where}"])

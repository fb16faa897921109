"""The command line: ``python -m univg_nb COMMAND``, also installed as ``univg-nb``.

Every command is a function ``main(arguments) -> int | None`` of the module that does
the work; only that module is imported. All commands end by the same rules:

* 0: done.
* 1: the work failed (the disk is full, a training diverged) or a check found something.
* 2: a user's mistake, printed as one line ``error: …``.
* 130 or 143: ended by Ctrl-C or SIGTERM; 141: the reader of the output went away.
* A traceback means a defect of this package and nothing else.
"""

import errno
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

COMMANDS = {  # name: (module, what it does)
    "run": ("launch.runner", "execute the notebooks of the course"),
    "audit": ("data.audit", "check a data file before anything is trained on it"),
    "sft": ("train.sft", "stage 1: fine-tune on reasoning chains"),
    "grpo": ("train.grpo", "stage 2: GRPO with difficulty weights"),
    "merge": ("train.merge", "fold adapters into the weights of a model"),
    "generate": ("evaluate.generate", "write a model's replies to a records file"),
    "score": ("evaluate.score", "score replies: accuracy with intervals"),
    "compare": ("evaluate.compare", "compare two models on the same items"),
    "report": ("figures.report", "write one HTML page on how models did"),
    "ask": ("figures.demo", "ask a model about your own pictures"),
    "figures": ("figures.publish", "write tables and figures of runs, for a paper"),
    "plan": ("launch.plan", "memory, hours and price of a training"),
    "download": ("launch.download", "fetch the released data and weights"),
    "study": ("study.reference", "train over several seeds and compare"),
}
MISTAKES = (  # what a user got wrong; everything else is a failure or a defect
    ValueError,
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
FAILURES = (FloatingPointError, MemoryError, OSError)
# A server or the network failed, or a GPU is full: by name, as these are not imported.
OUTSIDE = {"httpx", "httpx2", "huggingface_hub", "openai", "OutOfMemoryError"}
COURSE = (
    "IPython",
    "ipywidgets",
    "jupyter_client",
    "nbclient",
    "nbformat",
    "papermill",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    By default it is the process's own, which SIGTERM ends as Ctrl-C does, with 143.
    """
    words = list(arguments or [])
    if arguments is None:
        words = sys.argv[1:]
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        # bitsandbytes reports that an optional kernel is missing on newer CPUs.
        ops = logging.getLogger("bitsandbytes.backends.cpu.ops")
        ops.addFilter(lambda entry: "gemm_4bit_forward" not in str(entry.msg))
    try:
        code = _run(words)
        sys.stdout.flush()  # here, where a closed pipe can still be handled
        return code
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:  # the reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MISTAKES as error:
        return _say(f"error: {error}", 2)
    except ModuleNotFoundError as error:
        if error.name not in COURSE:
            raise
        missing = f'{words[0]} needs {error.name}: pip install "univg-nb[course]"'
        return _say(f"error: {missing}", 2)
    except Exception as error:
        if _is_disk_full(error):
            where = getattr(error, "filename", None) or "the output"
            remedy = "free some and call again: finished stages are reused"
            return _say(f"error: no space left on the disk of {where}; {remedy}", 1)
        names = {type(error).__module__.partition(".")[0], type(error).__name__}
        if isinstance(error, FAILURES) or names & OUTSIDE:
            return _say(f"error: {error or 'out of memory'}", 1)
        raise


def _run(words: list[str]) -> int:
    lines = ["usage: python -m univg_nb COMMAND [OPTIONS]\n"]
    lines += [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    lines += ["\npython -m univg_nb COMMAND --help shows the options and an example."]
    usage = "\n".join(lines)
    if words and words[0] in ("-h", "--help"):
        print(usage)
        return 0
    if not words or words[0] not in COMMANDS:
        problem = f"error: there is no command {words[0]!r}\n" if words else ""
        return _say(problem + usage, 2)
    module = importlib.import_module(f"univg_nb.{COMMANDS[words[0]][0]}")
    return module.main(words[1:]) or 0


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def _is_disk_full(error: BaseException | None) -> bool:
    """Return whether a full disk is behind an error or what it was raised from."""
    if error is None:
        return False
    code, text = getattr(error, "errno", None), str(error)  # the latter of safetensors
    full = code == errno.ENOSPC or "No space left on device" in text
    return full or _is_disk_full(error.__cause__ or error.__context__)


if __name__ == "__main__":
    sys.exit(main())

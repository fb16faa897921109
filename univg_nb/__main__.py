"""The command line: ``python -m univg_nb COMMAND``, also installed as ``univg-nb``.

Every command is a function ``main(arguments) -> int | None`` of the module that does
the work; only that module is imported. All of them end by the same rules:

* 0: done; 1: the work failed, or a check found something; 2: a user's mistake, printed
  as one line ``error: …``; 130: interrupted by Ctrl-C.
* A traceback means a defect of this package and nothing else.
"""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {  # name: (module, what it does)
    "run": ("launch.runner", "execute the notebooks of the course"),
    "audit": ("data.audit", "check a data file before anything is trained on it"),
    "sft": ("train.sft", "stage 1: fine-tune on reasoning chains"),
    "grpo": ("train.grpo", "stage 2: GRPO with difficulty weights"),
    "merge": ("train.merge", "fold adapters into the weights of a model"),
    "generate": ("evaluate.commands", "write a model's replies to a records file"),
    "score": ("evaluate.commands", "score replies: accuracy with intervals"),
    "compare": ("evaluate.commands", "compare two models on the same items"),
    "report": ("evaluate.commands", "write one HTML page on how models did"),
    "ask": ("figures.demo", "ask a model about your own pictures"),
    "figures": ("figures.tables", "write the tables of a run again"),
    "plan": ("launch.launcher", "memory, hours and price of a training"),
    "download": ("launch.download", "fetch the released data and weights"),
    "study": ("study.reference", "train over several seeds and compare"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: the command's name and its arguments; default: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"error: there is no command {words[0]!r}\n{_usage()}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"univg_nb.{COMMANDS[words[0]][0]}")
        nested = (
            "evaluate.commands",
            "data.audit",
            "launch.launcher",
        )  # until they move
        rest = words if COMMANDS[words[0]][0] in nested else words[1:]
        return module.main(rest) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            print(
                f"error: no space left on the disk of {error.filename or 'the run'}; "
                "free some and call again: finished stages are reused",
                file=sys.stderr,
            )
            return 1
        print(f"error: {error}", file=sys.stderr)
        return 2


def _usage() -> str:
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m univg_nb COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "python -m univg_nb COMMAND --help shows the options and an example.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ``python -m univg_nb COMMAND``, also installed as ``univg-nb``.

Every command is a function ``main(arguments) -> int | None`` of the module that does
the work; only that module is imported. All commands end as `errors` says.
"""

import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from univg_nb import errors

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
    "study": ("study.command", "train over several seeds and judge the claims"),
}


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
        if isinstance(sys.stdout, TextIOWrapper):  # a terminal may know ASCII only
            sys.stdout.reconfigure(errors="backslashreplace")
    return errors.run(lambda: _run(words))


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
        print(problem + usage, file=sys.stderr)
        return 2
    module = importlib.import_module(f"univg_nb.{COMMANDS[words[0]][0]}")
    return module.main(words[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())

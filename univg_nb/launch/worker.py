"""One process of a launched training: ``python -m univg_nb.launch.worker REQUEST``.

It trains as the notebook would (`sft.train` or `grpo.train`, on the rows and options of
the request file), checks that as many processes train together, and in the way, as were
asked for, and writes what it found to rank-N.json. It ends with a checkpoint after the
current update when the file `STOP` appears in the launch folder, when it receives
SIGTERM, or when the launcher is gone.
"""

import os
import re
import select
import signal
import stat
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.state import AcceleratorState
from torch.distributed.elastic.multiprocessing.errors import record

from univg_nb import errors
from univg_nb.data.sample import GroundingSample
from univg_nb.io import read_json, write_json
from univg_nb.runs import peak_memory_mb
from univg_nb.train import grpo, sft
from univg_nb.train.checkpoints import EndEarly, Training

TRAIN: dict[str, Callable[..., dict[str, Any]]] = {"sft": sft.train, "grpo": grpo.train}
DESCRIBE: dict[str, Callable[..., Training]] = {
    "sft": sft.describe,
    "grpo": grpo.describe,
}
STOP = "stop"  # file in the launch folder: end after the current update
ERROR = "error.json"  # file in the launch folder: why a process ended, and its code
# strategy -> accelerate's DistributedType in force, on GPUs and on CPUs
IN_FORCE = {
    "single": ("NO",),
    "ddp": ("MULTI_GPU", "MULTI_CPU"),
    "zero2": ("DEEPSPEED",),
    "zero3": ("DEEPSPEED",),
    "fsdp2": ("FSDP",),
}


class Interrupted(Exception):  # noqa: N818 (a request, not an error)
    """The training ended early, with a checkpoint, because it was asked to."""


class Supervisor(EndEarly):
    """Check the processes before the first update; end early, saved, when asked.

    `strategy` and `processes` are those that were asked for, `folder` is that of the
    launch.
    """

    def __init__(self, folder: Path, strategy: str, processes: int) -> None:
        super().__init__()
        self.folder, self.strategy, self.processes = folder, strategy, processes
        self.facts: dict[str, Any] = {
            "rank": int(os.environ.get("RANK", 0)),
            "pid": os.getpid(),
        }

    def write(self, state: str, **facts: Any) -> None:
        """Write the state (training, finished or interrupted) and what goes with it."""
        self.facts |= {"state": state, **facts}
        write_json(self.folder / f"rank-{self.facts['rank']}.json", self.facts)

    def note_signal(self, number: int, _: Any = None) -> None:
        """Signal handler: end after the current update, however often it comes."""
        self.signal = number

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Compare what accelerate set up with what was asked for.

        accelerate does not check: on CPUs it turns FSDP into DDP, and may start
        processes that do not know of each other.
        """
        found = AcceleratorState()
        kind = found.distributed_type.value
        if found.num_processes != self.processes:
            raise ValueError(
                f"{self.processes} processes were asked for, {found.num_processes} "
                "train together; check launch.processes, the number of nodes, and who "
                "started this process"
            )
        if kind not in IN_FORCE[self.strategy]:
            raise ValueError(
                f"launch.strategy = {self.strategy} was asked for, but accelerate runs "
                f"{kind}; on CPUs only single and ddp work, and with deepspeed zero2 "
                "and zero3"
            )
        dataset = more["train_dataloader"].dataset
        if "length" in dataset.column_names:  # rows tokenized before the training
            self.facts["longest_row"] = max(dataset["length"])
        self.write(
            "training",
            world_size=found.num_processes,
            distributed_type=kind,
            max_steps=state.max_steps,
            first_step=state.global_step,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Agree with the other processes on whether to end; save if so."""
        asked = bool(self.signal) or is_launcher_gone() or (self.folder / STOP).exists()
        votes = torch.tensor(float(asked), device=args.device)
        if self.processes > 1:  # the request reaches them at different updates
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
        if votes and state.global_step < state.max_steps:
            self.stopping = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the trainer, when every process has written its part."""
        if self.stopping:
            if self.processes > 1:
                torch.distributed.barrier()
            raise Interrupted


def is_launcher_gone() -> bool:
    """Return whether the launcher's end of the pipe on standard input is closed.

    The launcher never writes to the pipe, so what can be read there is its end. A
    process that was started in another way has no such pipe.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return False
    return bool(select.select([0], [], [], 0)[0])


def rows_of(found: list[dict[str, Any]]) -> list[GroundingSample]:
    """Return samples from their JSON form, in which tuples have become lists."""
    for row in found:
        row |= {"images": tuple(row["images"]), "answer": tuple(row["answer"])}
        row["boxes"] = tuple(tuple(box) for box in row["boxes"])
    return [GroundingSample(**row) for row in found]


def _peak_bytes(before: int) -> int:
    """Return the most memory of the training: of the GPU, or resident over `before`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status")  # getrusage counts the parent's before the start
    if not status.is_file():
        return peak_memory_mb() * 2**20 - before
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text())
    return int(peak[1]) * 1024 if peak else 0


def run(request: Mapping[str, Any], folder: Path) -> None:
    """Train as the request says; write rank-N.json to the launch folder."""
    supervisor = Supervisor(folder, request["strategy"], request["processes"])
    signal.signal(signal.SIGTERM, supervisor.note_signal)
    before, rows = psutil.Process().memory_info().rss, rows_of(request["rows"])
    options = {**request["options"], "callbacks": [supervisor]}
    try:
        TRAIN[request["stage"]](request["config"], request["out"], rows, **options)
    except Interrupted:
        supervisor.write("interrupted")
    except Exception as error:
        told = None if isinstance(error, ConnectionError) else errors.describe(error)
        if told:  # and no defect, nor the end of another process
            with suppress(OSError):
                write_json(folder / ERROR, told)
        raise
    else:
        supervisor.write("finished", peak_bytes=_peak_bytes(before))


@record
def main() -> None:
    """Run one process; torchrun reports the error if it fails."""
    path = Path(sys.argv[1])
    run(read_json(path), path.parent)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

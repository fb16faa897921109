"""One process of a launched training: ``python -m univg_nb.launch.worker REQUEST``.

It trains as the notebook would (`sft.train` or `grpo.train`, on the rows and options of
the request file), checks that as many processes train together, and in the way, as were
asked for, and writes what it found to rank-N.json. It ends with a checkpoint after the
current update when the file `STOP` appears in the launch folder, when it receives
SIGTERM, or when the launcher is gone.
"""

import contextlib
import os
import select
import signal
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.state import AcceleratorState
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import TrainerCallback

from univg_nb.data.sample import GroundingSample
from univg_nb.io import locked, read_json, write_json
from univg_nb.runs import peak_memory_mb
from univg_nb.train import grpo, sft

STOP = "stop"  # file in the launch folder: end after the current update
LOCK = "trainer.lock"  # held by rank 0 as long as it runs
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


class Supervisor(TrainerCallback):
    """Check the processes before the first update; end early, saved, when asked.

    Attributes:
        facts: what rank-N.json says of this process.
    """

    def __init__(self, folder: Path, rank: int, strategy: str, processes: int) -> None:
        self.folder = folder
        self.strategy = strategy
        self.processes = processes
        self.facts: dict[str, Any] = {"rank": rank, "pid": os.getpid()}
        self.signaled = self.stopping = False
        signal.signal(signal.SIGTERM, self._note_signal)

    def write(self, state: str, **facts: Any) -> None:
        """Write the state (training, finished or interrupted) and what goes with it."""
        self.facts |= {"state": state, **facts}
        write_json(self.folder / f"rank-{self.facts['rank']}.json", self.facts)

    def _note_signal(self, *_: Any) -> None:
        self.signaled = True

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Compare what accelerate set up with what was asked for."""
        found = AcceleratorState()
        kind = found.distributed_type.value
        check_processes(self.strategy, self.processes, found.num_processes, kind)
        dataset = train_dataloader.dataset
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
        asked = self.signaled or is_launcher_gone() or (self.folder / STOP).exists()
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


def check_processes(strategy: str, asked: int, found: int, kind: str) -> None:
    """Raise ValueError unless `found` processes train together as `strategy` says.

    accelerate does not check: on CPUs it turns FSDP into DDP, and may start processes
    that do not know of each other.

    Args:
        strategy: launch.strategy of the scale.
        asked: launch.processes of the scale.
        found: number of processes in the process group.
        kind: accelerate's DistributedType in force.
    """
    if found != asked:
        raise ValueError(
            f"{asked} processes were asked for, {found} train together; check "
            "launch.processes, the number of nodes, and who started this process"
        )
    if kind not in IN_FORCE[strategy]:
        raise ValueError(
            f"launch.strategy = {strategy} was asked for, but accelerate runs {kind}; "
            "on CPUs only single and ddp work, and with deepspeed zero2 and zero3"
        )


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
    lines = (line.partition(":") for line in status.read_text().splitlines())
    return int({name: rest for name, _, rest in lines}["VmHWM"].split()[0]) * 1024


def run(request: Mapping[str, Any], folder: Path) -> None:
    """Train as the request says; write rank-N.json to the launch folder."""
    rank, world = (
        int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    asked, strategy = request["processes"], request["strategy"]
    if world != asked:  # before the weights are loaded
        check_processes(strategy, asked, world, IN_FORCE[strategy][0])
    supervisor = Supervisor(folder, rank, strategy, asked)
    before, rows = psutil.Process().memory_info().rss, rows_of(request["rows"])
    train = sft.train if request["stage"] == "sft" else grpo.train
    options = {**request["options"], "callbacks": [supervisor]}
    lock = locked(folder / LOCK, f"{folder.parent}: another process trains there")
    with lock if rank == 0 else contextlib.nullcontext():
        try:
            train(request["config"], request["out"], rows, **options)
        except Interrupted:
            supervisor.write("interrupted")
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

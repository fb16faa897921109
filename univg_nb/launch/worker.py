"""What each process of a launched training runs: python -m univg_nb.launch.worker REQUEST.

It trains as the notebook would (sft.train or grpo.train, on the rows and options of
the request), keeps its state in a file that the launcher watches, makes sure that as
many processes train together, and in the way, as were asked for, and answers SIGTERM,
or the launcher's file STOP, with a checkpoint after the update at hand.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import TrainerCallback

from univg_nb.data.sample import GroundingSample
from univg_nb.io import read_json, write_json
from univg_nb.launch.children import STOP, gone
from univg_nb.runs import peak_memory_mb

# strategy -> accelerate's DistributedType in force, on GPUs and on CPUs
IN_FORCE = {
    "single": ("NO",),
    "ddp": ("MULTI_GPU", "MULTI_CPU"),
    "zero2": ("DEEPSPEED",),
    "zero3": ("DEEPSPEED",),
    "fsdp2": ("FSDP",),
}


class Status:
    """rank-N.json in the launch folder: this process's state for the launcher."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank-{rank}.json"
        self.facts: dict[str, Any] = {"rank": rank, "pid": os.getpid()}
        self.facts["host"] = socket.gethostname()

    def set(self, state: str, **facts: Any) -> None:
        """started, training, finished, interrupted or failed, and what goes with it."""
        self.facts |= {"state": state, "time": time.time(), **facts}
        write_json(self.path, self.facts)


class Watch(TrainerCallback):
    """Checks the processes before the first update; stops at SIGTERM, saved.

    launcher: who started this, {pid, host, time}. A kernel that was killed cannot send
    a signal, and a training that nobody watches would hold its GPUs.
    """

    def __init__(
        self,
        status: Status,
        strategy: str,
        processes: int,
        launcher: Mapping[str, Any],
    ) -> None:
        self.status = status
        self.strategy = strategy
        self.processes = processes
        self.launcher = launcher
        self.asked = False  # by a signal to this process
        self.stopping = False  # agreed by all
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, *_: Any) -> None:
        """Signal handler: end after the update at hand."""
        self.asked = True

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        found = AcceleratorState()
        kind = found.distributed_type.value
        check_processes(self.strategy, self.processes, found.num_processes, kind)
        if self.strategy in ("zero2", "zero3"):
            stage = found.deepspeed_plugin.zero_stage
            if stage != int(self.strategy[-1]):
                raise ValueError(
                    f"{self.strategy} was asked for, DeepSpeed runs stage {stage}; "
                    "check scales/accelerate"
                )
        self.status.set(
            "training",
            world_size=found.num_processes,
            distributed_type=kind,
            max_steps=state.max_steps,
            first_step=state.global_step,
            **longest_row(train_dataloader.dataset),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        stop = self.status.path.parent / STOP  # other nodes get no signal of ours
        asked = self.asked or gone(self.launcher) or stop.exists()
        asked = torch.tensor(float(asked), device=args.device)
        if self.processes > 1:  # a signal reaches the processes at different updates
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if asked and state.global_step < state.max_steps:
            self.stopping = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.stopping:
            return
        if self.processes > 1:
            torch.distributed.barrier()  # all of them have written their part
        self.status.set("interrupted", step=state.global_step)
        raise SystemExit(128 + signal.SIGTERM)


def check_processes(strategy: str, asked: int, found: int, kind: str) -> None:
    """ValueError unless `found` processes train together as `strategy` says.

    accelerate does not: on CPUs it turns FSDP into DDP, and may start processes that
    know nothing of each other (DESIGN sec. 9).
    """
    if found != asked:
        raise ValueError(
            f"{asked} processes were asked for, {found} train together; check "
            "launch.processes, the number of nodes, and who started this process"
        )
    if kind not in IN_FORCE[strategy]:
        raise ValueError(
            f"launch.strategy = {strategy} was asked for, but accelerate runs {kind}; "
            f"on CPUs only single and ddp work, and with deepspeed zero2 and zero3"
        )


def rows_of(found: list[dict[str, Any]]) -> list[GroundingSample]:
    """Samples from their JSON form, whose tuples came back as lists."""
    for row in found:
        row |= {"images": tuple(row["images"]), "answer": tuple(row["answer"])}
        row["boxes"] = tuple(tuple(box) for box in row["boxes"])
    return [GroundingSample(**row) for row in found]


def longest_row(dataset: Dataset) -> dict[str, int]:
    """{"longest_row": tokens}, where the rows are tokenised before the training."""
    if "length" not in dataset.column_names:
        return {}
    return {"longest_row": max(dataset["length"])}


def resident(peak: bool) -> int:
    """Bytes of memory of this process, now or at most.

    Not getrusage where Linux has better: it counts the parent's before the start.
    """
    key, status = "VmHWM" if peak else "VmRSS", Path("/proc/self/status")
    if not status.is_file():
        return peak_memory_mb() * 2**20
    lines = (line.partition(":") for line in status.read_text().splitlines())
    return int({name: rest for name, _, rest in lines}[key].split()[0]) * 1024


def peak_bytes(before: int) -> int:
    """Most memory the training had: of its GPU, or resident beyond `before`, which is
    what Python and its libraries take."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resident(peak=True) - before


def run(request: dict[str, Any], status: Status) -> None:
    """Train as the request says; rank 0 leaves the summary for the launcher."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    asked, strategy = request["processes"], request["strategy"]
    if world != asked:  # before the weights are loaded
        check_processes(strategy, asked, world, IN_FORCE[strategy][0])
    # Both trainers take the Trainer's own list of callbacks: the one way in that asks
    # nothing of them.
    watch = Watch(status, strategy, asked, request["launcher"])
    transformers.trainer.DEFAULT_CALLBACKS.append(watch)
    if request["stage"] == "sft":
        from univg_nb.train.sft import train
    else:
        from univg_nb.train.grpo import train
    before, rows = resident(peak=False), rows_of(request["rows"])
    summary = train(request["config"], request["out"], rows, **request["options"])
    status.set("finished", peak_bytes=peak_bytes(before))
    if status.facts["rank"] == 0:
        write_json(status.path.parent / "summary.json", summary)


def main() -> None:
    """One process; its own output goes to rank-N.log beside its state."""
    path = Path(sys.argv[1])
    rank = int(os.environ.get("RANK", "0"))
    log = os.open(path.parent / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT, 0o644)
    os.ftruncate(log, 0)
    for stream in (1, 2):
        os.dup2(log, stream)
    status = Status(path.parent, rank)
    status.set("started")
    try:
        run(read_json(path), status)
    except Exception as error:
        traceback.print_exc()
        last = f"{type(error).__name__}: {error}"
        status.set("failed", error=last)
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

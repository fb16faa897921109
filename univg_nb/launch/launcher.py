"""Train in processes of their own: one GPU, several, several nodes.

    launch.train("sft", config, out, rows, adapter="lora")     # from a notebook
    python -m univg_nb plan full --gpu H100-80G --gpus 8

A scale with a `launch` section trains in children of accelerate (on CPUs: torchrun,
but for DeepSpeed), one process a GPU; one without it trains here. The child's metrics
are shown as they come. Ctrl-C and SIGTERM end it after the update at hand, with a
checkpoint; the same call goes on from there. If a process fails, the others are ended
and its last lines are raised.
"""

import argparse
import gc
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from univg_nb.config import SCALES, spread
from univg_nb.data.sample import GroundingSample
from univg_nb.io import read_json, write_json
from univg_nb.launch.children import (
    CHECKPOINT,
    STOP,
    Children,
    Stopped,
    running,
    states_in,
    watch,
)
from univg_nb.launch.live import Live

Stage = Literal["sft", "grpo"]
ZERO = ("zero2", "zero3")  # the strategies that are DeepSpeed's


# ---------------------------------------------------------------- what to start


def strategy_of(launch: Mapping[str, Any]) -> str:
    """launch.strategy, which one process makes single, and several make ddp."""
    if launch.get("processes", 1) == 1:
        return "single"
    strategy = launch.get("strategy", "ddp")
    return "ddp" if strategy == "single" else strategy


def command(
    launch: Mapping[str, Any], configured: bool, worker: Sequence[str]
) -> list[str]:
    """The command line of the launcher: of accelerate with the file of the strategy if
    `configured`, else of torchrun. worker: ["-m", module, request].

    Several nodes: within a Slurm job each gets the same command by srun; elsewhere it
    has to be started on each by hand. They meet at MASTER_ADDR:launch.port.
    """
    processes, nodes = launch.get("processes", 1), launch.get("nodes", 1)
    if processes == 1:
        return [sys.executable, *worker]
    if processes % nodes:
        raise ValueError(
            f"launch.processes = {processes} do not divide over {nodes} nodes"
        )
    port, address = launch.get("port", 0), os.environ.get("MASTER_ADDR", "")
    if nodes > 1 and not (address and port):
        raise ValueError(
            "several nodes need MASTER_ADDR (the first node's name) and launch.port; "
            "univg_nb/scales/slurm.sh sets both"
        )
    if configured:
        strategy = strategy_of(launch)
        agent = ["-m", "accelerate.commands.launch"]
        agent += ["--config_file", str(SCALES / "accelerate" / f"{strategy}.yaml")]
        agent += ["--num_processes", str(processes), "--num_machines", str(nodes)]
        agent += ["--main_process_port", str(port)]
        if nodes > 1:  # c10d numbers the nodes as they arrive
            agent += ["--main_process_ip", address, "--rdzv_backend", "c10d"]
            agent += ["--machine_rank", os.environ.get("SLURM_NODEID", "0")]
    else:
        agent = ["-m", "torch.distributed.run"]
        agent += ["--nproc_per_node", str(processes // nodes)]
        agent += ["--standalone"] if nodes == 1 else ["--nnodes", str(nodes)]
        if nodes > 1:
            agent += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{address}:{port}"]
            agent += ["--rdzv_id", os.environ.get("SLURM_JOB_ID", "univg")]
    if nodes == 1:
        return [sys.executable, *agent, *worker]
    prefix = []
    if "SLURM_JOB_ID" in os.environ:
        prefix = ["srun", "--ntasks-per-node=1", f"--nodes={nodes}"]
        prefix += ["--kill-on-bad-exit=1"]
    return [*prefix, sys.executable, *agent, *worker]


def environment(strategy: str, gpu: bool) -> dict[str, str]:
    """The children's. On CPUs DeepSpeed works; FSDP in accelerate does not: asked for
    all the same, so that the check in the worker speaks instead of DDP unasked."""
    made = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(CHECKPOINT))}
    made["PYTHONPATH"] = os.pathsep.join(
        [str(SCALES.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if not gpu and strategy == "fsdp2":
        made |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    elif not gpu and strategy in ZERO:
        made["DS_ACCELERATOR"] = "cpu"
    return made


def resume_statement(before: int, now: int, strategy: str, vllm: bool = False) -> str:
    """What is and is not exact when a checkpoint goes on, with so many processes.

    vllm: whether it samples the replies; its engines begin anew.
    Raises ValueError where it cannot go on at all.
    """
    if before == now:
        but = ", but for the replies, which vLLM samples anew" if vllm else ""
        return f"goes on with {now} process(es), as before: exact{but}"
    if strategy in ZERO:
        raise ValueError(
            f"the checkpoint was written by {before} processes under DeepSpeed, whose "
            f"optimiser files hold for that number; use {before} processes, or begin "
            "anew (FRESH) with strategy fsdp2"
        )
    return (
        f"goes on with {now} process(es) after {before}. Exact: weights, optimiser, "
        "schedule, which samples each update sees. Not exact: the order of sums, so "
        "losses agree to rounding only; and what draws random numbers per process: "
        "dropout, and replies sampled by vLLM or in TRL's own way"
    )


# ---------------------------------------------------------------- the one call


def train(
    stage: Stage,
    config: dict[str, Any],
    out: str | Path,
    rows: Sequence[GroundingSample],
    **options: Any,
) -> dict[str, Any]:
    """sft.train(config, out, rows, **options), or grpo.train: here, or launched.

    Returns the training's summary. Raises RuntimeError with the last lines of the
    process that failed, KeyboardInterrupt or SystemExit after a signal, and ValueError
    before anything starts for a layout that cannot be or a package that is missing.
    """
    if "launch" not in config:
        from univg_nb.train import grpo, sft

        trainer = sft.train if stage == "sft" else grpo.train
        return trainer(config, out, rows, **options)
    import torch

    from univg_nb.launch import plan

    gpu, config = torch.cuda.is_available(), spread(config, stage)
    processes = config["launch"].get("processes", 1)
    strategy = strategy_of(config["launch"])
    missing = [c for c in plan.check_packages(config, strategy) if not c.ok]
    if missing:
        raise ValueError("; ".join(f"{c.name} {c.detail}" for c in missing))
    folder = Path(out).absolute() / "launch"
    request = {
        "stage": stage,
        "config": config,
        "out": str(Path(out).absolute()),
        "rows": [asdict(row) for row in rows],
        "options": options,
        "processes": processes,
        "strategy": strategy,
        "launcher": {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": time.time(),
        },
    }
    request = json.loads(json.dumps(request, default=str))  # paths become texts
    refuse_second(folder)
    vllm = stage == "grpo" and bool(config["grpo"].get("use_vllm"))
    announce_resume(folder, processes, strategy, vllm)
    for old in [*folder.glob("rank-*"), folder / "summary.json", folder / STOP]:
        old.unlink(missing_ok=True)
    write_json(folder / "request.json", request)
    worker = ["-m", "univg_nb.launch.worker", str(folder / "request.json")]
    arguments = command(config["launch"], gpu or strategy in ZERO, worker)
    if gpu:  # what the notebook has dropped would still fill it for the children
        gc.collect()
        torch.cuda.empty_cache()
    write_json(folder / "launched.json", {"processes": processes, "command": arguments})
    try:
        children = Children(folder, arguments, environment(strategy, gpu))
        watch(children, Live(Path(out), stage))
    except Stopped as stopped:
        if stopped.args[0] == signal.SIGINT:
            raise KeyboardInterrupt from stopped
        raise SystemExit(128 + signal.SIGTERM) from stopped
    return read_json(folder / "summary.json")


def refuse_second(folder: Path) -> None:
    """ValueError while the processes of an earlier call train in this folder, as they
    do to the end of their update when its notebook was killed."""
    left = [
        f"rank {state['rank']} (pid {state['pid']})"
        for state in states_in(folder)
        if state["state"] in ("started", "training") and running(state)
    ]
    if left:
        raise ValueError(
            f"{folder.parent}: an earlier call still trains there: {', '.join(left)}; "
            "call again when it has ended with its checkpoint, or end it with kill PID"
        )


def announce_resume(
    folder: Path, processes: int, strategy: str, vllm: bool = False
) -> None:
    """Say how exact going on will be, if there is a checkpoint to go on from."""
    launched = folder / "launched.json"
    if launched.is_file() and any(folder.parent.glob("checkpoints/checkpoint-*")):
        before = read_json(launched)["processes"]
        statement = resume_statement(before, processes, strategy, vllm)
        print(f"{folder.parent.name} {statement}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: the plan of a scale."""
    from univg_nb.launch import plan

    parser = argparse.ArgumentParser(prog="python -m univg_nb.launch.launcher")
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("plan", help="memory, time, price, and what is missing")
    plan.add_arguments(sub)
    try:
        return plan.main(parser.parse_args(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

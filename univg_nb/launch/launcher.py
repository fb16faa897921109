"""Train here, or in processes of their own: one GPU, several, several nodes.

    launcher.train("sft", config, out, rows, adapter="lora")

A scale with a `launch` section trains in processes that accelerate starts with its
configuration file of the strategy, one process for each GPU (on CPUs without DeepSpeed:
torchrun). A scale without it trains in the calling process. A bar shows the updates.
Ctrl-C and SIGTERM end the training after the current update, with a checkpoint; the
same call resumes it. If a process fails, the others are ended and its error is raised.
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

import torch
from tqdm.auto import tqdm

from univg_nb.config import SCALES, spread
from univg_nb.data.sample import GroundingSample
from univg_nb.io import locked, read_json, read_jsonl, write_json
from univg_nb.launch import plan
from univg_nb.launch.cost import Stage, choose_strategy
from univg_nb.launch.worker import DESCRIBE, ERROR, STOP, TRAIN
from univg_nb.train.checkpoints import describe_resume, find_checkpoint

ZERO = ("zero2", "zero3")  # the strategies that are DeepSpeed's
LOG = "console.log"  # file in the launch folder


# ---------------------------------------------------------------- what to start


def command(
    launch: Mapping[str, Any], configured: bool, worker: Sequence[str]
) -> list[str]:
    """Return the command line that starts processes, each with the arguments `worker`.

    They start with accelerate and the strategy's file if `configured`, else with
    torchrun. On several nodes within a Slurm job srun gives each node the same command;
    elsewhere it has to be started on each node by hand. They meet at
    MASTER_ADDR:launch.port. Raises ValueError if the processes do not divide over the
    nodes, or the nodes have no address to meet at.
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
    job = os.environ.get("SLURM_JOB_ID", "")
    if configured:
        strategy = choose_strategy(processes, launch.get("strategy"))
        file = SCALES / "accelerate" / f"{strategy}.yaml"
        agent = ["accelerate.commands.launch", "--config_file", str(file)]
        agent += ["--num_processes", str(processes), "--num_machines", str(nodes)]
        agent += ["--main_process_port", str(port)]
        meeting = ["--main_process_ip", address]
        meeting += ["--machine_rank", os.environ.get("SLURM_NODEID", "0")]
    else:
        agent = ["torch.distributed.run", "--nproc_per_node", str(processes // nodes)]
        agent += ["--standalone"] if nodes == 1 else ["--nnodes", str(nodes)]
        meeting = ["--rdzv_endpoint", f"{address}:{port}", "--rdzv_id", job or "univg"]
    if nodes > 1:  # c10d numbers the nodes as they arrive
        agent += ["--rdzv_backend", "c10d", *meeting]
    slurm = ["srun", "--ntasks-per-node=1", f"--nodes={nodes}", "--kill-on-bad-exit=1"]
    started_by = slurm if nodes > 1 and job else []
    return [*started_by, sys.executable, "-m", *agent, *worker]


def resume_statement(before: int, now: int, strategy: str, vllm: bool = False) -> str:
    """Say what is exact and what is not when a training resumes from a checkpoint.

    `before` processes wrote it, `now` processes resume from it; `vllm` samples the
    replies, whose engines start without a state. Raises ValueError if the checkpoint
    cannot be resumed with that number.
    """
    if before == now:
        but = ", but for the replies, which vLLM samples anew" if vllm else ""
        return f"goes on with {now} process(es), as before: exact{but}"
    if strategy in ZERO:
        raise ValueError(
            f"the checkpoint was written by {before} processes under DeepSpeed, whose "
            f"optimizer files hold for that number; use {before} processes, or begin "
            "anew (FRESH) with strategy fsdp2"
        )
    return (
        f"goes on with {now} process(es) after {before}. Exact: weights, optimizer, "
        "schedule, which samples each update sees. Not exact: the order of sums, so "
        "losses agree to rounding only; and what draws random numbers per process: "
        "dropout, and replies sampled by vLLM or in TRL's own way"
    )


# ---------------------------------------------------------------- training


def train(
    stage: Stage,
    config: dict[str, Any],
    out: str | Path,
    rows: Sequence[GroundingSample],
    *,
    fresh: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train a stage here or in launched processes; return the training's summary.

    Args:
        stage: "sft" or "grpo".
        config: a whole scale; its `launch` section says how the training is spread.
        out: the stage folder; logs of launched processes go to out/launch.
        rows: the training samples.
        fresh: begin again; a training that is in the folder is kept in replaced/.
        options: further keyword arguments of `sft.train` or `grpo.train`.

    Raises:
        RuntimeError: if a process failed, with its error (and rank, for a defect).
        KeyboardInterrupt, SystemExit: as it was raised here, or SystemExit if a process
            got SIGTERM; the processes have ended with a checkpoint.
        ValueError: before anything starts, for a layout that is not possible, a missing
            package, a folder that holds another training or in which another process
            trains.
    """
    if "launch" not in config:
        return TRAIN[stage](config, out, rows, fresh=fresh, **options)
    gpu, config = torch.cuda.is_available(), spread(config, stage)
    out, launch = Path(out).absolute(), config["launch"]
    processes = launch.get("processes", 1)
    strategy = choose_strategy(processes, launch.get("strategy"))
    missing = [c for c in plan.check_packages(config, strategy) if not c.ok]
    if missing:
        raise ValueError("; ".join(f"{c.name} {c.detail}" for c in missing))
    folder, path = out / "launch", out / "launch" / "request.json"
    worker = ["-m", "univg_nb.launch.worker", str(path)]
    arguments = command(launch, gpu or strategy in ZERO, worker)
    training = DESCRIBE[stage](config, rows, processes=processes, **options)
    # The processes hold the lock too (`passed`), should they outlive this one.
    with locked(out) as passed, training.claim(out, fresh) as finished:
        if finished:
            return finished
        if path.is_file() and any(out.glob("checkpoints/checkpoint-*")):
            vllm = stage == "grpo" and bool(config["grpo"].get("use_vllm"))
            before = read_json(path)["processes"]
            statement = resume_statement(before, processes, strategy, vllm)
            print(f"{out.name} {statement}")
            if found := find_checkpoint(out / "checkpoints", training.fingerprint):
                print(f"{out.name} {describe_resume(found)}", flush=True)
        for old in (*folder.glob("rank-*"), folder / STOP, folder / ERROR):
            old.unlink(missing_ok=True)
        (out / "summary.json").unlink(missing_ok=True)
        request = {
            "stage": stage,
            "config": config,
            "out": out,
            "options": options,
            "processes": processes,
            "strategy": strategy,
            "rows": [asdict(row) for row in rows],
        }
        write_json(path, json.loads(json.dumps(request, default=str)))
        if gpu:  # memory that the caller has released still belongs to this process
            gc.collect()
            torch.cuda.empty_cache()
        extra = {"DS_ACCELERATOR": "cpu"} if strategy in ZERO and not gpu else {}
        with (folder / LOG).open("w") as console:
            agent = subprocess.Popen(
                arguments,
                env={**os.environ, **extra},
                stdin=subprocess.PIPE,  # closed with this process: the sign to end
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it through us
                pass_fds=passed,
            )
        _wait(agent, out)
    return read_json(out / "summary.json")


def _wait(agent: subprocess.Popen, out: Path) -> None:
    """Wait until the processes end, on request early; raise if one failed."""
    folder = out / "launch"
    interrupt: BaseException | None = None
    pipe, bar = cast(IO[bytes], agent.stdin), tqdm(desc=out.name)
    try:
        while agent.poll() is None:
            time.sleep(0.3)
            _show_progress(bar, out)
    except (KeyboardInterrupt, SystemExit) as raised:
        interrupt = raised
        print("stopping after this update, with a checkpoint", flush=True)
        (folder / STOP).touch()
    finally:
        pipe.close()
        agent.wait()
        bar.close()
    interrupted = any(one["state"] == "interrupted" for one in states_in(folder))
    failed = agent.returncode or not (out / "summary.json").is_file()
    if failed and not interrupted:
        if (folder / ERROR).is_file():
            reason, code = read_json(folder / ERROR)
            if code == 2:
                raise ValueError(reason)
        else:
            reason = _describe_failure(agent, folder / LOG)
        raise RuntimeError(f"training stopped: {reason}")
    if interrupt or interrupted:  # the latter: someone else sent SIGTERM to a process
        if isinstance(interrupt, KeyboardInterrupt):
            done = "stopped with a checkpoint; run it again to go on"
            interrupt = KeyboardInterrupt(f"{out.name} {done}")
        raise interrupt or SystemExit(128 + signal.SIGTERM)


def _show_progress(bar: tqdm, out: Path) -> None:
    """Move the bar to the last update, with its loss or reward."""
    state, metrics = out / "launch" / "rank-0.json", out / "metrics.jsonl"
    if not (state.is_file() and metrics.is_file()):
        return
    if bar.total is None:
        facts = read_json(state)
        bar.reset(total=facts["max_steps"])
        bar.initial = bar.n = facts["first_step"]
        bar.set_description(
            f"{out.name}, {facts['world_size']} x {facts['distributed_type']}"
        )
    if rows := read_jsonl(metrics):
        shown = {k: f"{rows[-1][k]:.3g}" for k in ("loss", "reward") if k in rows[-1]}
        bar.set_postfix(shown, refresh=False)
        bar.update(rows[-1]["step"] - bar.n)


def _describe_failure(agent: subprocess.Popen, log: Path) -> str:
    """Return the rank that failed first and its error, from the launcher's output."""
    text = log.read_text(encoding="utf-8", errors="replace")
    reason = text.partition("Root Cause (first observed failure):")[2].strip(" =\n")
    if not reason:
        lines = "\n".join(text.splitlines()[-25:])
        reason = f"the process ended with {agent.returncode}\n{lines}"
    elif "SIGKILL" in reason:
        reason += " (out of memory?)"
    if shutil.disk_usage(log.parent).free < 2**16:  # then the log is not complete
        reason = f"no space left on the disk; {reason}"
    return f"{reason}\nlog: {log}"


def states_in(folder: Path) -> list[dict[str, Any]]:
    """Return what the processes of a launch folder wrote about themselves, by rank."""
    states = [read_json(path) for path in folder.glob("rank-*.json")]
    return sorted(states, key=lambda state: state["rank"])

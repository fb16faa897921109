"""Whether another process still runs, asked by what it wrote down about itself."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from univg_nb.io import read_json
from univg_nb.launch.live import Live

# DOC of children:
# """The processes of a launched training, watched from outside.

# Each writes its state to rank-N.json and its output to rank-N.log (see worker).
# """

CLOCK = 2.0  # seconds by which the clocks of a process and of its note may differ


def alive(process: psutil.Process) -> bool:
    """Whether it still runs; a dead child that nobody waited for does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def running(note: Mapping[str, Any]) -> psutil.Process | None:
    """The process of a note {pid, host, time}, if it runs on this machine.

    time: Unix seconds at which the process was there. One that began later got the
    number of one that is gone.
    """
    if note["host"] != socket.gethostname():
        return None
    try:
        process = psutil.Process(note["pid"])
        if process.create_time() > note["time"] + CLOCK:
            return None
    except psutil.NoSuchProcess:
        return None
    return process if alive(process) else None


def gone(note: Mapping[str, Any]) -> bool:
    """Whether a process of this machine is no more; False for another machine's."""
    return note["host"] == socket.gethostname() and running(note) is None


GRACE = 10.0  # seconds for the others to end when one process has failed
STOP = "stop"  # file in the launch folder: end after the update at hand
CHECKPOINT = 900.0  # seconds a checkpoint may take after a signal
NOTE = 2**16  # bytes: without them a process cannot write down why it fails
TAIL = 25  # last lines of a failed process


class Stopped(Exception):
    """A signal came while the children trained."""


class Children:
    """The launched processes, seen through their rank-N.json files."""

    def __init__(self, folder: Path, arguments: list[str], env: dict[str, str]) -> None:
        self.folder = folder
        # It does not hand SIGTERM on, it kills its processes, on all nodes.
        self.kills = arguments[0] == "srun"
        with open(folder / "console.log", "wb") as console:
            self.agent = subprocess.Popen(
                arguments,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a signal reaches it through us, once
            )

    def states(self) -> list[dict[str, Any]]:
        """What each process says of itself, by rank."""
        return states_in(self.folder)

    def failure(self) -> str:
        """The process that failed first, and its last lines; "" while none has.

        One that is gone without a word comes before one that raised: its death is what
        the others complain of.
        """
        states, ended = self.states(), self.agent.poll()
        for state in states:
            if state["state"] in ("started", "training") and gone(state):
                full = shutil.disk_usage(self.folder).free < NOTE
                why = "no space left on the disk" if full else "out of memory?"
                return self.describe(state, f"was killed ({why})")
        failed = [state for state in states if state["state"] == "failed"]
        if failed:
            first = min(failed, key=lambda state: state["time"])
            return self.describe(first, "failed")
        stopped = [state for state in states if state["state"] == "interrupted"]
        if ended and not stopped:
            return f"the launcher ended with {ended}\n{tail(self.folder, 'console')}"
        return ""

    def describe(self, state: dict[str, Any], what: str) -> str:
        """A failed process in words, with its last lines."""
        log = f"rank-{state['rank']}"
        where = f"rank {state['rank']} (pid {state['pid']} on {state['host']})"
        return f"{where} {what}\n{tail(self.folder, log)}"

    def processes(self) -> list[psutil.Process]:
        """Those of this machine that still run: below the launcher, and, where it is
        gone, the ones that reported themselves."""
        found: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.agent.pid).children(recursive=True):
                found[child.pid] = child
        reported = map(running, self.states())
        found |= {process.pid: process for process in reported if process}
        return [process for process in found.values() if alive(process)]

    def finish(self, seconds: float) -> None:
        """Ask for an end after the update at hand, and wait for it.

        Of processes on other nodes by the file they look for, of those here by SIGTERM.
        """
        (self.folder / STOP).touch()
        if self.kills:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.agent.wait(seconds)
            seconds = GRACE  # it has had its time
        self.stop(seconds)

    def stop(self, seconds: float) -> None:
        """SIGTERM; what is left after `seconds` is killed."""
        left = self.processes()
        if self.agent.poll() is None:
            self.agent.terminate()  # hands it on
        else:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.agent.poll() is not None and not any(map(alive, left)):
                return
            time.sleep(0.1)
        for process in filter(alive, left):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.agent.kill()
        self.agent.wait()
        psutil.wait_procs(left, timeout=GRACE)


def states_in(folder: Path) -> list[dict[str, Any]]:
    """What the processes of a launch folder say of themselves, by rank."""
    paths = folder.glob("rank-*.json")
    return sorted((read_json(path) for path in paths), key=lambda s: s["rank"])


def tail(folder: Path, name: str) -> str:
    """The last lines of a log."""
    path = folder / f"{name}.log"
    if not path.is_file():
        return f"({path}: nothing written)"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([*lines[-TAIL:], f"log: {path}"])


def watch(children: Children, live: Live, poll: float = 0.3) -> None:
    """Show metrics until the children end; RuntimeError if one failed, Stopped after
    a signal, when they have ended with a checkpoint."""
    came: list[int] = []
    before = [
        (number, signal.signal(number, lambda number, _: came.append(number)))
        for number in (signal.SIGTERM, signal.SIGINT)
    ]
    try:
        while children.agent.poll() is None and not came:
            time.sleep(poll)
            live.update(children.states())
            if failure := children.failure():
                children.stop(GRACE)
                raise RuntimeError(f"training stopped: {failure}")
        if came:
            print("stopping after this update, with a checkpoint", flush=True)
            children.finish(CHECKPOINT)
            raise Stopped(came[0])
        children.agent.wait()
        live.update(children.states())
        if failure := children.failure():
            children.stop(GRACE)  # a launcher that was killed leaves the others behind
            raise RuntimeError(f"training stopped: {failure}")
        if any(state["state"] == "interrupted" for state in children.states()):
            raise Stopped(signal.SIGTERM)  # sent to the children by someone else
    finally:
        live.close()
        for number, handler in before:
            signal.signal(number, handler)

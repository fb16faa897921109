"""Whether another process still runs, asked by what it wrote down about itself."""

import socket
from collections.abc import Mapping
from typing import Any

import psutil

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

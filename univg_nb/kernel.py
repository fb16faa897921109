"""The kernel that the notebook runner starts: it hears of SIGTERM."""

import os
import signal
import time
from typing import Any, ClassVar

import psutil
from jupyter_client import AsyncKernelManager

from univg_nb.processes import alive


class Kernel(AsyncKernelManager):
    """A kernel that hears of SIGTERM, with all it started, and gets time to end."""

    running: ClassVar["Kernel | None"] = None
    told: list[psutil.Process] | None = None  # what was running when told to stop
    shutdown_wait_time = 20.0  # seconds

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        Kernel.running = self

    def terminate(self) -> None:
        """SIGTERM to the kernel's process group, which it leads."""
        if self.provisioner is not None and self.provisioner.has_process:
            pid = self.provisioner.process.pid
            self.told = psutil.Process(pid).children(recursive=True)
            os.killpg(pid, signal.SIGTERM)

    async def _async_interrupt_kernel(self) -> None:
        """Shutting down begins with SIGINT, which would cut a checkpoint short."""
        if self.told is None:
            await super()._async_interrupt_kernel()

    def wait_for_children(self, seconds: float = 600.0) -> None:
        """Wait until a trainer that the kernel launched has written its checkpoint:
        Slurm, for one, kills what is left when this process ends."""
        deadline = time.monotonic() + seconds
        while any(map(alive, self.told or [])) and time.monotonic() < deadline:
            time.sleep(0.1)

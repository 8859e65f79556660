"""Jobs of several processes on this machine: the real programs, each process one "host" with one CPU device.

Processes are forked from a server that has imported the programs but started nothing, so that a job begins in a second
rather than in ten. They meet on a free port of the loopback interface and talk through gloo, as JAX does on CPU.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["a2d_jax.train", "odlri_jax.calibrate"])


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _run(module: str, arguments: Sequence[str], log: Path, num_devices: int) -> None:
    """`python -m module arguments`, its output added to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    jax.config.update("jax_platforms", "cpu")  # the server has imported JAX, which read the environment then
    flags = f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"  # the last of two settings counts
    warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Job:
    """The processes of one job; as a context manager it leaves none of them behind.

    Args:
      module, arguments: the program, without the flags that say which process is which.
      logs: folder; process i writes i.log, and a job that is started there again writes on.
      num_processes: 1 starts the program without any of those flags.
      num_devices: virtual CPU devices of each process.
    """

    def __init__(self, module: str, arguments: Sequence[str], logs: Path, num_processes: int = 1, num_devices: int = 1):
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{i}.log" for i in range(num_processes)]
        coordinator = f"127.0.0.1:{free_port()}"
        self.processes = []
        for i, log in enumerate(self.logs):
            identity = [f"--coordinator={coordinator}", f"--num_processes={num_processes}", f"--process_id={i}"]
            command = [*arguments, *(identity if num_processes > 1 else [])]
            process = _FORKS.Process(target=_run, args=(module, command, log, num_devices), daemon=True)
            process.start()
            self.processes.append(process)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    def kill(self, which: Sequence[int] | None = None) -> None:
        """SIGKILL to some of the processes, or all."""
        chosen = self.processes if which is None else [self.processes[i] for i in which]
        for process in chosen:
            process.kill()
        for process in chosen:
            process.join()

    def is_running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = 300) -> list[int | None]:
        """Exit codes; None: still running after that time, in which this process, too, must run: a pause is none."""
        num_waits = int(seconds / 0.1)
        while self.is_running() and num_waits > 0:
            time.sleep(0.1)
            num_waits -= 1
        return [process.exitcode for process in self.processes]

    def output(self) -> list[str]:
        return [log.read_text(encoding="utf-8", errors="replace") if log.exists() else "" for log in self.logs]

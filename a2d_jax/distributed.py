"""Many hosts: several processes run one program on a mesh of all their devices.

Every host runs the same command. Who it is comes from the environment (`--distributed`: Cloud TPU, GKE, Slurm) or from
the flags --coordinator, --num_processes and --process_id. Each process builds the rows of a batch that its own devices
hold; process 0 alone prints and writes logs. Output folders lie on a file system that all processes share.

SIGTERM is how a cluster says that a machine is about to go: `Preemption` turns it into one step, the same on every
process, after which the program saves and ends. A process that dies without a word takes the others with it, after
the time that JAX's heartbeat allows; starting all of them again continues from the last checkpoint.
"""

import os
import signal
import sys
import threading
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Sharding

flags.disclaim_key_flags()  # --help shows them among those of the program that defines them

_SECONDS = 300


def define_flags() -> None:
    """The flags that `initialize_from_flags` reads."""
    flags.DEFINE_bool("distributed", False, "several hosts, as the environment tells (Cloud TPU, GKE, Slurm)")
    flags.DEFINE_string("coordinator", None, "several hosts: HOST:PORT of process 0, reachable from all")
    flags.DEFINE_integer("num_processes", None, "with --coordinator: how many processes", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "with --coordinator: which of them this is, from 0", lower_bound=0)
    flags.DEFINE_integer("connect_seconds", _SECONDS, "how long to wait for the other processes", lower_bound=1)


def initialize_from_flags() -> None:
    """`initialize` where the flags ask for several hosts; to be called before any device is touched."""
    given = flags.FLAGS
    names = ("coordinator", "num_processes", "process_id")
    identity = {name: given[name].value for name in names}
    missing = [f"--{name}" for name, value in identity.items() if value is None]
    if 0 < len(missing) < len(names):
        raise ValueError(
            f"{', '.join(missing)} missing: give --coordinator, --num_processes and --process_id together, or "
            "--distributed alone where the environment tells them."
        )
    if not missing or given.distributed:
        initialize(*identity.values(), given.connect_seconds)


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None,
    seconds: int = _SECONDS,
) -> None:  # fmt: skip
    """Joins the job; without arguments as the environment tells.

    Ends the program with a message where not all processes have met within `seconds`.

    Raises:
      ValueError: an environment that names no job, a coordinator without a port, a process id out of range.
    """
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator={coordinator!r} has no port; give HOST:PORT, such as 10.0.0.2:8476.")
    if coordinator is not None and process_id >= num_processes:
        raise ValueError(f"--process_id={process_id} of --num_processes={num_processes}; ids go from 0.")

    def give_up() -> None:
        from jax._src.distributed import global_state  # the address that JAX found has no public name

        what = "not all processes came" if global_state.process_id == 0 else "no coordinator answered"
        print(
            f"{what} to {global_state.coordinator_address} within {seconds} s (this is process "
            f"{global_state.process_id} of {global_state.num_processes}). Start the program on every host, with the "
            "same --coordinator and --num_processes, and see that the port is open between them; --connect_seconds "
            "waits longer.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)

    # JAX aborts the process with a stack trace when its own time is up; this comes first.
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=seconds + 60)
    except ValueError as error:
        raise ValueError(
            f"the environment names no job of several hosts ({error}): --distributed is for Cloud TPU, GKE and Slurm; "
            "elsewhere give --coordinator, --num_processes and --process_id."
        ) from error
    finally:
        timer.cancel()


def is_main() -> bool:
    """Whether this is the process that prints and writes logs."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints once, whatever the number of processes."""
    if is_main():
        print(text, flush=True)


def from_main(value: Any) -> Any:
    """Numbers as process 0 has them, on every process: what is read from a folder may differ for a moment."""
    return value if jax.process_count() == 1 else jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(value))


def own_rows(sharding: Sharding, num_rows: int) -> np.ndarray:
    """Numbers of the rows of a batch that this process's devices hold, growing; all, where it is not split by host."""
    parts = {index[0].indices(num_rows)[:2] for index in sharding.addressable_devices_indices_map((num_rows,)).values()}
    return np.concatenate([np.arange(*part) for part in sorted(parts)])


def place_rows(sharding: Sharding, rows: np.ndarray, num_rows: int, array: np.ndarray) -> jax.Array:
    """The batch (num_rows, ...) on its devices, of which each process gives its `own_rows`."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(num_rows)
        first = np.searchsorted(rows, start)
        return array[(slice(first, first + stop - start), *index[1:])]

    return jax.make_array_from_callback((num_rows, *array.shape[1:]), sharding, part)


def whole(array: jax.Array) -> np.ndarray:
    """The array on the host of every process, wherever its parts are; all processes call it together."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class Preemption:
    """Notices SIGTERM while it is entered: `with Preemption() as preemption: ... if preemption.is_due(step): save`.

    With several processes JAX's own service listens: whichever of them hears the signal, `is_due` is True at the same
    step for all, the next that none has begun. A single process listens itself.
    """

    def __enter__(self) -> "Preemption":
        self._is_noted, self._before = False, None
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_) -> None:
        self._is_noted = True

    def is_due(self, step: int) -> bool:
        """Whether to stop after `step`; to be asked once a step, by every process."""
        return self._is_noted or multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

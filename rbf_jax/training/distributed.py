"""Several processes that train one run: how they find each other, agree, and stop together.

In one process all of this does nothing. What follows runs in every process, in the same order.
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

# In seconds.
HEARTBEAT_TIMEOUT = 60
# Steps between a vote to stop and its count: by then the devices have done it, so that nobody
# waits, and no more work than that is ahead of them.
_STEPS_TO_COUNT = 2


def initialize(
    coordinator: str | None = None,
    num_processes: str | int | None = None,
    process_id: str | int | None = None,
    heartbeat_timeout: str | int | None = None,
) -> None:
    """Joins the processes of a run, if it has several; before anything touches a device.

    Explicit: the three arguments, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID in the environment. Otherwise by Slurm's, under `srun` with several tasks, where
    each process takes the one GPU that has its local number.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: of the run.
      process_id: of this one, from 0.
      heartbeat_timeout: a process without a sign of life for so many seconds counts as dead, and
        JAX ends the others; None for 60.

    Raises:
      ValueError: some are missing, or wrong.
      RuntimeError: the processes did not find each other in time.
    """
    timeout = _integer("heartbeat_timeout", heartbeat_timeout or HEARTBEAT_TIMEOUT, 1, None)
    given = {
        name: value if value is not None else os.environ.get(name)
        for name, value in (
            ("JAX_COORDINATOR_ADDRESS", coordinator),
            ("JAX_NUM_PROCESSES", num_processes),
            ("JAX_PROCESS_ID", process_id),
        )
    }
    if all(value is None for value in given.values()):
        # As in a step of srun; a batch script itself has the number of tasks but is one process.
        if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            jax.distributed.initialize(
                cluster_detection_method="slurm", heartbeat_timeout_seconds=timeout
            )
        return
    if missing := [name for name, value in given.items() if value is None]:
        raise ValueError(
            f"{', '.join(missing)} is missing; a run of several processes needs "
            f"{', '.join(given)}, or --coordinator, --num_processes and --process_id."
        )
    address = str(given["JAX_COORDINATOR_ADDRESS"])
    if not address.rpartition(":")[2].isdecimal() or ":" not in address:
        raise ValueError(f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be HOST:PORT.")
    count = _integer("JAX_NUM_PROCESSES", given["JAX_NUM_PROCESSES"], 1, None)
    index = _integer("JAX_PROCESS_ID", given["JAX_PROCESS_ID"], 0, count - 1)
    if count > 1:
        jax.distributed.initialize(
            address,
            count,
            index,
            # Explicit is explicit: no guess which of the devices to use, but JAX_LOCAL_DEVICE_IDS.
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=timeout,
        )


def _integer(name: str, value: object, low: int, high: int | None) -> int:
    text = str(value)
    if text.isdecimal() and int(text) >= low and (high is None or int(text) <= high):
        return int(text)
    upper = "" if high is None else f" and at most {high}"
    raise ValueError(f"{name} is {text!r}; it must be an integer of at least {low}{upper}.")


def is_alone() -> bool:
    """Whether this process is the only one of its run."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def texts_of_all(text: str) -> list[str]:
    """Returns what each process says."""
    if is_alone():
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array(len(encoded))))
    if not max(lengths):
        return [""] * len(lengths)
    padded = np.pad(encoded, (0, max(lengths) - len(encoded)))
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:length]).decode() for row, length in zip(everyone, lengths)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes leave the block well, or none does.

    The block itself must not wait for another process.

    Raises:
      ValueError: in another process the block failed.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    said = texts_of_all(f"{failure}" or type(failure).__name__ if failure else "")
    if failure is not None:
        raise failure
    for index, text in enumerate(said):
        if text:
            raise ValueError(f"process {index}: {text}")


def first_before_others(make: Callable[[], T]) -> T:
    """Returns what `make` returns; process 0 has done it before the others begin.

    Raises:
      ValueError: in another process `make` failed.
    """
    made: list[T] = []
    for turn in (True, False):
        with together():
            if is_first() == turn:
                made.append(make())
    return made[0]


class StopVote:
    """Lets all processes stop after the same step when one of them is asked to.

    Each step every process says what it was asked, and learns what was said two steps before. What
    is said travels as one number through the devices, behind the step's own work.
    """

    def __init__(self, mesh: Mesh):
        """Makes the vote of the processes of a mesh."""
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size,)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._largest = jax.jit(jnp.max, out_shardings=everywhere)
        self._votes: collections.deque[jax.Array] = collections.deque()

    def __call__(self, asked: int | None) -> int:
        """Returns the signal for which all stop now, or 0.

        Args:
          asked: the signal that this process received, or None.
        """
        signal = np.int32(asked or 0)
        if is_alone():
            return int(signal)
        votes = jax.make_array_from_callback(
            self._shape, self._sharding, lambda _: np.full(1, signal)
        )
        self._votes.append(self._largest(votes))
        if len(self._votes) <= _STEPS_TO_COUNT:
            return 0
        return int(self._votes.popleft())

"""How long a call keeps the GPU busy.

The clock is CUPTI: the durations of all kernels of a call, added up, as the GPU itself stamped
them. It sees the kernels of JAX and of PyTorch alike, whatever launched them, so both are measured
by one clock; it does not see the gaps between kernels, of which a user who queues work on short
sequences sees some, so the host's time per queued call stands beside it. Copies and memsets by the
driver are no kernels and are not in it.

Where CUPTI does not work, all there is is that host's time: calls are queued and waited for once,
which hides launches behind the work as long as the work is longer than they are. `Clock.name` says
which it was.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MEANING = {
    "cupti": "milliseconds: durations of all kernels of a call, added up, by CUPTI",
    "wall": "milliseconds: the host's, of a queue of calls waited for once, over their number",
}


@dataclasses.dataclass(frozen=True)
class Call:
    """What is measured.

    Attributes:
      run: starts the work and returns its results, maybe before they are there.
      wait: for those results.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one call, the mean over a queue of them, in milliseconds.

    Attributes:
      device: by the clock.
      wall: by the host's clock, nothing recorded meanwhile.
      kernels: device time by kernel; empty where the clock does not know.
    """

    device: float
    wall: float
    kernels: dict[str, float]


class Clock:
    """CUPTI where it works."""

    def __init__(self):
        self._cupti: Any = None
        self.problem: str | None = None
        if jax.default_backend() != "gpu":
            self.problem = "no GPU"
            return
        try:
            from jax._src.lib import mosaic_gpu  # As jax.experimental.mosaic.gpu.profiler does.

            self._cupti = mosaic_gpu._mosaic_gpu_ext
            self.measure(_probe(), 1)
        except Exception as error:  # Whatever it is, there is another clock.
            self._cupti = None
            self.problem = one_line(error)

    @property
    def name(self) -> str:
        """A key of `MEANING`."""
        return "wall" if self._cupti is None else "cupti"

    def describe(self) -> dict[str, str | None]:
        """For the JSON: which clock, what it measures, and why it is not the better one."""
        return {"name": self.name, "meaning": MEANING[self.name], "no_cupti": self.problem}

    def measure(self, call: Call, times: int) -> Timing:
        """Runs `call` `times` times in a queue, and with CUPTI as often again."""
        wall = _queue(call, times)
        if self._cupti is None:
            return Timing(wall, wall, {})
        kernels: dict[str, float] = collections.defaultdict(float)
        for name, milliseconds in self.record(lambda: _queue(call, times)):
            kernels[name] += milliseconds / times
        return Timing(sum(kernels.values()), wall, dict(kernels))

    def record(self, work: Callable[[], Any]) -> list[tuple[str, float]]:
        """Does `work`, which waits for its results: its kernels in order, and their milliseconds.

        Raises:
          RuntimeError: CUPTI does not work here, or recorded nothing.
        """
        if self._cupti is None:
            raise RuntimeError(f"CUPTI does not work here: {self.problem}.")
        self._cupti._cupti_init()
        try:
            work()
        finally:
            records = self._cupti._cupti_get_timings(False)
        if not records:
            raise RuntimeError("CUPTI recorded no kernel.")
        return records

    def times_for(self, call: Call, milliseconds: float, most: int = 50) -> int:
        """Warms `call` up; returns how many make a queue of about `milliseconds`, at least 1."""
        call.wait(call.run())
        return max(1, min(most, round(milliseconds / max(_queue(call, 1), 1e-3))))


def _queue(call: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        results = call.run()
    call.wait(results)
    return 1e3 * (time.perf_counter() - start) / times


def _probe() -> Call:
    x = jnp.ones((256, 256), jnp.bfloat16)
    multiply = jax.jit(lambda x: x @ x)
    jax.block_until_ready(multiply(x))
    return Call(lambda: multiply(x), jax.block_until_ready)


def one_line(error: BaseException, most: int = 160) -> str:
    """What a table can show of an error."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= most else text[: most - 1] + "…"


def ceilings(clock: Clock, size: int, gibibytes: float) -> dict[str, float]:
    """What the machine can do at most: a bfloat16 matrix product, and one pass over memory.

    Args:
      clock: to measure with.
      size: of the square matrices.
      gibibytes: read, and written.

    Returns:
      "matmul_tflops" and "copy_gigabytes_per_second", read and written bytes together.
    """
    keys = jax.random.split(jax.random.key(1), 3)
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys[:2])
    multiply = jax.jit(jnp.matmul)
    # Negated, since a plain copy would be the driver's and no kernel.
    x = jax.random.normal(keys[2], (int(gibibytes * 2**29),), jnp.bfloat16)
    negate = jax.jit(jnp.negative)
    values = {}
    for name, call, work in (
        ("matmul_tflops", Call(lambda: multiply(a, b), jax.block_until_ready), 2e-9 * size**3),
        (
            "copy_gigabytes_per_second",
            Call(lambda: negate(x), jax.block_until_ready),
            4e-6 * x.size,
        ),
    ):
        times = clock.times_for(call, 50)
        values[name] = work / min(clock.measure(call, times).device for _ in range(5))
    return values

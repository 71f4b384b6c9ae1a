"""The suite: every contender in every cell, round by round, and what each needs of memory.

A cell has tokens = B·T and width = N·H, the same for all lengths, so that linear layers would cost
the same everywhere. Its contenders run one after the other in every round, so that a GPU that gets
hot slows down all of them; a time is the median over the rounds. Before that the results of each
RBF are compared with those of the XLA path: a kernel that computes something else is not fast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import memory_table
from experiments.benchmarks.clock import Clock, Timing, ceilings, one_line
from experiments.benchmarks.contenders import BASELINE, FLEX, TRUSTED, Cell, Prepared, contenders
from rbf_jax import environment

Key = tuple[str, str]  # Contender and direction.
DIRECTIONS = ("forward", "forward+backward")
# Above this the results are not those of another rounding.
LARGEST_DIFFERENCE = 0.05


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and how long.

    Attributes:
      lengths: T = S of the cells.
      head_dims: H of the cells.
      tokens: B·T.
      width: N·H.
      rounds: of which a time is the median.
      queue_milliseconds: a queue has as many calls as take about this long, at least one.
      seconds: after these no further cell is begun.
      memory_lengths: T of the memory table; none for no such table.
      matmul_size: of the matrix product that is a ceiling.
      copy_gibibytes: of the pass over memory that is the other.
      group: query heads that share a head of keys and values.
      dtype: of all arrays.
      without: names of contenders that are left out.
    """

    lengths: tuple[int, ...] = (512, 1024, 4096, 16384)
    head_dims: tuple[int, ...] = (64, 128)
    tokens: int = 16384
    width: int = 2048
    rounds: int = 7
    queue_milliseconds: float = 40.0
    seconds: float = 400.0
    memory_lengths: tuple[int, ...] = memory_table.LENGTHS
    matmul_size: int = 8192
    copy_gibibytes: float = 2.0
    group: int = 1
    dtype: str = "bfloat16"
    without: tuple[str, ...] = ()

    def cells(self) -> list[Cell]:
        """Longest first: what matters most is there if the time is short."""
        return [
            self._cell(length, H, causal)
            for length in sorted(self.lengths, reverse=True)
            for H in self.head_dims
            for causal in (True, False)
        ]

    def _cell(self, length: int, head_dim: int, causal: bool) -> Cell:
        batch, heads = max(1, self.tokens // length), max(self.group, self.width // head_dim)
        return Cell(batch, length, heads, head_dim, causal, self.group, self.dtype)


def run(settings: Settings, command: str, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Measures; yields the whole content of the JSON file after each step.

    Args:
      settings: what to measure.
      command: that leads here, for the file.
      say: prints a line of progress.
    """
    start, clock = time.perf_counter(), Clock()
    content: dict[str, Any] = {
        "command": command,
        **environment.describe(),
        "gpu": _gpu_settings(),
        "clock": clock.describe(),
        "dtype": settings.dtype,
        "settings": dataclasses.asdict(settings),
        "ceilings": ceilings(clock, settings.matmul_size, settings.copy_gibibytes),
        "results": [],
        "memory": [],
        "not_measured": [],
    }
    say(f"{content['device']}, clock {clock.name}, ceilings {content['ceilings']}")
    yield content
    for cell in settings.cells():
        seconds = time.perf_counter() - start
        if seconds > settings.seconds:
            content["not_measured"].append(dataclasses.asdict(cell))
            say(f"{seconds:4.0f} s: no time left for {cell}")
            continue
        for row in measure_cell(cell, clock, settings):
            content["results"].append(row)
            say(f"{time.perf_counter() - start:4.0f} s: {_line(row)}")
        yield content
    if settings.memory_lengths:
        for row in memory_table.measure(settings.memory_lengths, clock):
            content["memory"].append(row)
            say(f"{time.perf_counter() - start:4.0f} s: {memory_table.line(row)}")
            yield content
    content["seconds"] = time.perf_counter() - start
    yield content


def measure_cell(cell: Cell, clock: Clock, settings: Settings) -> list[dict[str, Any]]:
    """Returns a row per contender and direction; one that fails has its error and no time."""
    arrays = jax.block_until_ready(cell.arrays())
    rows, starting = {}, {}
    for direction in DIRECTIONS:
        for name, start in contenders().items():
            if name in settings.without:
                continue
            rows[name, direction] = _empty_row(cell, name, direction)
            with _error_into(rows[name, direction]):
                starting[name, direction] = start(cell, arrays, direction != "forward")
    prepared: dict[Key, Prepared] = {}
    # Nothing is run before XLA has done: it chooses its matrix products by trying them on the GPU.
    for key in sorted(starting, key=lambda key: key[0] == FLEX):
        with _error_into(rows[key]):
            prepared[key] = starting[key]()
    ready = _warm_up(prepared, rows, clock, settings)
    for key, measured in _rounds(ready, rows, clock, settings).items():
        rows[key] |= _times(measured, cell.operations(key[1] != "forward"))
    return list(rows.values())


def _warm_up(
    prepared: Mapping[Key, Prepared],
    rows: Mapping[Key, dict[str, Any]],
    clock: Clock,
    settings: Settings,
) -> dict[Key, tuple[Prepared, int]]:
    """Runs everything; returns what did run, and how many calls make a queue."""
    ready: dict[Key, tuple[Prepared, int]] = {}
    for direction in DIRECTIONS:
        results: dict[str, list[jax.Array]] = {}
        for key, program in prepared.items():
            if key[1] != direction:
                continue
            with _error_into(rows[key]):
                times = clock.times_for(program.call, settings.queue_milliseconds)
                if key[0] != BASELINE:
                    results[key[0]] = program.results(program.call.run())
                rows[key]["temporary_bytes"] = program.temporary_bytes
                rows[key]["output_bytes"] = program.output_bytes
                ready[key] = program, times
        for name, difference in _differences(results).items():
            rows[name, direction]["difference"] = difference
    return ready


def _rounds(
    ready: Mapping[Key, tuple[Prepared, int]],
    rows: Mapping[Key, dict[str, Any]],
    clock: Clock,
    settings: Settings,
) -> dict[Key, list[Timing]]:
    """All in turn, in every round; what is far slower than a queue should be, in three of them."""
    timings: dict[Key, list[Timing]] = {key: [] for key in ready}
    for i in range(settings.rounds):
        for key, (prepared, times) in ready.items():
            slow = (
                i >= 3 and timings[key] and timings[key][0].wall > 3 * settings.queue_milliseconds
            )
            if slow or rows[key]["error"] is not None:
                continue
            with _error_into(rows[key]):
                timings[key].append(clock.measure(prepared.call, times))
    return {key: measured for key, measured in timings.items() if rows[key]["error"] is None}


@contextlib.contextmanager
def _error_into(row: dict[str, Any]) -> Iterator[None]:
    """An implementation that fails, or runs out of memory, says so in its row; others go on."""
    try:
        yield
    except Exception as error:
        row["error"] = one_line(error)


def _empty_row(cell: Cell, name: str, direction: str) -> dict[str, Any]:
    return {
        "implementation": name,
        **dataclasses.asdict(cell),
        "direction": direction,
        "milliseconds": None,
        "error": None,
    }


def _times(timings: Sequence[Timing], operations: float) -> dict[str, Any]:
    device = [timing.device for timing in timings]
    middle = statistics.median(device)
    return {
        "milliseconds": middle,
        "fastest_slowest": [min(device), max(device)],
        "wall_milliseconds": statistics.median(timing.wall for timing in timings),
        "tflops": 1e-9 * operations / middle,
        "kernels": {name[:120]: time for name, time in timings[-1].kernels.items()},
    }


def _differences(results: Mapping[str, list[jax.Array]]) -> dict[str, dict[str, float]]:
    """How far each RBF is from the trusted one: ‖a − b‖/‖b‖ of output and gradients."""
    if TRUSTED not in results:
        return {}
    names, trusted = ("out", "dq", "dk", "dv"), results[TRUSTED]
    return {
        contender: {n: float(_difference(a, b)) for n, a, b in zip(names, arrays, trusted)}
        for contender, arrays in results.items()
        if contender != TRUSTED
    }


@jax.jit
def _difference(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


def _line(row: dict[str, Any]) -> str:
    shape = f"H {row['head_dim']} {'causal' if row['causal'] else 'full'} T {row['length']}"
    head = f"{shape}, {row['implementation']}, {row['direction']}: "
    if row["error"] is not None:
        return head + row["error"]
    doubts = "".join(f", {doubt}" for doubt in doubtful(row))
    return head + f"{row['milliseconds']:.3f} ms, {row['tflops']:.0f} TFLOP/s{doubts}"


def doubtful(row: Mapping[str, Any]) -> list[str]:
    """Which results are not those of the trusted implementation, in words."""
    return [
        f"{name} differs from {TRUSTED} by {difference:.2g}"
        for name, difference in row.get("difference", {}).items()
        if not difference <= LARGEST_DIFFERENCE  # NaN is a difference too.
    ]


def _gpu_settings() -> dict[str, str]:
    """Driver, power limit and clocks, where nvidia-smi tells them."""
    names = ("driver_version", "power.limit", "clocks.max.sm", "clocks.applications.graphics")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    first = output.stdout.strip().splitlines()[:1]
    return dict(zip(names, (value.strip() for value in "".join(first).split(","))))

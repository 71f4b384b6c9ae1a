"""Compiles and times tiles in worker processes: compiling side by side, timing one at a time.

jax-triton compiles a kernel in the process that runs it, seconds of one CPU core each. So every
worker compiles the tiles of one job at a time, and holds a lock on a file while it times them; the
lock is gone with a process that dies. What the others may do on the GPU meanwhile is a kernel's
first run, of milliseconds: a time is the median of many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.clock import Call, Clock, one_line
from experiments.benchmarks.tile_candidates import candidates, with_heads_at_once
from rbf_jax.ops.call import Inputs, Masking, Rules
from rbf_jax.ops.gpu.triton.config import Pass, Tiles, use_tiles
from rbf_jax.ops.vjp import Residuals

TOKENS, WIDTH = 16384, 2048  # B·T and N·H of all that is timed
# T of each class of lengths.
LENGTHS = {"short": 512, "medium": 4096, "long": 16384}
# Beyond this the results are not those of another rounding.
LARGEST_DIFFERENCE = {"bfloat16": 1e-2, "float16": 1e-2, "float32": 1e-4}
KERNELS: dict[Pass, str] = {
    "forward": "forward_kernel",
    "queries": "queries_kernel",
    "keys": "keys_kernel",
}
_ROUNDS = 3
_QUEUE_MILLISECONDS = 10.0
# Tiles that are slower than the best by more than this, in the first look, are not looked at again.
_CLOSE = 1.15


@dataclasses.dataclass(frozen=True)
class Job:
    """What one worker does at a time: one pass of one kind of attention, at some lengths."""

    name: Pass
    head_dim: int
    dtype: str
    causal: bool
    lengths: tuple[str, ...]

    def __str__(self) -> str:
        rule = "causal" if self.causal else "full"
        return f"{self.name} H {self.head_dim} {self.dtype} {rule}"

    def shape(self, length: str) -> tuple[int, int, int, int]:
        """(B, T, N, H)."""
        T = LENGTHS[length]
        return TOKENS // T, T, max(1, WIDTH // self.head_dim), self.head_dim


@dataclasses.dataclass(frozen=True)
class Winner:
    """The fastest tiles at one length, and the time of the second fastest."""

    length: str
    tiles: Tiles
    milliseconds: float
    runner_up_milliseconds: float | None


@dataclasses.dataclass
class Outcome:
    """Of one job.

    Attributes:
      winners: one for each length; none if the time was over before.
      problems: tiles that failed or computed something else, and why.
      clock: that timed, a key of `clock.MEANING`.
    """

    winners: list[Winner] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    clock: str | None = None


class Timer:
    """What a worker process keeps from job to job."""

    def __init__(self, lock: str, deadline: float, compute_capability: int):
        self._lock, self.deadline = lock, deadline
        self.compute_capability = compute_capability
        self.clock = Clock()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else times within this."""
        with Path(self._lock).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def over(self) -> bool:
        """Whether the time is."""
        return time.time() > self.deadline

    def kernel_times(self, calls: Sequence[tuple[Callable, int]], kernel: str) -> list[list[float]]:
        """Milliseconds of the runs of a kernel, by call: each call is run so often, in this order.

        Without CUPTI, one number for each call: all that it does, by the host's clock.
        """

        def work():
            for call, times in calls:
                for _ in range(times):
                    results = call()
                jax.block_until_ready(results)

        if self.clock.name == "cupti":
            found = [ms for name, ms in self.clock.record(work) if kernel in name]
            if len(found) == sum(times for _, times in calls):
                left = iter(found)
                return [list(itertools.islice(left, times)) for _, times in calls]
        return [
            [self.clock.measure(Call(call, jax.block_until_ready), times).wall]
            for call, times in calls
        ]


_timer: Timer


def start_worker(lock: str, deadline: float, compute_capability: int) -> None:
    """Initializes a worker process: the lock's file, when to stop (`time.time()`), the GPU's."""
    global _timer
    _timer = Timer(lock, deadline, compute_capability)


def do(job: Job) -> Outcome:
    """Does a job in a worker process."""
    gc.collect()  # the arrays of the one before
    return Outcome() if _timer.over() else _Bench(job, _timer).outcome()


@functools.lru_cache(maxsize=1)
def _arrays(dtype: str) -> list[jax.Array]:
    """Flat q, k, v and dout, the same for all shapes; on zeros a GPU draws less power."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (TOKENS * WIDTH,), dtype) for key in keys]


@jax.jit
def _difference(results: Sequence[jax.Array], expected: Sequence[jax.Array]) -> jax.Array:
    """The largest relative error, by norm, of any of the arrays; NaN if there is one."""

    def norm(x):
        return jnp.sqrt(jnp.sum(x * x))

    errors = []
    for x, y in zip(results, expected):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        errors.append(norm(x - y) / norm(y))
    return jnp.max(jnp.stack(errors))


class _Bench:
    """The programs of a job, by tiles and length."""

    def __init__(self, job: Job, timer: Timer):
        self._job, self._timer = job, timer
        self._programs: dict[tuple[Tiles, str], Callable[[], Any]] = {}
        self._times: dict[tuple[Tiles, str], float] = {}
        self._given: dict[str, list[jax.Array]] = {}
        self._expected: dict[str, Any] = {}
        self._problems: list[str] = []

    def outcome(self) -> Outcome:
        """Compiles and times all candidates, then the best two with other numbers of heads."""
        job = self._job
        tried = candidates(job.name, job.head_dim, job.dtype, self._timer.compute_capability)
        self._prepare()
        if not self._compile(tried):
            return Outcome(problems=self._problems)
        self._time(tried)
        # Sharing the L2 cache matters most where sequences are long.
        best = self._ranking(job.lengths[-1])[:2]
        more = [other for tiles in best for other in with_heads_at_once(tiles)]
        if not self._compile(more):
            return Outcome(problems=self._problems)
        # The best ones again, so that all that compete were timed in the same minute.
        again = {tiles: None for length in job.lengths for tiles in self._ranking(length)[:2]}
        self._time([*again, *more])
        winners = [self._winner(length) for length in job.lengths]
        clock = self._timer.clock.name
        return Outcome([w for w in winners if w is not None], self._problems, clock)

    def _ranking(self, length: str) -> list[Tiles]:
        times = {tiles: t for (tiles, where), t in self._times.items() if where == length}
        return sorted(times, key=times.__getitem__)

    def _winner(self, length: str) -> Winner | None:
        ranking = self._ranking(length)
        if not ranking:
            return None
        times = [self._times[tiles, length] for tiles in ranking[:2]]
        return Winner(length, ranking[0], times[0], times[1] if len(times) > 1 else None)

    def _run(self, name: Pass, length: str) -> Callable:
        """Returns a function of flat q, k, v and dout, and of what the forward pass returned.

        Both backward kernels run in a backward pass; the clock takes the one that is asked for.
        """
        from rbf_jax.ops.gpu.triton.passes import PASSES

        shape = self._job.shape(length)
        N, H = shape[2:]
        gamma, weight = jnp.full((N,), H**-0.5), jnp.ones((N,))
        masking, rules = Masking(), Rules(right=0 if self._job.causal else None)

        def run(q, k, v, dout, *given):
            q, k, v, dout = (x.reshape(shape) for x in (q, k, v, dout))
            inputs = Inputs(q, k, v, gamma, weight)
            if name == "forward":
                return PASSES.forward(inputs, masking, rules)
            residuals = Residuals(inputs, masking, *given)
            # The gradient of the logsumexp is ignored: the rules do not ask for a residual.
            gradients = PASSES.backward(residuals, dout, residuals.logsumexp, rules)
            return [gradients.query] if name == "queries" else [gradients.key, gradients.value]

        return run

    def _prepare(self) -> None:
        """What a backward pass is given: the results of the forward pass, its tiles the default."""
        for length in self._job.lengths:
            self._given[length] = list(_arrays(self._job.dtype))
            if self._job.name != "forward":
                run = jax.jit(self._run("forward", length))
                self._given[length] += jax.block_until_ready(run(*self._given[length]))

    def _compile(self, tried: Sequence[Tiles]) -> bool:
        """Compiles for all lengths, and runs once: ptxas runs then. False if the time is over."""
        job = self._job
        for tiles in tried:
            if self._timer.over():
                return False
            try:
                programs = {}
                for length in job.lengths:
                    given = self._given[length]
                    tiles_of_pass: Any = {job.name: tiles}
                    with use_tiles(**tiles_of_pass):
                        program = jax.jit(self._run(job.name, length)).lower(*given).compile()
                    programs[tiles, length] = functools.partial(program, *given)
                jax.block_until_ready(programs[tiles, job.lengths[0]]())
                self._programs |= programs
            except Exception as error:  # The others go on.
                self._problems.append(f"{job}: {tiles}: {one_line(error)}")
        return True

    def _time(self, tried: Sequence[Tiles]) -> None:
        for length in self._job.lengths:
            ready = [tiles for tiles in tried if (tiles, length) in self._programs]
            with self._timer.locked():
                right = [tiles for tiles in ready if self._is_right(tiles, length)]
                first = self._durations(right, length, dict.fromkeys(right, 1))
                least = min((min(times) for times in first.values()), default=0.0)
                close = {t: min(x) for t, x in first.items() if min(x) <= _CLOSE * least}
                often = {
                    t: max(1, min(30, round(_QUEUE_MILLISECONDS / x))) for t, x in close.items()
                }
                rounds = [self._durations(list(close), length, often) for _ in range(_ROUNDS)]
            for tiles in right:
                times = [ms for durations in rounds for ms in durations.get(tiles, [])]
                # Those that are not close have the time of the first look.
                self._times[tiles, length] = statistics.median(times or first[tiles])

    def _durations(
        self, tried: Sequence[Tiles], length: str, often: dict[Tiles, int]
    ) -> dict[Tiles, list[float]]:
        if not tried:
            return {}
        calls = [(self._programs[tiles, length], often[tiles]) for tiles in tried]
        times = self._timer.kernel_times(calls, KERNELS[self._job.name])
        return dict(zip(tried, times))

    def _is_right(self, tiles: Tiles, length: str) -> bool:
        """Whether the results are those of the first tiles that ran, the default ones."""
        results = self._programs[tiles, length]()
        expected = self._expected.setdefault(length, results)
        difference = float(_difference(results, expected))
        if difference <= LARGEST_DIFFERENCE[self._job.dtype]:
            return True
        self._problems.append(f"{self._job}: {tiles}: differs by {difference:.1e} at {length}")
        self._programs.pop((tiles, length))
        return False

"""What the benchmark of decoding measures: a step's attention to a cache, and what it is held to.

Keys and values are arrays (B·K, S·H) that every contender reads in its own layout, (B, K, S, H) or
(B, S, K, H): what is in them is as random one way as the other. All is bfloat16.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.clock import Call, Clock, Timing, one_line
from rbf_jax.ops.decode import api as decode
from rbf_jax.ops.decode.cache import KeysValues
from rbf_jax.ops.decode.triton import Sizes, use_sizes

TRITON = "RBF triton"
XLA = "RBF xla"
CUDNN = "dot product, cuDNN"
COPY = "copy"
# Rows made at random; further ones are copies of them, to save the time and the memory.
_RANDOM_ROWS = 8
# At most so many bytes are read to be copied: it goes no faster with more.
_COPIED_BYTES = 2**32
_compilers = concurrent.futures.ThreadPoolExecutor(8)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One step of generation.

    Attributes:
      batch: B.
      length: S, slots of the cache.
      heads: N.
      kv_heads: K.
      head_dim: H.
      filled: tokens in each row, at most S.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    filled: int

    @property
    def numbers(self) -> int:
        """In the keys of the cache; and in the values."""
        return self.batch * self.kv_heads * self.length * self.head_dim

    @property
    def cache_bytes(self) -> int:
        """Of keys and values."""
        return 4 * self.numbers

    @property
    def filled_bytes(self) -> int:
        """Of the keys and values of tokens: what a step must read at least."""
        return self.cache_bytes * self.filled // self.length

    def arrays(self) -> list[jax.Array]:
        """Queries, keys and values, key norms, lengths."""
        query = jax.random.normal(
            jax.random.key(0), (self.batch, 1, self.heads, self.head_dim), jnp.bfloat16
        )
        shape = self.batch * self.kv_heads, self.length * self.head_dim
        key, value = (_random(seed, *shape) for seed in (1, 2))
        norms = _norms(key, self.batch, self.kv_heads, self.head_dim)
        return [query, key, value, norms, jnp.full(self.batch, self.filled, jnp.int32)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random(seed: int, rows: int, columns: int) -> jax.Array:
    """On zeros a GPU draws less power and runs faster."""
    some = jax.random.normal(jax.random.key(seed), (min(rows, _RANDOM_ROWS), columns), jnp.bfloat16)
    return jnp.tile(some, (-(-rows // _RANDOM_ROWS), 1))[:rows]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _norms(key: jax.Array, batch: int, kv_heads: int, head_dim: int) -> jax.Array:
    keys = key.reshape(batch, kv_heads, -1, head_dim)
    return jnp.sum(jnp.square(keys.astype(jnp.float32)), axis=-1)


def rbf(cell: Cell, implementation: decode.Implementation) -> Callable:
    """This project's step."""

    def step(query, key, value, norms, lengths):
        shape = cell.batch, cell.kv_heads, cell.length, cell.head_dim
        cache = KeysValues(key.reshape(shape), value.reshape(shape), norms)
        return decode.attend(query, cache, lengths - 1, lengths, implementation=implementation)

    return step


def dot_product(cell: Cell) -> Callable:
    """jax.nn's, with lengths where rows are not full: cuDNN does without them else."""

    def step(query, key, value, norms, lengths):
        shape = cell.batch, cell.length, cell.kv_heads, cell.head_dim
        return jax.nn.dot_product_attention(
            query,
            key.reshape(shape),
            value.reshape(shape),
            key_value_seq_lengths=lengths if cell.filled < cell.length else None,
            implementation="cudnn",
        )

    return step


def copy(query, key, value, norms, lengths):
    """Moves as many bytes as the cache has, or a part: reads the keys, writes as much.

    Negated, since a plain copy would be the driver's and no kernel.
    """
    return -key[: max(1, _COPIED_BYTES // (2 * key.shape[1]))]


def compile_step(step: Callable, arrays: Sequence[Any], sizes: Sizes | None = None):
    """Lowers a step, and has it compiled side by side with others: a future of a `Call`.

    With sizes, a step that has not been lowered before.
    """
    with contextlib.nullcontext() if sizes is None else use_sizes(sizes):
        lowered = jax.jit(step).lower(*arrays)

    def finish() -> Call:
        program = lowered.compile()
        return Call(functools.partial(program, *arrays), jax.block_until_ready)

    return _compilers.submit(finish)


def time_in_turns(
    steps: Mapping[Any, tuple[Callable, Sequence[Any], Sizes | None]],
    clock: Clock,
    rounds: int,
    milliseconds: float,
) -> tuple[dict[Any, list[Timing]], dict[Any, Call], dict[Any, str]]:
    """Times steps with their arrays and sizes; one that fails does not stop the others.

    Args:
      steps: by any key.
      clock: to measure with.
      rounds: in each of which all are timed.
      milliseconds: of a queue of calls.

    Returns:
      By key, the timings, what was timed, and the problems of those that failed.
    """
    compiling: dict[Any, concurrent.futures.Future[Call]] = {}
    calls: dict[Any, Call] = {}
    times: dict[Any, int] = {}
    problems: dict[Any, str] = {}
    for key, (step, arrays, sizes) in steps.items():
        try:
            compiling[key] = compile_step(step, arrays, sizes)
        except Exception as error:
            problems[key] = one_line(error)
    for key, future in compiling.items():
        try:
            call = future.result()
            times[key] = clock.times_for(call, milliseconds)
            calls[key] = call
        except Exception as error:
            problems[key] = one_line(error)
    timings: dict[Any, list[Timing]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            timings[key].append(clock.measure(call, times[key]))
    return timings, calls, problems


def largest_difference(call: Call, trusted: Call) -> float:
    """Of the outputs of two RBFs, relative to the largest output."""
    ours, theirs = (x.run()[0].astype(jnp.float32) for x in (call, trusted))
    return float(jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs)))

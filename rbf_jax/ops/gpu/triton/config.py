"""Tile sizes of each kernel: set by `use_tiles`, else of the tuned table, else by a rule of thumb.

`tuned.json` is written by `python -m experiments.autotune` on the GPU that an entry names.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib.resources
import json
from typing import Literal

from rbf_jax.ops.gpu.context import setting

Pass = Literal["forward", "queries", "keys"]
PASSES: tuple[Pass, ...] = ("forward", "queries", "keys")

# Shared memory that one program may use, in bytes, by compute capability times ten; others are
# taken to have the least. So are those of data centers from 10.0: they have as much as 9.0, and
# need up to a third more than `shared_memory` says.
_SHARED_MEMORY = {80: 166_912, 87: 166_912, 90: 232_448}
_LEAST_SHARED_MEMORY = 101_376
# Without an entry in the tuned table: (block_q, block_k, warps) by H up to 64, 128 and 256, such
# that the compiler spills few registers or none on any GPU from compute capability 8.0.
_DEFAULTS: dict[Pass, tuple[tuple[int, int, int], ...]] = {
    "forward": ((128, 64, 8), (128, 32, 8), (64, 32, 8)),
    "queries": ((64, 64, 4), (64, 64, 8), (64, 32, 8)),
    "keys": ((32, 64, 4), (32, 64, 8), (32, 32, 8)),
}
_FLOAT32_DEFAULTS: dict[Pass, tuple[tuple[int, int, int], ...]] = {
    "forward": ((64, 32, 4), (32, 32, 8), (16, 16, 8)),
    "queries": ((32, 32, 4), (16, 32, 8), (16, 16, 8)),
    "keys": ((32, 32, 8), (16, 16, 8), (16, 16, 8)),
}
# Lengths up to each limit share an entry of the table.
LENGTH_CLASSES = {"short": 1024, "medium": 4096}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tile of one program, and how it is compiled.

    Attributes:
      block_q: queries, a power of two from 16.
      block_k: keys, a power of two from 16.
      num_warps: warps of a program, a power of two up to 16.
      num_stages: depth of the software pipeline of its loops, 1 for none.
      heads_at_once: heads that neighbouring programs work on, so that their keys and values stay in
        the L2 cache.
      max_registers: limit of registers per thread, so that more programs fit on a multiprocessor;
        None leaves it to the compiler.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    heads_at_once: int = 1
    max_registers: int | None = None

    def __post_init__(self):
        for name in ("block_q", "block_k"):
            if not _power_of_two(getattr(self, name), 16, 256):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be a power of two from 16 to 256."
                )
        if not _power_of_two(self.num_warps, 1, 16):
            raise ValueError(f"num_warps={self.num_warps!r} must be a power of two up to 16.")
        limit = self.max_registers
        if limit is not None and not (isinstance(limit, int) and 32 <= limit <= 255):
            raise ValueError(f"max_registers={limit!r} must be None or an int from 32 to 255.")
        for name in ("num_stages", "heads_at_once"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an int ≥ 1.")


_in_use: contextvars.ContextVar[tuple[tuple[Pass, Tiles], ...]] = contextvars.ContextVar(
    "rbf_jax_triton_tiles", default=()
)


def use_tiles(
    *, forward: Tiles | None = None, queries: Tiles | None = None, keys: Tiles | None = None
) -> contextlib.AbstractContextManager[None]:
    """Within this context, what is traced takes these tiles for the passes given.

    Tiles that need more shared memory than the GPU has make compiling or the launch fail.
    """
    given: dict[Pass, Tiles | None] = {"forward": forward, "queries": queries, "keys": keys}
    named = tuple((name, tiles) for name, tiles in given.items() if tiles is not None)
    return setting(_in_use, (*_in_use.get(), *named))


def tiles_in_use() -> tuple[tuple[Pass, Tiles], ...]:
    """Tiles set by `use_tiles`, the innermost last: part of what a traced program depends on."""
    return _in_use.get()


def choose(
    name: Pass,
    *,
    head_dim: int,
    dtype: str,
    causal: bool,
    length: int,
    gpu: str,
    compute_capability: int,
) -> Tiles:
    """Returns the tiles of one pass where `use_tiles` sets none.

    Args:
      name: "forward", "queries" (their gradient) or "keys" (theirs and the values').
      head_dim: H.
      dtype: name of the input's dtype.
      causal: whether the call is causal.
      length: the longer of T and S.
      gpu: the device's name, as JAX gives it.
      compute_capability: times ten.
    """
    wanted = {
        "pass": name,
        "head_dim": padded_head_dim(head_dim),
        "dtype": dtype,
        "causal": causal,
        "length": length_class(length),
    }
    entries = [e for e in tuned_table() if all(e[key] == x for key, x in wanted.items())]
    for key, value in (("gpu", gpu), ("compute_capability", compute_capability)):
        for entry in entries:
            if entry[key] == value:
                return Tiles(**entry["tiles"])
    return default_tiles(name, head_dim, dtype, compute_capability)


def length_class(length: int) -> str:
    """The part of the tuned table that a length belongs to."""
    return next((name for name, limit in LENGTH_CLASSES.items() if length <= limit), "long")


def padded_head_dim(head_dim: int) -> int:
    """H rounded up to a power of two, at least 16, as the kernels hold it."""
    return max(16, 1 << (head_dim - 1).bit_length())


@functools.cache
def tuned_table() -> tuple[dict, ...]:
    """The entries of tuned.json."""
    file = importlib.resources.files("rbf_jax.ops.gpu.triton").joinpath("tuned.json")
    return tuple(json.loads(file.read_text())["entries"])


def default_tiles(name: Pass, head_dim: int, dtype: str, compute_capability: int) -> Tiles:
    """Tiles that fit into the shared memory of any GPU of this compute capability."""
    by_head_dim = (_FLOAT32_DEFAULTS if dtype == "float32" else _DEFAULTS)[name]
    H = padded_head_dim(head_dim)
    tiles = Tiles(*by_head_dim[0 if H <= 64 else 1 if H <= 128 else 2], num_stages=3)
    while shared_memory(name, tiles, H, dtype) > shared_memory_limit(compute_capability):
        if tiles.num_stages > 2:  # with fewer, loads would wait for the arithmetic
            tiles = dataclasses.replace(tiles, num_stages=tiles.num_stages - 1)
        elif tiles.block_q >= tiles.block_k:
            tiles = dataclasses.replace(tiles, block_q=tiles.block_q // 2)
        else:
            tiles = dataclasses.replace(tiles, block_k=tiles.block_k // 2)
    return tiles


def shared_memory_limit(compute_capability: int) -> int:
    """Bytes of shared memory that one program may have on a GPU of this capability, times ten."""
    return _SHARED_MEMORY.get(compute_capability, _LEAST_SHARED_MEMORY)


def shared_memory(name: Pass, tiles: Tiles, head_dim: int, dtype: str) -> int:
    """An upper bound of a program's shared memory in bytes, on any GPU; tests hold it to Triton's.

    A program keeps the vectors of its own tile, and a ring of `num_stages` tiles of those that move
    past; with no ring, Triton changes layouts through as much. The operands of tf32x3, high and low
    parts, may be there again: all of them where a warp group multiplies, from 64 rows.
    """
    wide = dtype == "float32"
    kept, moving = tiles.block_q, tiles.block_k
    if name == "keys":
        kept, moving = moving, kept
    again = 0
    if wide:
        again = kept if kept >= 64 else max(kept - moving, 0)
    vectors = (kept + again) * (1 if name == "forward" else 2)
    vectors += 2 * moving * max(tiles.num_stages, 2)
    numbers = vectors * padded_head_dim(head_dim)
    if wide and name == "keys":  # the weights and their gradients
        numbers += 2 * tiles.block_q * tiles.block_k
    one_per_row = 2 * moving * tiles.num_stages
    return (4 if wide else 2) * numbers + 4 * one_per_row + 512


def _power_of_two(value, least: int, most: int) -> bool:
    return isinstance(value, int) and least <= value <= most and value & (value - 1) == 0

"""Which tiles `experiments.autotune` tries: those that were fast, or close, on an H100, by hand.

Written (block_q, block_k, warps, stages[, most registers per thread]). A limit on registers lets
one more program onto a multiprocessor where the compiler would use a few registers too many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from rbf_jax.ops.gpu.triton.config import (
    Pass,
    Tiles,
    default_tiles,
    padded_head_dim,
    shared_memory,
    shared_memory_limit,
)

HEADS_AT_ONCE = (1, 4, 8)

_HALF: dict[Pass, dict[int, Sequence[tuple[int, ...]]]] = {
    "forward": {
        32: [(128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3, 128), (128, 128, 8, 2)],
        64: [
            (128, 64, 4, 3),
            (128, 64, 4, 4),
            (128, 64, 8, 3, 128),
            (64, 64, 4, 3, 128),
            (128, 128, 8, 2),
        ],
        128: [(128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3), (128, 128, 8, 2)],
        256: [(64, 32, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)],
    },
    "queries": {
        32: [(64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2)],
        64: [(64, 64, 4, 3), (64, 64, 4, 3, 168), (128, 64, 4, 2), (128, 64, 4, 3)],
        128: [(128, 64, 8, 3), (64, 64, 4, 2), (128, 128, 8, 2), (128, 32, 8, 3)],
        256: [(32, 32, 4, 2), (128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 4, 2)],
    },
    "keys": {
        32: [(64, 64, 4, 3), (32, 64, 4, 3), (64, 128, 8, 3), (32, 128, 4, 3)],
        64: [(64, 64, 4, 3), (64, 64, 4, 4), (32, 64, 4, 3, 168), (64, 128, 8, 3)],
        128: [(64, 128, 8, 3), (64, 128, 8, 2), (32, 64, 4, 3), (32, 128, 8, 3)],
        256: [(32, 32, 4, 2), (32, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)],
    },
}
# float32 is multiplied as three products of TF32, whose operands are split in registers.
_FLOAT32: dict[Pass, dict[int, Sequence[tuple[int, ...]]]] = {
    "forward": {
        32: [(64, 64, 4, 2), (128, 32, 8, 3), (64, 32, 4, 3)],
        64: [(64, 32, 4, 2), (64, 64, 8, 2), (128, 32, 8, 3)],
        128: [(32, 32, 4, 2), (64, 32, 8, 2), (128, 32, 8, 2)],
        256: [(32, 16, 8, 2), (32, 32, 8, 2)],
    },
    "queries": {
        32: [(64, 32, 4, 3), (64, 64, 8, 2), (32, 32, 4, 3)],
        64: [(64, 32, 4, 2), (64, 16, 8, 2), (64, 64, 8, 2)],
        128: [(32, 32, 8, 2), (32, 16, 4, 2), (16, 32, 8, 2)],
        256: [(32, 16, 8, 2), (16, 32, 8, 2)],
    },
    "keys": {
        32: [(32, 32, 4, 3), (32, 64, 8, 2), (64, 32, 8, 2)],
        64: [(16, 32, 4, 2), (32, 32, 8, 2), (32, 64, 8, 2)],
        128: [(16, 32, 4, 2), (32, 32, 8, 2), (16, 32, 8, 2)],
        256: [(16, 16, 8, 2), (16, 32, 8, 2)],
    },
}


def candidates(name: Pass, head_dim: int, dtype: str, compute_capability: int) -> list[Tiles]:
    """Tiles that fit into a GPU of this compute capability; the default ones come first.

    What needs more shared memory than there is gets fewer stages; where that is not enough, or
    the sums that a thread must hold fill its registers, it is left out.
    """
    H = padded_head_dim(head_dim)
    table = (_FLOAT32 if dtype == "float32" else _HALF)[name]
    nearest = min(table, key=lambda known: (abs(known - H), known))
    found = [default_tiles(name, head_dim, dtype, compute_capability)]
    for fields in table[nearest]:
        block_q, block_k, warps, stages, *limit = fields
        tiles = Tiles(block_q, block_k, warps, stages, max_registers=limit[0] if limit else None)
        while tiles.num_stages > 2 and not fits(name, tiles, H, dtype, compute_capability):
            tiles = dataclasses.replace(tiles, num_stages=tiles.num_stages - 1)
        if fits(name, tiles, H, dtype, compute_capability) and tiles not in found:
            found.append(tiles)
    return found


def fits(name: Pass, tiles: Tiles, head_dim: int, dtype: str, compute_capability: int) -> bool:
    """Whether a program has the shared memory and, by and large, the registers that it needs."""
    needed = shared_memory(name, tiles, head_dim, dtype)
    if needed > shared_memory_limit(compute_capability):
        return False
    return _sums_per_thread(name, tiles, head_dim) <= 192


def _sums_per_thread(name: Pass, tiles: Tiles, head_dim: int) -> float:
    """float32 numbers that a thread holds across a step of the loop, logits included."""
    square = tiles.block_q * tiles.block_k
    kept = {
        "forward": tiles.block_q * head_dim + square,
        "queries": tiles.block_q * head_dim + 2 * square,
        "keys": 2 * tiles.block_k * head_dim + 2 * square,
    }[name]
    return kept / (32 * tiles.num_warps)


def with_heads_at_once(tiles: Tiles) -> Iterator[Tiles]:
    """The same tiles with every other number of heads at once."""
    for heads in HEADS_AT_ONCE:
        if heads != tiles.heads_at_once:
            yield dataclasses.replace(tiles, heads_at_once=heads)

"""Tile configurations of the kernels, and how they are chosen or set from outside.

A CTA (thread block) has one warpgroup that loads and `CONSUMERS` that compute, each of which has
`BLOCK_Q` queries in the kernels that go by queries and `BLOCK_K` keys in those that go by keys.
Others were measured and were faster in one cell, by 3 % (docs/kernels.md).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses

from rbf_jax.ops.gpu.context import setting

HEAD_DIMS = (64, 128, 256)
BLOCK_Q = 64  # queries of a consumer, or of a step
SHARED_MEMORY = 227 * 1024  # bytes that a CTA may have, compute capability 9.0


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Configuration of the forward kernel; its two consumers take turns on the tensor cores.

    Attributes:
      block_k: keys of a step: 64, 128, 192 or 256.
      stages: tiles of keys and values in shared memory, at least 2.
      tiles_per_cta: query tiles that each CTA processes in sequence, so that the loads of the next
        one overlap the end of the last.
    """

    block_k: int = 128
    stages: int = 2
    tiles_per_cta: int = 1

    def __post_init__(self):
        if self.block_k not in (64, 128, 192, 256):
            raise ValueError(f"block_k={self.block_k} must be 64, 128, 192 or 256.")
        _require_at_least("stages", self.stages, 2)
        _require_at_least("tiles_per_cta", self.tiles_per_cta, 1)

    consumers = 2
    registers = (232, 40)  # of a thread that computes, and of one that loads

    @property
    def rows(self) -> int:
        """Queries of one tile of a CTA."""
        return BLOCK_Q * self.consumers


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Configuration of the backward kernels.

    Attributes:
      stages: tiles of keys and values, or of queries and their gradients, in shared memory, at
        least 2.
      consumers: warpgroups that compute, 1 or 2.
      fused: one kernel computes all gradients; it adds up dq in float32 in any order, so that its
        last bits differ from run to run. Else two kernels, whose results are the same to the bit.
    """

    stages: int = 2
    consumers: int = 2
    fused: bool = False

    def __post_init__(self):
        _require_at_least("stages", self.stages, 2)
        if self.consumers not in (1, 2):
            raise ValueError(f"consumers={self.consumers} must be 1 or 2.")
        if self.fused and self.consumers == 1:  # it would wait for products of its own next step
            raise ValueError(f"fused={self.fused} requires consumers=2, not 1.")

    block_k = 64  # keys of a consumer, or of a step
    tiles_per_cta = 1

    @property
    def rows(self) -> int:
        """Queries of a CTA in the kernel that goes by queries."""
        return BLOCK_Q * self.consumers

    @property
    def keys(self) -> int:
        """Keys of a CTA in the kernels that go by keys."""
        return self.block_k * self.consumers

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that computes, and of one that loads."""
        return (240, 24) if self.fused else {1: (240, 40), 2: (232, 40)}[self.consumers]


def _require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")


_in_use: contextvars.ContextVar[tuple[ForwardTiles | None, BackwardTiles | None]] = (
    contextvars.ContextVar("rbf_jax_mosaic_tiles", default=(None, None))
)


def use_tiles(
    forward: ForwardTiles | None = None, backward: BackwardTiles | None = None
) -> contextlib.AbstractContextManager[None]:
    """Sets the tiles of programs that are traced within this context; None leaves them alone."""
    old_forward, old_backward = _in_use.get()
    return setting(_in_use, (forward or old_forward, backward or old_backward))


def tiles_in_use() -> tuple[ForwardTiles | None, BackwardTiles | None]:
    """The tiles of the forward and of the backward pass that `use_tiles` has set, if any."""
    return _in_use.get()


def choose(
    head_dim: int, plain: bool, length: int, num_heads: int, num_multiprocessors: int = 132
) -> ForwardTiles:
    """Returns the forward tiles that `python -m experiments.bench_mosaic` found on H100 and H200.

    Args:
      head_dim: one of `HEAD_DIMS`.
      plain: neither causality nor a window cuts blocks of keys, and there is no running maximum: a
        step may be longer.
      length: T.
      num_heads: B·N.
      num_multiprocessors: of the GPU; each holds one CTA.
    """
    tiles = ForwardTiles(block_k={64: 256 if plain else 128, 128: 128, 256: 64}[head_dim])
    tiles_per_cta = _most_tiles_per_cta(head_dim, plain, length)

    def turns(tiles_per_cta: int) -> int:
        """Query tiles that the busiest multiprocessor computes."""
        ctas = num_heads * -(-length // (tiles.rows * tiles_per_cta))
        return tiles_per_cta * -(-ctas // num_multiprocessors)

    while turns(tiles_per_cta) > turns(1):
        tiles_per_cta //= 2
    return dataclasses.replace(tiles, tiles_per_cta=tiles_per_cta)


def _most_tiles_per_cta(head_dim: int, plain: bool, length: int) -> int:
    """The fastest, or within 4 % of it, where all multiprocessors have tiles (docs/kernels.md).

    Windows and online softmax were not measured: they go by causality.
    """
    if length > 4096 or head_dim == 256:
        return 1
    if head_dim == 64:
        return 4 if plain else 8
    return 2 if plain else 1


def choose_backward(head_dim: int, *, deterministic: bool = False) -> BackwardTiles:
    """Returns the backward tiles, likewise.

    Args:
      head_dim: one of `HEAD_DIMS`.
      deterministic: no CTAs may add to the same memory, so that there are two kernels.
    """
    if head_dim <= 128 and not deterministic:
        return BackwardTiles(stages=3 if head_dim == 64 else 2, fused=True)
    return BackwardTiles(consumers=2 if head_dim <= 128 else 1)

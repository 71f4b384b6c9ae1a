"""Sizes of the kernels' tiles, how they are chosen and how one overrides the choice."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from typing import Literal

from rbf_jax.ops.gpu.context import override

HEAD_DIMS = (64, 128, 256)
Kernel = Literal["forward", "queries", "keys", "gradients"]
_LARGEST_SHARED_MEMORY = 227 * 1024  # of a block, compute capability 9.0
_ALIGNMENT = 1024  # of an array in shared memory
_REDUCTIONS = 2048  # what Mosaic has for reductions across warps
_REGISTERS = {1: (240, 40), 2: (232, 40), 3: (160, 32)}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of a kernel.

    Attributes:
      block_q: queries of a consumer warpgroup, a multiple of 64.
      block_k: keys of a step, a multiple of 64 up to 256.
      stages: tiles of keys and values in shared memory, at least 2.
      consumers: warpgroups that compute, 1 to 3; one more loads.
      pingpong: two consumers take turns, one in its softmax while the other multiplies.
      visits: tiles of queries that a block of threads of the forward pass computes one after the
        other, so that the next one's loads hide the last one's end.
      one_kernel: the backward pass is one kernel, whose dq differs in the last bits from run to
        run, and not two.
    """

    block_q: int = 64
    block_k: int = 128
    stages: int = 2
    consumers: int = 2
    pingpong: bool = True
    visits: int = 1
    one_kernel: bool = False

    def __post_init__(self):
        if self.block_q < 64 or self.block_q % 64:
            raise ValueError(f"block_q={self.block_q} must be a multiple of 64.")
        if self.block_k not in (64, 128, 192, 256):
            raise ValueError(f"block_k={self.block_k} must be a multiple of 64 up to 256.")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages} must be at least 2.")
        if self.consumers not in _REGISTERS:
            raise ValueError(f"consumers={self.consumers} must be one of {sorted(_REGISTERS)}.")
        if self.visits < 1:
            raise ValueError(f"visits={self.visits} must be at least 1.")
        if self.pingpong and self.consumers != 2:
            raise ValueError(
                f"pingpong={self.pingpong} requires consumers=2, not {self.consumers}."
            )
        # A lone warpgroup would wait for products that it does itself, a step later.
        if self.one_kernel and self.consumers == 1:
            raise ValueError(
                f"one_kernel={self.one_kernel} requires consumers of at least 2, not 1."
            )

    @property
    def rows(self) -> int:
        """Queries of a block of threads."""
        return self.block_q * self.consumers

    @property
    def keys(self) -> int:
        """Keys of a block of threads, where consumers share them."""
        return self.block_k * self.consumers

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that computes, and of one that loads."""
        return (240, 24) if self.one_kernel and self.consumers == 2 else _REGISTERS[self.consumers]

    @property
    def backward_kernels(self) -> tuple[Kernel, ...]:
        """Which kernels the backward pass is."""
        return ("gradients",) if self.one_kernel else ("queries", "keys")

    def shared_memory(self, kernel: Kernel, head_dim: int) -> int:
        """Bytes of shared memory that a block of threads of a kernel asks for."""
        by_keys = kernel in ("keys", "gradients")
        kept = self.keys if by_keys else self.rows
        moving = self.stages * (self.block_q if by_keys else self.block_k)
        buffers = min(self.visits, 2) if kernel == "forward" else 2
        vectors = [kept] * buffers + [moving] * 2
        numbers = [kept, 2 * moving] if by_keys else [2 * kept, moving]
        if kernel == "forward":
            numbers = [kept, kept, moving, self.visits * self.consumers]
        arrays = [2 * head_dim * x for x in vectors] + [4 * x for x in numbers]
        barriers = self.consumers + 4 * self.stages
        if kernel == "forward":
            barriers += 2
        if kernel == "gradients":
            barriers += 2 * self.consumers
            arrays += [2 * self.keys * self.rows, 4 * self.rows * head_dim]
        reductions = 0 if kernel == "gradients" else _REDUCTIONS
        return sum(-(-x // _ALIGNMENT) * _ALIGNMENT for x in arrays) + 8 * barriers + reductions

    def fits(self, kernel: Kernel, head_dim: int) -> bool:
        """Whether an H100 has the shared memory."""
        return self.shared_memory(kernel, head_dim) <= _LARGEST_SHARED_MEMORY


_overrides: contextvars.ContextVar[tuple[Tiles | None, Tiles | None]] = contextvars.ContextVar(
    "rbf_jax_mosaic_tiles", default=(None, None)
)


def override_tiles(
    forward: Tiles | None = None, backward: Tiles | None = None
) -> contextlib.AbstractContextManager[None]:
    """Within it, the kernels of programs that are traced have these tiles; None: as before.

    Raises:
      ValueError: the backward pass is to visit several tiles, which only the forward pass does.
    """
    if backward is not None and backward.visits > 1:
        raise ValueError(f"backward has visits={backward.visits}, which must be 1.")
    old_forward, old_backward = _overrides.get()
    return override(_overrides, (forward or old_forward, backward or old_backward))


def overridden() -> tuple[Tiles | None, Tiles | None]:
    """The tiles of the forward and of the backward pass by `override_tiles`, if any."""
    return _overrides.get()


def choose(
    head_dim: int, plain: bool, length: int, num_heads: int, num_multiprocessors: int = 132
) -> Tiles:
    """For the forward pass, by `python -m experiments.bench_mosaic` on an H100 and an H200.

    Args:
      head_dim: one of `HEAD_DIMS`.
      plain: neither causality nor a window cuts blocks of keys, and there is no running maximum: a
        step may be longer.
      length: T.
      num_heads: B·N.
      num_multiprocessors: of the GPU; each holds one block of threads.
    """
    tiles = Tiles(block_k={64: 256 if plain else 128, 128: 128, 256: 64}[head_dim])
    visits = _most_visits(head_dim, plain, length)

    def turns(visits: int) -> int:
        """Tiles of queries that the busiest multiprocessor computes."""
        blocks = num_heads * -(-length // (tiles.rows * visits))
        return visits * -(-blocks // num_multiprocessors)

    while turns(visits) > turns(1):
        visits //= 2
    return dataclasses.replace(tiles, visits=visits)


def _most_visits(head_dim: int, plain: bool, length: int) -> int:
    """The fastest, or within 4 % of it, where all multiprocessors have tiles (docs/kernels.md).

    Windows and online softmax were not measured: they go by causality.
    """
    if length > 4096 or head_dim == 256:
        return 1
    if head_dim == 64:
        return 4 if plain else 8
    return 2 if plain else 1


def choose_backward(head_dim: int, *, two_kernels: bool = False) -> Tiles:
    """For the backward pass, likewise.

    Args:
      head_dim: one of `HEAD_DIMS`.
      two_kernels: not the one that adds to memory which other blocks of threads add to.
    """
    if head_dim <= 128 and not two_kernels:
        stages = 3 if head_dim == 64 else 2
        return Tiles(block_k=64, stages=stages, pingpong=False, one_kernel=True)
    consumers = 2 if head_dim <= 128 else 1
    return Tiles(block_k=64, consumers=consumers, pingpong=False)

"""What the Mosaic GPU kernels have in common."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from rbf_jax.ops.gpu.program import CommonRules

ROWS = plgpu.Layout.WGMMA.reduce(1)  # one number for each row of a tile of logits
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_LOAD_WANTS_AN_INDEX = _INDEX is not None and _INDEX.default is inspect.Parameter.empty


@dataclasses.dataclass(frozen=True)
class Rules(CommonRules):
    """What the kernel is made for.

    Attributes:
      num_queries: T; the arrays may be longer.
      num_keys: S, likewise.
      left: query i attends to keys j ≥ i − left; None for no such rule.
      right: query i attends to keys j ≤ i + right; None for no such rule.
      online: online softmax from the start.
    """

    num_queries: int
    num_keys: int
    left: int | None = None
    right: int | None = None
    online: bool = False


class Blocks(NamedTuple):
    """Which blocks of keys are visited; between the inner two every pair is allowed."""

    start: jax.Array
    inner_start: jax.Array
    inner_stop: jax.Array
    stop: jax.Array


def kernel(body, results, memory: NamedTuple, grid: tuple[int, int, int], consumers: int):
    """A kernel of blocks by heads, tiles and batch, each of `consumers` warpgroups and one more."""
    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=list(memory),
        grid=grid,
        grid_names=("heads", "tiles", "batch"),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def load(ref, layout) -> jax.Array:
    """All of a reference; jax 0.10.2 wants an index, later ones do not."""
    whole = ((),) if _LOAD_WANTS_AN_INDEX else ()
    return plgpu.load(ref, *whole, layout=layout)


def swizzled(like: jax.Array, *shape: int) -> Any:
    """Shared memory for vectors (*shape, H), laid out as wgmma reads it."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((*shape, like.shape[-1]), like.dtype, transforms=transforms)


def extent(rules: Rules, lengths, batch: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where queries and keys of an element of the batch end, and the position of query 0."""
    return (
        lengths[batch, 0] if rules.query_lengths else jnp.int32(rules.num_queries),
        lengths[batch, 1] if rules.key_lengths else jnp.int32(rules.num_keys),
        lengths[batch, 2] if rules.offset else jnp.int32(0),
    )


def tile_indices(
    shape: tuple[int, ...], first: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Along each axis of a tile of logits, counted from where the tile begins."""
    here, there = (
        plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )
    return here + first, there + second


def near_enough(rules: Rules, allowed: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Those of the allowed pairs that causality and the window allow, by position."""
    if rules.causal:
        allowed &= columns <= rows
    if rules.left is not None:
        allowed &= columns >= rows - rules.left
    if rules.right is not None:
        allowed &= columns <= rows + rules.right
    return allowed


def blocks_of(length: jax.Array, size: jax.Array) -> jax.Array:
    """How many blocks of a size hold the length."""
    return lax.div(length + size - 1, size)


def sum_of_eights(x: jax.Array) -> jax.Array:
    """(rows, 8): a thread adds what it has; threads are added once, after the last block."""
    parts = [x[:, i : i + 8] for i in range(0, x.shape[1], 8)]
    while len(parts) > 1:
        odd = parts[len(parts) & ~1 :]
        parts = [a + b for a, b in zip(parts[::2], parts[1::2])] + odd
    return parts[0]

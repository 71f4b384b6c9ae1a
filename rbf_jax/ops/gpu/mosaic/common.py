"""What the Mosaic GPU kernels have in common."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from rbf_jax.ops.call import Rules
from rbf_jax.ops.logits import alibi_distance, allowed_by_position

_SMEM_ALIGNMENT = 1024  # of an array in shared memory
_REDUCTIONS = 2048  # what Mosaic has for reductions across warps
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one number for each row of a tile of logits
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_LOAD_WANTS_AN_INDEX = _INDEX is not None and _INDEX.default is inspect.Parameter.empty


class Lengths(NamedTuple):
    """T and S of a call; the arrays of a kernel may be longer."""

    queries: int
    keys: int


def kernel(body, results, memory: NamedTuple, grid: tuple[int, int, int], consumers: int):
    """A kernel with CTAs by heads, tiles and batch, each of `consumers` warpgroups and a loader."""
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


def shared_memory(types: Iterable[Any], *, reductions: bool = True) -> int:
    """Returns the bytes of shared memory that a CTA with these arrays and barriers asks for.

    Args:
      types: of the scratch memory.
      reductions: the kernel reduces across warps, for which Mosaic has memory of its own.
    """
    total = _REDUCTIONS if reductions else 0
    for kind in types:
        if isinstance(kind, plgpu.Barrier):
            number = kind.num_barriers  # an int in some versions of jax, a shape in others
            total += 8 * (number if isinstance(number, int) else math.prod(number))
        else:
            size = math.prod(kind.shape) * jnp.dtype(kind.dtype).itemsize
            total += -(-size // _SMEM_ALIGNMENT) * _SMEM_ALIGNMENT
    return total


def extent(
    rules: Rules, true: Lengths, lengths, batch: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where queries and keys of an element of the batch end, and the position of query 0."""
    return (
        lengths[batch, 0] if rules.has_query_lengths else jnp.int32(true.queries),
        lengths[batch, 1] if rules.has_key_lengths else jnp.int32(true.keys),
        lengths[batch, 2] if rules.has_offset else jnp.int32(0),
    )


def tile_indices(
    shape: tuple[int, ...], first: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Along each axis of a tile of logits, counted from where the tile begins."""
    here, there = (
        plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )
    return here + first, there + second


def with_rules(
    logits: jax.Array,
    rules: Rules,
    slope: jax.Array,
    positions: jax.Array,
    columns: jax.Array,
    inside: jax.Array | None,
) -> jax.Array:
    """Adds ALiBi to a tile of logits, and −∞ where a pair is not allowed.

    Args:
      logits: the tile.
      rules: of the call.
      slope: of ALiBi.
      positions: of the queries.
      columns: positions of the keys.
      inside: whether lengths allow a pair; None where every rule allows all of the tile.
    """
    if rules.has_alibi:
        logits -= alibi_distance(rules, positions, columns) * slope
    if inside is None:
        return logits
    near = allowed_by_position(rules, positions, columns)
    return jnp.where(inside if near is None else inside & near, logits, -jnp.inf)


def sum_of_eights(x: jax.Array) -> jax.Array:
    """(rows, 8): a thread adds what it has; threads are added once, after the last block."""
    parts = [x[:, i : i + 8] for i in range(0, x.shape[1], 8)]
    while len(parts) > 1:
        odd = parts[len(parts) & ~1 :]
        parts = [a + b for a, b in zip(parts[::2], parts[1::2])] + odd
    return parts[0]

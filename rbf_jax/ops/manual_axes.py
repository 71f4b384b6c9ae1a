"""Inside shard_map: over which mesh axes a value varies, and letting several vary alike."""

from __future__ import annotations

from typing import Any

import jax


def vary_together(arrays):
    """Lets all arrays of a tree vary over every mesh axis that any of them varies over.

    A rule of differentiation may then mix them freely; the gradient of one that was the same on
    all devices is summed over them by JAX, as the transpose of this cast. Nothing happens outside
    of shard_map.
    """
    return vary_like(arrays, arrays)


def vary_like(arrays, others):
    """Lets the arrays of a tree vary over every mesh axis that any of the others varies over."""
    axes = frozenset().union(*(_varying_axes(x) for x in jax.tree.leaves(others)))

    def cast(x):
        missing = tuple(sorted(axes - _varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def struct_like(shape: tuple[int, ...], dtype: Any, other: jax.Array) -> jax.ShapeDtypeStruct:
    """What a Pallas kernel writes that varies over the mesh axes that another array varies over."""
    if not varies(other):
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(other).manual_axis_type)


def varies(x: jax.Array) -> bool:
    """Whether it varies over any mesh axis, of a shard_map that checks this (`check_vma`)."""
    return bool(_varying_axes(x))


def _varying_axes(x: jax.Array) -> frozenset[str]:
    aval = jax.typeof(x)
    if hasattr(aval, "manual_axis_type"):  # jax 0.10.2
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(aval.vma)

"""What surrounds any kernel: key norms, filled rows, vmap, and a part for each device of a mesh.

XLA computes the key norms beforehand, once per key, unless the caller has them. The batch is the
first axis of every array: vmap folds the axis that it adds into it, and each device of a mesh calls
the kernels on its part of batch and heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.ops.call import AXES, CACHE_AXES, Inputs, Masking, Rules
from rbf_jax.ops.manual_axes import vary_like
from rbf_jax.ops.parallel import custom_partitioning
from rbf_jax.ops.vjp import Gradients, Passes, Residuals

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# Arrays with one number per query or key have rows that are a multiple of this long.
_ALIGNMENT = 16


class Rows(NamedTuple):
    """What the backward pass knows of each query."""

    out: jax.Array  # (B, T, N, H)
    dout: jax.Array
    logsumexp: jax.Array  # (B, N, T'), as the forward kernel left it
    dlogsumexp: jax.Array | None  # (B, T, N)


# As kernels read and write them.
_AXES = AXES | dict.fromkeys(("query_moment", "norm_moment"), "bn") | {"logsumexp": "bnt"}

# Takes static choices and arrays of a part of batch and heads; arrays with a number per head are
# (B or 1, N). Moments that it returns have a batch axis.
ForwardKernels = Callable[[Any, Inputs, Masking], tuple[jax.Array, jax.Array]]
BackwardKernels = Callable[[Any, Inputs, Masking, Rows], Gradients]


def passes(
    plan: Callable[[Rules], Any], forward_kernels: ForwardKernels, backward_kernels: BackwardKernels
) -> Passes:
    """Returns the passes of an implementation by kernels, whose logsumexp has base 2.

    Args:
      plan: makes what the kernels get of the rules: all static choices of a call, hashable.
      forward_kernels: returns the output and the logsumexp, (B, N, T'), +∞ where a row may attend
        to nothing.
      backward_kernels: returns the gradients.
    """

    def forward(inputs: Inputs, masking: Masking, rules: Rules) -> tuple[jax.Array, jax.Array]:
        arrays = with_batch_axis(inputs, masking)
        static = plan(rules.for_kernels(masking))
        return compiled(forward_kernels, static, ("out", "logsumexp"), *arrays)

    def backward(
        residuals: Residuals, dout: jax.Array, dlogsumexp: jax.Array, rules: Rules
    ) -> Gradients:
        given = dlogsumexp if rules.return_residual else None
        rows = Rows(residuals.out, dout, residuals.logsumexp, given)
        arrays = with_batch_axis(residuals.inputs, residuals.masking)
        static = plan(rules.for_kernels(residuals.masking))
        found = Gradients(*compiled(backward_kernels, static, Gradients._fields, *arrays, rows))
        return found._replace(
            query_moment=found.query_moment.sum(0), norm_moment=found.norm_moment.sum(0)
        )

    return Passes(forward, backward, _natural_logsumexp, _own_logsumexp)


def decode(
    kernels: ForwardKernels, plan: Any, inputs: Inputs, masking: Masking
) -> tuple[jax.Array, jax.Array]:
    """Returns the output and the natural logsumexp (B, T, N); the keys are in a cache."""
    arrays = with_batch_axis(inputs, masking)
    return compiled(kernels, plan, ("out", "logsumexp"), *arrays, in_cache=True)


@functools.partial(jax.jit, static_argnames=("kernels", "plan", "results", "in_cache"))
def compiled(kernels, plan, results: tuple[str, ...], *trees, in_cache: bool = False) -> Any:
    """Runs kernels on named tuples of arrays; compiled once for each set of static arguments.

    Args:
      kernels: of the plan and the trees.
      plan: static choices.
      results: names of what it returns.
      *trees: named tuples of arrays; the first array has batch and query heads.
      in_cache: keys are laid out as in a cache, and the logsumexp is (B, T, N).
    """
    table = CACHE_AXES if in_cache else _AXES
    named = [item for tree in trees for item in tree._asdict().items()]
    letters = [table[name] for name, array in named if array is not None]
    # What has a number per head has a batch axis in front of it, of size 1 as a rule.
    axes = ["bn" if x == "n" else x for x in letters]
    call = functools.partial(
        custom_partitioning.by_batch_and_heads,
        functools.partial(kernels, plan),
        axes,
        [table[name] for name in results],
    )
    made = _folding_vmap(call, [x in ("n", "bnts") for x in letters])(*trees)
    return vary_like(tuple(made), trees)  # Pallas forgets over which mesh axes results vary.


def _folding_vmap(function, shared: Sequence[bool]):
    """Gives a function of trees a rule for vmap: the axis it adds is folded into the batch.

    The batch is the first axis of all arrays; those that are `shared` may have size 1 there.
    """
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def rule(axis_size, in_batched, *trees):
        arrays, structure = jax.tree.flatten(trees)
        batched = jax.tree.leaves(in_batched)
        batch_size = arrays[0].shape[1 if batched[0] else 0]

        def fold(x, batched, is_shared):
            if is_shared and not batched and x.shape[0] == 1:
                return x
            if not batched:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            x = jnp.broadcast_to(x, (axis_size, batch_size, *x.shape[2:]))
            return x.reshape(axis_size * batch_size, *x.shape[2:])

        folded = map(fold, arrays, batched, shared)
        out = call(*jax.tree.unflatten(structure, folded))
        out = jax.tree.map(lambda x: x.reshape(axis_size, batch_size, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call


def with_batch_axis(inputs: Inputs, masking: Masking) -> tuple[Inputs, Masking]:
    """Gives arrays with a number per head a batch axis of size 1, and makes the key norms."""

    def add_axis(x):
        return None if x is None else x[None]

    query_segments, key_segments = masking.query_segments, masking.key_segments
    if query_segments is not None and key_segments is not None:
        dtype = jnp.promote_types(query_segments.dtype, key_segments.dtype)
        query_segments, key_segments = query_segments.astype(dtype), key_segments.astype(dtype)
    inputs = inputs._replace(
        gamma=inputs.gamma[None],
        key_norm_weight=inputs.key_norm_weight[None],
        sink_logits=add_axis(inputs.sink_logits),
        key_norms=inputs.squared_key_norms(),
    )
    return inputs, masking._replace(
        query_segments=query_segments,
        key_segments=key_segments,
        alibi_slopes=add_axis(masking.alibi_slopes),
    )


def numbers_per_head(inputs: Inputs, masking: Masking) -> jax.Array:
    """2γ, λγ, the ALiBi slopes and, if there are any, the sinks' logits, times log₂e.

    Returns:
      float32 (B or 1, 3 or 4, N).
    """
    gamma, slopes = inputs.gamma, masking.alibi_slopes
    numbers = [2 * gamma, gamma * inputs.key_norm_weight]
    numbers.append(jnp.zeros_like(gamma) if slopes is None else slopes)
    if inputs.sink_logits is not None:
        numbers.append(inputs.sink_logits)
    shape = max(x.shape[0] for x in numbers), gamma.shape[1]
    return jnp.float32(LOG2E) * jnp.stack([jnp.broadcast_to(x, shape) for x in numbers], axis=1)


def _natural_logsumexp(logsumexp: jax.Array, inputs: Inputs) -> jax.Array:
    """From base 2, (B, N, T'), +∞ where a row may attend to nothing; see `vjp.Passes`."""
    logsumexp = logsumexp[..., : inputs.query.shape[1]].swapaxes(1, 2)
    return jnp.where(jnp.isposinf(logsumexp), -jnp.inf, logsumexp * jnp.float32(LN2))


def _own_logsumexp(logsumexp: jax.Array) -> jax.Array:
    """The inverse of `_natural_logsumexp`."""
    logsumexp = jnp.where(jnp.isneginf(logsumexp), jnp.inf, logsumexp / jnp.float32(LN2))
    return filled(logsumexp.swapaxes(1, 2))


def aligned(length: int) -> int:
    """The length of a row that holds one number per query or key."""
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def filled(rows: jax.Array, size: int = _ALIGNMENT, fill: float = 0) -> jax.Array:
    """Fills rows, (B, heads, length), up to a multiple of a size."""
    return jnp.pad(rows, [(0, 0), (0, 0), (0, -rows.shape[-1] % size)], constant_values=fill)

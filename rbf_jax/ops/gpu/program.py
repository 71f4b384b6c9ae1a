"""What surrounds the kernels, Triton's and Mosaic's alike.

Key norms are made beforehand, once per key, by XLA, unless the caller has them. The batch is the
first axis of every array: vmap folds the axis that it adds into it, and each device of a mesh calls
the kernels on its part of batch and heads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.ops.call import Inputs, Masking, Options
from rbf_jax.ops.gpu.vmap import folding_vmap
from rbf_jax.ops.parallel import custom_partitioning
from rbf_jax.ops.parallel.manual_axes import vary_like
from rbf_jax.ops.vjp import Gradients, Residuals

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# Rows of numbers, one per query or key, are multiples of this long (`triton.common.ALIGNMENT`).
_ALIGNMENT = 16


class Full(NamedTuple):
    """Arrays that have an entry for each element of the batch."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    key_norms: jax.Array  # (B, S, K)
    query_lengths: jax.Array | None
    key_lengths: jax.Array | None
    query_segments: jax.Array | None
    key_segments: jax.Array | None
    query_offset: jax.Array | None


class Shared(NamedTuple):
    """Arrays whose batch axis may have size 1."""

    gamma: jax.Array  # (B or 1, N)
    key_norm_weight: jax.Array
    slopes: jax.Array | None
    mask: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonRules:
    """Of the static rules of a call, which say what code kernels contain, those that all have.

    Attributes:
      causal: query i attends to keys j ≤ i.
      sink: a virtual key at the origin with value 0.
      slopes: ALiBi.
      query_lengths: whether there are any.
      key_lengths: whether there are any.
      offset: whether positions of queries, by which causality, windows and ALiBi go, are not their
        indices.
    """

    causal: bool = False
    sink: bool = False
    slopes: bool = False
    query_lengths: bool = False
    key_lengths: bool = False
    offset: bool = False


def common_rules(options: Options, full: Full, shared: Shared) -> dict[str, bool]:
    """Those of a call, by name."""
    return {
        "causal": options.is_causal,
        "sink": options.origin_sink,
        "slopes": shared.slopes is not None,
        "query_lengths": full.query_lengths is not None,
        "key_lengths": full.key_lengths is not None,
        "offset": full.query_offset is not None,
    }


class Rows(NamedTuple):
    """What the backward pass knows of each query."""

    out: jax.Array  # (B, T, N, H)
    dout: jax.Array
    logsumexp: jax.Array  # (B, N, T'), as the kernel left it
    dlogsumexp: jax.Array | None  # (B, T, N)


# The axes of an array: b batch, n query heads, k key/value heads, and others.
_ROLES = {
    **dict.fromkeys(("query", "out", "dout"), "b.n."),
    **dict.fromkeys(("key", "value"), "b.k."),
    "key_norms": "b.k",
    **dict.fromkeys(("query_lengths", "key_lengths", "query_offset"), "b"),
    **dict.fromkeys(("query_segments", "key_segments"), "b."),
    **dict.fromkeys(("gamma", "key_norm_weight", "slopes"), "bn"),
    **dict.fromkeys(("query_moment", "norm_moment"), "bn"),
    "mask": "bn..",
    "logsumexp": "bn.",
    "dlogsumexp": "b.n",
}


def split(inputs: Inputs, masking: Masking) -> tuple[Full, Shared]:
    """The arrays of a call, by whether they have an entry for each element of the batch."""
    query_segments, key_segments = masking.query_segments, masking.key_segments
    if query_segments is not None and key_segments is not None:
        dtype = jnp.promote_types(query_segments.dtype, key_segments.dtype)
        query_segments, key_segments = query_segments.astype(dtype), key_segments.astype(dtype)
    full = Full(
        *inputs[:3],
        inputs.squared_key_norms(),
        masking.query_lengths,
        masking.key_lengths,
        query_segments,
        key_segments,
        masking.query_offset,
    )
    slopes = None if masking.alibi_slopes is None else masking.alibi_slopes[None]
    return full, Shared(inputs.gamma[None], inputs.key_norm_weight[None], slopes, masking.mask)


def needed(options: Options) -> Options:
    """What kernels are made for of the options: programs are kept by it."""
    weight = options.static_key_norm_weight
    return Options(
        options.is_causal,
        options.window,
        options.origin_sink,
        static_key_norm_weight=0.0 if weight is not None and weight <= 0 else None,
    )


def numbers_per_head(shared: Shared) -> jax.Array:
    """2γ, λγ and the slopes, times log₂e: (B or 1, 3, N)."""
    gamma = shared.gamma
    slopes = jnp.zeros_like(gamma) if shared.slopes is None else shared.slopes
    numbers = (2 * gamma, gamma * shared.key_norm_weight, slopes)
    shape = max(x.shape[0] for x in numbers), gamma.shape[1]
    return jnp.float32(LOG2E) * jnp.stack([jnp.broadcast_to(x, shape) for x in numbers], axis=1)


ForwardKernels = Callable[[Any, Full, Shared], tuple[jax.Array, jax.Array]]
BackwardKernels = Callable[[Any, Full, Rows, Shared], Gradients]


def forward(
    kernels: ForwardKernels, plan: Any, inputs: Inputs, masking: Masking
) -> tuple[jax.Array, jax.Array]:
    """Returns the output and the logsumexp as the kernels leave it.

    Args:
      kernels: what calls them, with arrays of a part of the batch and of the heads.
      plan: its first argument, all static choices of the call, hashable.
      inputs: of the call.
      masking: of the call.
    """
    return forward_program(kernels, plan, *split(inputs, masking))


def backward(
    kernels: BackwardKernels,
    plan: Any,
    residuals: Residuals,
    dout: jax.Array,
    dlogsumexp: jax.Array | None,
) -> Gradients:
    """Returns the gradients.

    Args:
      kernels: what calls them, as in `forward`; moments of what it returns have a batch axis.
      plan: its first argument.
      residuals: of the forward pass.
      dout: (B, T, N, H).
      dlogsumexp: (B, T, N), or None where it is 0.
    """
    rows = Rows(residuals.out, dout, residuals.logsumexp, dlogsumexp)
    full, shared = split(residuals.inputs, residuals.masking)
    gradients = backward_program(kernels, plan, full, shared, rows)
    return gradients._replace(
        query_moment=gradients.query_moment.sum(0), norm_moment=gradients.norm_moment.sum(0)
    )


@functools.partial(jax.jit, static_argnames=("kernels", "plan"))
def forward_program(
    kernels: ForwardKernels, plan: Any, full: Full, shared: Shared
) -> tuple[jax.Array, jax.Array]:
    """`forward`, compiled; kept by its static arguments."""

    def on_each_device(full, shared):
        call = functools.partial(kernels, plan)
        return _on_each_device(call, (full, shared), ("out", "logsumexp"))

    return folding_vmap(on_each_device)(full, shared)


@functools.partial(jax.jit, static_argnames=("kernels", "plan"))
def backward_program(
    kernels: BackwardKernels, plan: Any, full: Full, shared: Shared, rows: Rows
) -> Gradients:
    """`backward` before sums over the batch, likewise."""

    def on_each_device(full, shared):
        call = functools.partial(kernels, plan)
        return _on_each_device(call, (*full, shared), Gradients._fields)

    return folding_vmap(on_each_device)((full, rows), shared)


def _on_each_device(kernels, arguments, results):
    """Calls kernels on named tuples of arrays, split by batch and heads where those are sharded.

    Pallas forgets over which axes of a mesh results vary.
    """
    given = [name for group in arguments for name, x in group._asdict().items() if x is not None]
    made = custom_partitioning.by_batch_and_heads(
        kernels, arguments, [_ROLES[x] for x in given], [_ROLES[x] for x in results]
    )
    return vary_like(made, arguments)


def natural_logsumexp(logsumexp: jax.Array, inputs: Inputs) -> jax.Array:
    """From base 2, (B, N, T'), +∞ where a row may attend to nothing; see `vjp.Passes`."""
    logsumexp = logsumexp[..., : inputs.query.shape[1]].swapaxes(1, 2)
    return jnp.where(jnp.isposinf(logsumexp), -jnp.inf, logsumexp * jnp.float32(LN2))


def own_logsumexp(logsumexp: jax.Array) -> jax.Array:
    """The inverse of `natural_logsumexp`."""
    logsumexp = jnp.where(jnp.isneginf(logsumexp), jnp.inf, logsumexp / jnp.float32(LN2))
    return filled(logsumexp.swapaxes(1, 2))


def aligned(length: int) -> int:
    """The length of a row of numbers that holds one for each query or key."""
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def filled(rows: jax.Array, size: int = _ALIGNMENT, fill: float = 0) -> jax.Array:
    """Rows of numbers, (B, heads, length), filled to a multiple of a size."""
    return jnp.pad(rows, [(0, 0), (0, 0), (0, -rows.shape[-1] % size)], constant_values=fill)

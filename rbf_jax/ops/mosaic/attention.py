"""RBF attention by Mosaic GPU kernels on Hopper: what surrounds the kernel, and what it supports.

The forward pass is a Mosaic kernel; the backward pass is that of the Triton kernels, which need the
same residuals. The kernel imports Pallas, so it is imported where it is called.

The kernel runs in Mosaic's interpreter and lowers for compute capability 9.0; it has not been run
on a GPU yet. So `implementation=None` never takes it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.ops.mosaic.tiles import HEAD_DIMS, Tiles, choose, overridden
from rbf_jax.ops.partition import by_batch_and_heads
from rbf_jax.ops.triton import attention as triton
from rbf_jax.ops.triton import launch
from rbf_jax.ops.types import Inputs, Masking, Options
from rbf_jax.ops.vjp import with_custom_vjp
from rbf_jax.ops.vmap import folding_vmap

_LOG2E = 1.4426950408889634
# Mosaic GPU changes with every version of jax: those that the kernel is written for.
_JAX_VERSIONS = ("0.10.2", "0.11.2")
# A TMA load of swizzled tiles needs lengths that are multiples of 8.
_ALIGNMENT = 8


def unsupported(inputs: Inputs, masking: Masking, options: Options) -> str | None:
    """Returns why this call cannot be done here, as the rest of a sentence, or None if it can."""
    del options
    reason = launch.unavailable()
    if reason is not None:
        return reason
    capability = launch.target().compute_capability
    if capability != 90:
        return f"needs compute capability 9.0, and this GPU has {capability / 10}"
    if jax.__version__ not in _JAX_VERSIONS:
        return f"is made for jax {' and '.join(_JAX_VERSIONS)}, and this is jax {jax.__version__}"
    dtype = inputs.query.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"supports bfloat16 and float16, not {dtype}"
    H = inputs.query.shape[-1]
    if max(HEAD_DIMS) < H:
        return f"supports head dimensions up to {max(HEAD_DIMS)}, not {H}"
    if masking.mask is not None:
        return "does not support mask"
    if masking.query_segments is not None:
        return "does not support query_segment_ids and key_value_segment_ids"
    return None


class _Full(NamedTuple):
    """Arrays that have an entry for each element of the batch."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    key_norms: jax.Array  # (B, S, K)
    query_lengths: jax.Array | None
    key_lengths: jax.Array | None
    query_offset: jax.Array | None


class _Shared(NamedTuple):
    """Arrays whose batch axis may have size 1."""

    gamma: jax.Array  # (B or 1, N)
    key_norm_weight: jax.Array
    slopes: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All static choices of a call; hashable, since compiled programs are kept by it."""

    options: Options
    tiles: Tiles | None


_ROLES = {
    **dict.fromkeys(("query", "out"), "b.n."),
    **dict.fromkeys(("key", "value"), "b.k."),
    "key_norms": "b.k",
    **dict.fromkeys(("query_lengths", "key_lengths", "query_offset"), "b"),
    **dict.fromkeys(("gamma", "key_norm_weight", "slopes"), "bn"),
    "logsumexp": "bn.",
}


@functools.partial(jax.jit, static_argnames="plan")
def _forward_program(plan: _Plan, full: _Full, shared: _Shared):
    return folding_vmap(functools.partial(_on_each_device, plan))(full, shared)


def _on_each_device(plan: _Plan, full: _Full, shared: _Shared) -> tuple[jax.Array, jax.Array]:
    arguments = (full, shared)
    given = [name for group in arguments for name, x in group._asdict().items() if x is not None]
    return by_batch_and_heads(
        functools.partial(_forward_kernel, plan),
        arguments,
        [_ROLES[x] for x in given],
        [_ROLES["out"], _ROLES["logsumexp"]],
    )


def _forward_kernel(plan: _Plan, full: _Full, shared: _Shared) -> tuple[jax.Array, jax.Array]:
    from rbf_jax.ops.mosaic.forward import Rules, forward

    B, T, N, H = full.query.shape
    S = full.key.shape[1]
    options = plan.options
    left, right = (None, None) if options.window is None else options.window
    bounded = full.query.dtype == jnp.bfloat16 and options.static_key_norm_weight is None
    rules = Rules(
        num_queries=T,
        num_keys=S,
        causal=options.is_causal,
        left=left,
        right=right,
        sink=options.origin_sink,
        slopes=shared.slopes is not None,
        query_lengths=full.query_lengths is not None,
        key_lengths=full.key_lengths is not None,
        offset=full.query_offset is not None,
        online=not bounded,
    )
    lengths = [
        jnp.full(B, most, jnp.int32) if x is None else x
        for x, most in ((full.query_lengths, T), (full.key_lengths, S), (full.query_offset, 0))
    ]
    query, key = _padded(full.query), _padded(full.key)
    norms = full.key_norms.swapaxes(1, 2)
    out, logsumexp = forward(
        query,
        key,
        _padded(full.value),
        jnp.pad(norms, [(0, 0), (0, 0), (0, key.shape[1] - S)]),
        _numbers_per_head(shared, N),
        jnp.stack(lengths, axis=1),
        rules=rules,
        tiles=plan.tiles or choose(query.shape[-1]),
    )
    return out[:, :T, :, :H], logsumexp


def _padded(x: jax.Array) -> jax.Array:
    """(B, T, N, H), lengths and head dimensions filled with zeros to those of the kernel."""
    length, H = x.shape[1], x.shape[-1]
    more = min(size for size in HEAD_DIMS if size >= H) - H
    return jnp.pad(x, [(0, 0), (0, -length % _ALIGNMENT), (0, 0), (0, more)])


def _numbers_per_head(shared: _Shared, N: int) -> jax.Array:
    """2γ, λγ and the slopes, times log₂e: (B or 1, 3, N)."""
    gamma = shared.gamma
    slopes = jnp.zeros_like(gamma) if shared.slopes is None else shared.slopes
    numbers = (2 * gamma, gamma * shared.key_norm_weight, slopes)
    sets = max(x.shape[0] for x in numbers)
    return jnp.float32(_LOG2E) * jnp.stack([jnp.broadcast_to(x, (sets, N)) for x in numbers], 1)


def _forward(inputs: Inputs, masking: Masking, options: Options):
    weight = options.static_key_norm_weight
    needed = Options(
        options.is_causal,
        options.window,
        options.origin_sink,
        static_key_norm_weight=0.0 if weight is not None and weight <= 0 else None,
    )
    full = _Full(
        *inputs[:3],
        inputs.squared_key_norms(),
        masking.query_lengths,
        masking.key_lengths,
        masking.query_offset,
    )
    slopes = None if masking.alibi_slopes is None else masking.alibi_slopes[None]
    shared = _Shared(inputs.gamma[None], inputs.key_norm_weight[None], slopes)
    return _forward_program(_Plan(needed, overridden()), full, shared)


PASSES = triton.PASSES._replace(forward=_forward)
attend = with_custom_vjp(PASSES)

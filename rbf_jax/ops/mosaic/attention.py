"""RBF attention by Mosaic GPU kernels on Hopper: what surrounds the kernel, and what it supports.

The kernels import Pallas, so they are imported where they are called. The residuals are those of
the Triton kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.ops import nvidia, partition
from rbf_jax.ops.mosaic.tiles import HEAD_DIMS, Tiles, choose, choose_backward, overridden
from rbf_jax.ops.triton import attention as triton
from rbf_jax.ops.types import Inputs, Masking, Options
from rbf_jax.ops.varying import varies, vary_like, vary_together
from rbf_jax.ops.vjp import Gradients, Residuals, with_custom_vjp
from rbf_jax.ops.vmap import folding_vmap

_LOG2E = 1.4426950408889634
# Mosaic GPU changes with every version of jax: those that the kernels are written for.
_JAX_VERSIONS = ("0.10.2", "0.11.2")
_DETERMINISTIC = re.compile(
    r"--xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(=(true|1))?(\s|$)", re.IGNORECASE
)
# The shortest sequences that were measured.
_MEASURED_FROM = 4096
# A TMA load of swizzled tiles needs lengths that are multiples of 8.
_ALIGNMENT = 8


def unsupported(inputs: Inputs, masking: Masking, options: Options) -> str | None:
    """Returns why this call cannot be done here, as the rest of a sentence, or None if it can."""
    del options
    reason = nvidia.unavailable() or partition.unsupported()
    if reason is not None:
        return reason
    capability = nvidia.target().compute_capability
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


def is_faster_than_triton(inputs: Inputs, num_queries: int, num_keys: int) -> bool:
    """Whether calls like this one were measured to be, with so many at once (docs/kernels.md)."""
    measured = inputs.query.dtype == jnp.bfloat16 and inputs.query.shape[-1] in (64, 128)
    return measured and min(num_queries, num_keys) >= _MEASURED_FROM


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
    deterministic: bool
    tiles: Tiles | None
    backward_tiles: Tiles | None


_ROLES = {
    **dict.fromkeys(("query", "out", "dout"), "b.n."),
    **dict.fromkeys(("key", "value"), "b.k."),
    "key_norms": "b.k",
    **dict.fromkeys(("query_lengths", "key_lengths", "query_offset"), "b"),
    **dict.fromkeys(("gamma", "key_norm_weight", "slopes"), "bn"),
    **dict.fromkeys(("query_moment", "norm_moment"), "bn"),
    "logsumexp": "bn.",
    "dlogsumexp": "b.n",
}


@functools.partial(jax.jit, static_argnames="plan")
def _forward_program(plan: _Plan, full: _Full, shared: _Shared):
    def kernels(full, shared):
        kernel = functools.partial(_forward_kernel, plan)
        return _on_each_device(kernel, (full, shared), ("out", "logsumexp"))

    return folding_vmap(kernels)(full, shared)


@functools.partial(jax.jit, static_argnames="plan")
def _backward_program(plan: _Plan, full: _Full, shared: _Shared, rows: triton.Rows) -> Gradients:
    def kernels(full, shared):
        kernel = functools.partial(_backward_kernels, plan)
        return _on_each_device(kernel, (*full, shared), Gradients._fields)

    return folding_vmap(kernels)((full, rows), shared)


def _on_each_device(kernels, arguments, results):
    """Calls kernels on named tuples of arrays, split by batch and heads where those are sharded.

    Pallas forgets over which axes of a mesh results vary.
    """
    given = [name for group in arguments for name, x in group._asdict().items() if x is not None]
    made = partition.by_batch_and_heads(
        kernels, arguments, [_ROLES[x] for x in given], [_ROLES[x] for x in results]
    )
    return vary_like(made, arguments)


def _forward_kernel(plan: _Plan, full: _Full, shared: _Shared) -> tuple[jax.Array, jax.Array]:
    from rbf_jax.ops.mosaic.forward import forward

    bounded = full.query.dtype == jnp.bfloat16 and plan.options.static_key_norm_weight is None
    rules = _rules(plan, full, shared, online=not bounded)
    plain = bounded and not rules.causal and plan.options.window is None
    tiles = plan.tiles or choose(_padded_head_dim(full.query.shape[-1]), plain)
    inputs = _inputs(full, shared, tiles)
    out, logsumexp = forward(*inputs, rules=rules, tiles=tiles)
    _, T, _, H = full.query.shape
    return out[:, :T, :, :H], logsumexp


def _backward_kernels(plan: _Plan, full: _Full, rows: triton.Rows, shared: _Shared) -> Gradients:
    """The gradients; the moments still have a batch axis."""
    _, T, N, H = full.query.shape
    S, K = full.key.shape[1:3]
    # The one kernel adds to a reference, and those must not vary over a mesh.
    two_kernels = plan.deterministic or varies(full.query)
    tiles = plan.backward_tiles or choose_backward(_padded_head_dim(H), two_kernels=two_kernels)
    inputs = _inputs(full, shared, tiles)
    delta = jnp.einsum("btnh,btnh->btn", rows.out, rows.dout, preferred_element_type=jnp.float32)
    if rows.dlogsumexp is not None:
        delta -= rows.dlogsumexp
    of_queries = [
        _padded(rows.dout),
        _in_whole_tiles(rows.logsumexp[..., :T], tiles.rows, jnp.inf),
        _in_whole_tiles(delta.swapaxes(1, 2), tiles.rows),
    ]
    rules = _rules(plan, full, shared, online=True)
    run = _one_kernel if tiles.one_kernel else _two_kernels
    dquery, moments, dkey, dvalue, column_sums = run(inputs, of_queries, rules, tiles)
    norms = jnp.repeat(full.key_norms.swapaxes(1, 2), N // K, axis=1)
    return Gradients(
        dquery[:, :T, :, :H],
        dkey[:, :S, :, :H],
        dvalue[:, :S, :, :H],
        moments,
        jnp.sum(column_sums[..., :S] * norms, axis=-1),
    )


def _two_kernels(inputs, rows, rules, tiles: Tiles) -> tuple[jax.Array, ...]:
    """dq, Σ_i q·dq, dk, dv and Σ_i dS_ij."""
    from rbf_jax.ops.mosaic.backward import queries
    from rbf_jax.ops.mosaic.keys import keys

    dquery, moments = queries(inputs, rows, rules=rules, tiles=tiles)
    moments = jnp.sum(moments[..., : rules.num_queries], axis=-1)
    return dquery, moments, *keys(inputs, rows, rules=rules, tiles=tiles)


def _one_kernel(inputs, rows, rules, tiles: Tiles) -> tuple[jax.Array, ...]:
    """As `_two_kernels`."""
    from rbf_jax.ops.mosaic.gradients import gradients

    query, per_head = inputs[0], inputs[4]
    sums, *of_keys = gradients(inputs, rows, rules=rules, tiles=tiles)
    dquery = sums * (per_head[:, 0] / jnp.float32(_LOG2E))[:, None, :, None]
    moments = jnp.einsum("btnh,btnh->bn", query.astype(jnp.float32), dquery)
    return dquery.astype(query.dtype), moments, *of_keys


def _rules(plan: _Plan, full: _Full, shared: _Shared, *, online: bool):
    from rbf_jax.ops.mosaic.forward import Rules

    options = plan.options
    left, right = (None, None) if options.window is None else options.window
    return Rules(
        num_queries=full.query.shape[1],
        num_keys=full.key.shape[1],
        causal=options.is_causal,
        left=left,
        right=right,
        sink=options.origin_sink,
        slopes=shared.slopes is not None,
        query_lengths=full.query_lengths is not None,
        key_lengths=full.key_lengths is not None,
        offset=full.query_offset is not None,
        online=online,
    )


def _inputs(full: _Full, shared: _Shared, tiles: Tiles) -> list[jax.Array]:
    """The arrays that every kernel reads."""
    B, T, N, _ = full.query.shape
    S = full.key.shape[1]
    lengths = [
        jnp.full(B, most, jnp.int32) if x is None else x
        for x, most in ((full.query_lengths, T), (full.key_lengths, S), (full.query_offset, 0))
    ]
    arrays = [
        _padded(full.query),
        _padded(full.key),
        _padded(full.value),
        _in_whole_tiles(full.key_norms.swapaxes(1, 2), tiles.keys),
        _numbers_per_head(shared, N),
        jnp.stack(lengths, axis=1),
    ]
    return vary_together(arrays)


def _padded(x: jax.Array) -> jax.Array:
    """(B, T, N, H), lengths and head dimensions filled with zeros to those of the kernel."""
    length, H = x.shape[1], x.shape[-1]
    more = _padded_head_dim(H) - H
    return jnp.pad(x, [(0, 0), (0, -length % _ALIGNMENT), (0, 0), (0, more)])


def _padded_head_dim(head_dim: int) -> int:
    return min(size for size in HEAD_DIMS if size >= head_dim)


def _in_whole_tiles(x: jax.Array, size: int, fill: float = 0) -> jax.Array:
    """(B, heads, length), filled to a multiple of the size."""
    return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[-1] % size)], constant_values=fill)


def _numbers_per_head(shared: _Shared, N: int) -> jax.Array:
    """2γ, λγ and the slopes, times log₂e: (B or 1, 3, N)."""
    gamma = shared.gamma
    slopes = jnp.zeros_like(gamma) if shared.slopes is None else shared.slopes
    numbers = (2 * gamma, gamma * shared.key_norm_weight, slopes)
    sets = max(x.shape[0] for x in numbers)
    return jnp.float32(_LOG2E) * jnp.stack([jnp.broadcast_to(x, (sets, N)) for x in numbers], 1)


def _plan(options: Options) -> _Plan:
    weight = options.static_key_norm_weight
    needed = Options(
        options.is_causal,
        options.window,
        options.origin_sink,
        static_key_norm_weight=0.0 if weight is not None and weight <= 0 else None,
    )
    return _Plan(needed, _deterministic(), *overridden())


def _deterministic() -> bool:
    """Whether XLA's own operations are to give the same bits from run to run."""
    return _DETERMINISTIC.search(os.environ.get("XLA_FLAGS", "")) is not None


def _split(inputs: Inputs, masking: Masking) -> tuple[_Full, _Shared]:
    full = _Full(
        *inputs[:3],
        inputs.squared_key_norms(),
        masking.query_lengths,
        masking.key_lengths,
        masking.query_offset,
    )
    slopes = None if masking.alibi_slopes is None else masking.alibi_slopes[None]
    return full, _Shared(inputs.gamma[None], inputs.key_norm_weight[None], slopes)


def _forward(inputs: Inputs, masking: Masking, options: Options):
    return _forward_program(_plan(options), *_split(inputs, masking))


def _backward(residuals: Residuals, dout: jax.Array, dlogsumexp: jax.Array, options: Options):
    rows = triton.Rows(
        residuals.out, dout, residuals.logsumexp, dlogsumexp if options.return_residual else None
    )
    full, shared = _split(residuals.inputs, residuals.masking)
    gradients = _backward_program(_plan(options), full, shared, rows)
    return gradients._replace(
        query_moment=gradients.query_moment.sum(0), norm_moment=gradients.norm_moment.sum(0)
    )


PASSES = triton.PASSES._replace(forward=_forward, backward=_backward)
attend = with_custom_vjp(PASSES)

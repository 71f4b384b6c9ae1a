"""RBF attention by Mosaic GPU kernels on Hopper: what surrounds the kernel, and what it supports.

The kernels import Pallas, so they are imported where they are called.
"""

from __future__ import annotations

import dataclasses
import os
import re

import jax
import jax.numpy as jnp

from rbf_jax.ops.call import Inputs, Masking, Options
from rbf_jax.ops.gpu import device, program
from rbf_jax.ops.gpu.mosaic.config import HEAD_DIMS, Tiles, choose, choose_backward, overridden
from rbf_jax.ops.gpu.program import (
    LOG2E,
    Full,
    Rows,
    Shared,
    common_rules,
    filled,
    natural_logsumexp,
    needed,
    numbers_per_head,
    own_logsumexp,
)
from rbf_jax.ops.parallel import custom_partitioning
from rbf_jax.ops.parallel.manual_axes import varies, vary_together
from rbf_jax.ops.vjp import Gradients, Passes, Residuals, with_custom_vjp

# Mosaic GPU changes with every version of jax: those that the kernels are written for.
_JAX_VERSIONS = ("0.10.2", "0.11.2", "0.12.0.1")
# With these nothing but the lowering was tried: never taken unasked.
_ONLY_LOWERED = ("0.12.0.1",)
_DETERMINISTIC = re.compile(
    r"--xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(=(true|1))?(\s|$)", re.IGNORECASE
)
# The shortest sequences that were measured, in tokens.
_MEASURED_FROM = {"bfloat16": 512, "float16": 4096}
# A TMA load of swizzled tiles needs lengths that are multiples of 8.
_ALIGNMENT = 8


def unsupported(inputs: Inputs, masking: Masking, options: Options) -> str | None:
    """Returns why this call cannot be done here, as the rest of a sentence, or None if it can."""
    del options
    reason = device.unavailable() or custom_partitioning.unsupported()
    if reason is not None:
        return reason
    capability = device.target().compute_capability
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
    """Whether calls of such sizes were measured to be, with so many at once (docs/speed.md)."""
    if jax.__version__ in _ONLY_LOWERED:
        return False
    shortest = _MEASURED_FROM.get(inputs.query.dtype.name)
    if shortest is None or inputs.query.shape[-1] not in (64, 128):
        return False
    return min(num_queries, num_keys) >= shortest


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All static choices of a call; hashable, since compiled programs are kept by it."""

    options: Options
    deterministic: bool
    tiles: Tiles | None
    backward_tiles: Tiles | None


def _forward_kernel(plan: _Plan, full: Full, shared: Shared) -> tuple[jax.Array, jax.Array]:
    from rbf_jax.ops.gpu.mosaic.forward import forward

    bounded = full.query.dtype == jnp.bfloat16 and plan.options.static_key_norm_weight is None
    rules = _rules(plan, full, shared, online=not bounded)
    plain = bounded and not rules.causal and plan.options.window is None
    B, T, N, H = full.query.shape
    tiles = plan.tiles or choose(
        _padded_head_dim(H), plain, T, B * N, device.target().num_multiprocessors
    )
    inputs = _inputs(full, shared, tiles)
    out, logsumexp = forward(*inputs, rules=rules, tiles=tiles)
    return out[:, :T, :, :H], logsumexp


def _backward_kernels(plan: _Plan, full: Full, rows: Rows, shared: Shared) -> Gradients:
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
        filled(rows.logsumexp[..., :T], tiles.rows, jnp.inf),
        filled(delta.swapaxes(1, 2), tiles.rows),
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
    from rbf_jax.ops.gpu.mosaic.backward_keys import keys
    from rbf_jax.ops.gpu.mosaic.backward_queries import queries

    dquery, moments = queries(inputs, rows, rules=rules, tiles=tiles)
    moments = jnp.sum(moments[..., : rules.num_queries], axis=-1)
    return dquery, moments, *keys(inputs, rows, rules=rules, tiles=tiles)


def _one_kernel(inputs, rows, rules, tiles: Tiles) -> tuple[jax.Array, ...]:
    """As `_two_kernels`."""
    from rbf_jax.ops.gpu.mosaic.backward_fused import gradients

    query, per_head = inputs[0], inputs[4]
    sums, *of_keys = gradients(inputs, rows, rules=rules, tiles=tiles)
    dquery = sums * (per_head[:, 0] / jnp.float32(LOG2E))[:, None, :, None]
    moments = jnp.einsum("btnh,btnh->bn", query.astype(jnp.float32), dquery)
    return dquery.astype(query.dtype), moments, *of_keys


def _rules(plan: _Plan, full: Full, shared: Shared, *, online: bool):
    from rbf_jax.ops.gpu.mosaic.common import Rules

    options = plan.options
    left, right = (None, None) if options.window is None else options.window
    return Rules(
        num_queries=full.query.shape[1],
        num_keys=full.key.shape[1],
        left=left,
        right=right,
        online=online,
        **common_rules(options, full, shared),
    )


def _inputs(full: Full, shared: Shared, tiles: Tiles) -> list[jax.Array]:
    """The arrays that every kernel reads."""
    B, T = full.query.shape[:2]
    S = full.key.shape[1]
    lengths = [
        jnp.full(B, most, jnp.int32) if x is None else x
        for x, most in ((full.query_lengths, T), (full.key_lengths, S), (full.query_offset, 0))
    ]
    arrays = [
        _padded(full.query),
        _padded(full.key),
        _padded(full.value),
        filled(full.key_norms.swapaxes(1, 2), tiles.keys),
        numbers_per_head(shared),
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


def _plan(options: Options) -> _Plan:
    return _Plan(needed(options), _deterministic(), *overridden())


def _deterministic() -> bool:
    """Whether XLA's own operations are to give the same bits from run to run."""
    return _DETERMINISTIC.search(os.environ.get("XLA_FLAGS", "")) is not None


def _forward(inputs: Inputs, masking: Masking, options: Options):
    return program.forward(_forward_kernel, _plan(options), inputs, masking)


def _backward(residuals: Residuals, dout: jax.Array, dlogsumexp: jax.Array, options: Options):
    given = dlogsumexp if options.return_residual else None
    return program.backward(_backward_kernels, _plan(options), residuals, dout, given)


PASSES = Passes(_forward, _backward, natural_logsumexp, own_logsumexp)
attend = with_custom_vjp(PASSES)

"""RBF attention by Mosaic GPU kernels on Hopper: how each kernel is called, forward and backward.

The kernels import Pallas, so they are imported where they are called.
"""

from __future__ import annotations

import dataclasses
import os
import re

import jax
import jax.numpy as jnp

from rbf_jax.ops.call import Inputs, Masking, Rules
from rbf_jax.ops.gpu import device
from rbf_jax.ops.gpu.mosaic.config import (
    HEAD_DIMS,
    BackwardTiles,
    ForwardTiles,
    choose,
    choose_backward,
    tiles_in_use,
)
from rbf_jax.ops.gpu.program import (
    LOG2E,
    Rows,
    filled,
    numbers_per_head,
    passes,
)
from rbf_jax.ops.manual_axes import varies, vary_together
from rbf_jax.ops.parallel import custom_partitioning
from rbf_jax.ops.vjp import Gradients

SUPPORTS = frozenset(
    {
        *("left", "right", "sink", "return_residual"),
        *("query_lengths", "key_lengths", "alibi_slopes", "query_offset"),
    }
)
# Mosaic GPU changes with every version of jax. On these the kernels ran and were measured; of the
# others that they are written for only the lowering was tried, so that None never takes them.
MEASURED_ON = ("0.10.2", "0.11.2")
_JAX_VERSIONS = (*MEASURED_ON, "0.12.0.1")
_DETERMINISTIC = re.compile(
    r"--xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(=(true|1))?(\s|$)", re.IGNORECASE
)
# A TMA load of swizzled tiles needs lengths that are multiples of 8.
_ALIGNMENT = 8


def unsupported(inputs: Inputs, rules: Rules) -> str | None:
    """Returns why this call cannot be done here, as the rest of a sentence, or None if it can."""
    del rules
    reason = device.unavailable() or custom_partitioning.unsupported()
    if reason is not None:
        return reason
    capability = device.target().compute_capability
    if capability != 90:
        return f"needs compute capability 9.0, and this GPU has {capability / 10}"
    if jax.__version__ not in _JAX_VERSIONS:
        return f"is made for jax {' and '.join(_JAX_VERSIONS)}, and this is jax {jax.__version__}"
    dtype, H = inputs.query.dtype, inputs.query.shape[-1]
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"supports bfloat16 and float16, not {dtype}"
    if max(HEAD_DIMS) < H:
        return f"supports head dimensions up to {max(HEAD_DIMS)}, not {H}"
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All static choices of a call; hashable, since compiled programs are kept by it."""

    rules: Rules
    deterministic: bool
    forward: ForwardTiles | None
    backward: BackwardTiles | None


def _forward_kernel(plan: _Plan, inputs: Inputs, masking: Masking) -> tuple[jax.Array, jax.Array]:
    from rbf_jax.ops.gpu.mosaic.common import Lengths
    from rbf_jax.ops.gpu.mosaic.forward import forward

    rules = plan.rules
    bounded = inputs.query.dtype == jnp.bfloat16 and rules.static_key_norm_weight is None
    plain = bounded and rules.left is None and rules.right is None
    B, T, N, H = inputs.query.shape
    tiles = plan.forward or choose(
        _padded_head_dim(H), plain, T, B * N, device.target().num_multiprocessors
    )
    out, logsumexp = forward(
        *_operands(inputs, masking, tiles.block_k),
        rules=rules,
        true_lengths=Lengths(T, inputs.key.shape[1]),
        online=not bounded,
        tiles=tiles,
    )
    return out[:, :T, :, :H], logsumexp


def _backward_kernels(plan: _Plan, inputs: Inputs, masking: Masking, rows: Rows) -> Gradients:
    """The gradients; the moments still have a batch axis."""
    from rbf_jax.ops.gpu.mosaic.common import Lengths

    _, T, N, H = inputs.query.shape
    S, K = inputs.key.shape[1:3]
    # The fused kernel adds to a reference, and those must not vary over a mesh.
    deterministic = plan.deterministic or varies(inputs.query)
    tiles = plan.backward or choose_backward(_padded_head_dim(H), deterministic=deterministic)
    delta = jnp.einsum("btnh,btnh->btn", rows.out, rows.dout, preferred_element_type=jnp.float32)
    if rows.dlogsumexp is not None:
        delta -= rows.dlogsumexp
    of_queries = [
        _padded(rows.dout),
        filled(rows.logsumexp[..., :T], tiles.rows, jnp.inf),
        filled(delta.swapaxes(1, 2), tiles.rows),
    ]
    run = _fused_kernel if tiles.fused else _two_kernels
    dquery, moments, dkey, dvalue, column_sums = run(
        _operands(inputs, masking, tiles.keys),
        of_queries,
        rules=plan.rules,
        true_lengths=Lengths(T, S),
        tiles=tiles,
    )
    norms = jnp.repeat(inputs.squared_key_norms().swapaxes(1, 2), N // K, axis=1)
    return Gradients(
        dquery[:, :T, :, :H],
        dkey[:, :S, :, :H],
        dvalue[:, :S, :, :H],
        moments,
        jnp.sum(column_sums[..., :S] * norms, axis=-1),
    )


def _two_kernels(operands, rows, *, true_lengths, **sizes) -> tuple[jax.Array, ...]:
    """dq, Σ_i q·dq, dk, dv and Σ_i dS_ij."""
    from rbf_jax.ops.gpu.mosaic.backward_keys import keys
    from rbf_jax.ops.gpu.mosaic.backward_queries import queries

    dquery, moments = queries(operands, rows, true_lengths=true_lengths, **sizes)
    moments = jnp.sum(moments[..., : true_lengths.queries], axis=-1)
    return dquery, moments, *keys(operands, rows, true_lengths=true_lengths, **sizes)


def _fused_kernel(operands, rows, **sizes) -> tuple[jax.Array, ...]:
    """As `_two_kernels`."""
    from rbf_jax.ops.gpu.mosaic.backward_fused import gradients

    query, per_head = operands[0], operands[4]
    sums, *of_keys = gradients(operands, rows, **sizes)
    dquery = sums * (per_head[:, 0] / jnp.float32(LOG2E))[:, None, :, None]
    moments = jnp.einsum("btnh,btnh->bn", query.astype(jnp.float32), dquery)
    return dquery.astype(query.dtype), moments, *of_keys


def _operands(inputs: Inputs, masking: Masking, keys: int) -> list[jax.Array]:
    """The arrays that every kernel reads; those with a number per key fill whole tiles of keys."""
    B, T = inputs.query.shape[:2]
    S = inputs.key.shape[1]
    ends = [
        jnp.full(B, most, jnp.int32) if x is None else x
        for x, most in (
            (masking.query_lengths, T),
            (masking.key_lengths, S),
            (masking.query_offset, 0),
        )
    ]
    arrays = [
        _padded(inputs.query),
        _padded(inputs.key),
        _padded(inputs.value),
        filled(inputs.squared_key_norms().swapaxes(1, 2), keys),
        numbers_per_head(inputs, masking),
        jnp.stack(ends, axis=1),
    ]
    return vary_together(arrays)


def _padded(x: jax.Array) -> jax.Array:
    """(B, T, N, H), lengths and head dimensions filled with zeros to those of the kernel."""
    length, H = x.shape[1], x.shape[-1]
    more = _padded_head_dim(H) - H
    return jnp.pad(x, [(0, 0), (0, -length % _ALIGNMENT), (0, 0), (0, more)])


def _padded_head_dim(head_dim: int) -> int:
    return min(size for size in HEAD_DIMS if size >= head_dim)


def _plan(rules: Rules) -> _Plan:
    return _Plan(rules, _deterministic(), *tiles_in_use())


def _deterministic() -> bool:
    """Whether XLA's own operations are to give the same bits from run to run."""
    return _DETERMINISTIC.search(os.environ.get("XLA_FLAGS", "")) is not None


PASSES = passes(_plan, _forward_kernel, _backward_kernels)

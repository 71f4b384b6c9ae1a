"""RBF attention as it is defined, with quadratic memory: what every implementation must equal.

Differentiable by JAX itself, in reverse and forward mode.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rbf_jax.ops.call import Inputs, Masking, Rules, accumulation_dtype, squared_norms
from rbf_jax.ops.logits import (
    group_heads,
    key_penalties,
    rbf_logits,
    softmax_with_sink,
    with_rules,
)

SUPPORTS = frozenset(
    {
        *("left", "right", "num_global_keys", "sink", "return_residual"),
        *("mask", "query_lengths", "key_lengths", "query_segments", "key_segments"),
        *("alibi_slopes", "query_offset"),
    }
)


def attend(inputs: Inputs, masking: Masking, rules: Rules) -> tuple[jax.Array, jax.Array]:
    """softmax_j(2γ q_i·k_j − λγ‖k_j‖²) v_j, all in float32 (float64 for float64 inputs).

    Returns:
      The output (B, T, N, H) in the input's dtype, and the logsumexp (B, T, N) of the logits in
      the accumulation dtype, −inf where a row may attend to nothing.
    """
    rows, columns = (jnp.arange(x.shape[1], dtype=jnp.int32) for x in (inputs.query, inputs.key))
    # The norms are those of the keys, whatever was made of them already: derivatives are exact.
    heads_first = inputs._replace(
        key=inputs.key.swapaxes(1, 2),
        value=inputs.value.swapaxes(1, 2),
        key_norms=squared_norms(inputs.key).swapaxes(1, 2),
    )
    return attend_to_positions(heads_first, masking, rules, rows, columns)


def attend_to_positions(
    inputs: Inputs, masking: Masking, rules: Rules, rows: jax.Array, columns: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`attend` with keys and values (B, K, S, H) and key norms (B, K, S) as in a cache.

    Args:
      inputs: of the call, with key norms.
      masking: of the call.
      rules: of the call.
      rows: int32 (T,), indices of the queries.
      columns: int32 (S,) or (B, S), positions of the keys.
    """
    B, T, N, H = inputs.query.shape
    K = inputs.key.shape[1]
    dtype = accumulation_dtype(inputs.query.dtype)
    # The query heads of a group are rows of one matrix, so that keys are read once for all. Casting
    # comes first: products of bfloat16 take several times as long on a CPU.
    query = jnp.moveaxis(inputs.query.astype(dtype).reshape(B, T, K, N // K, H), 1, 3)
    products = _dot(query.reshape(B, K, -1, H), inputs.key.astype(dtype), 3)
    gamma, weight = group_heads(inputs.gamma, K), group_heads(inputs.key_norm_weight, K)
    penalties = key_penalties(inputs.squared_key_norms()[:, :, None, None, :], gamma, weight)
    logits = rbf_logits(products.reshape(B, K, N // K, T, -1), penalties, gamma)
    logits = with_rules(logits, rules, masking, K, rows, columns)
    sink = None if inputs.sink_logits is None else group_heads(inputs.sink_logits, K)
    weights, logsumexp = softmax_with_sink(logits, sink)
    weights = weights.reshape(B, K, -1, weights.shape[-1])
    out = _dot(weights, inputs.value.astype(dtype), 2).reshape(B, K, -1, T, H)
    out = jnp.moveaxis(out, 3, 1).reshape(B, T, N, H)
    return out.astype(inputs.query.dtype), jnp.moveaxis(logsumexp, 3, 1).reshape(B, T, N)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Contracts a's last axis with one of b's, batched over rows and heads; never in tf32."""
    return jax.lax.dot_general(
        a, b, (((3,), (axis,)), ((0, 1), (0, 1))), precision=jax.lax.Precision.HIGHEST
    )

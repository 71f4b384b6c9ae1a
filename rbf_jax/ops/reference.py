"""RBF attention as it is defined, with quadratic memory: what every implementation must equal.

Differentiable by JAX itself, in reverse and forward mode.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rbf_jax.ops.call import (
    Inputs,
    Masking,
    Options,
    accumulation_dtype,
    alibi_bias,
    allowed_pairs,
    group_heads,
)


def attend(inputs: Inputs, masking: Masking, options: Options) -> tuple[jax.Array, jax.Array]:
    """softmax_j(2γ q_i·k_j − λγ‖k_j‖²) v_j, all in float32 (float64 for float64 inputs).

    Returns:
      The output (B, T, N, H) in the input's dtype, and the logsumexp (B, T, N) of the logits in
      the accumulation dtype, −inf where a row may attend to nothing.
    """
    B, T, N, H = inputs.query.shape
    S, K = inputs.key.shape[1:3]
    dtype = accumulation_dtype(inputs.query.dtype)
    query = inputs.query.astype(dtype).reshape(B, T, K, N // K, H)
    key, value = inputs.key.astype(dtype), inputs.value.astype(dtype)

    def einsum(spec, a, b):
        return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)

    gamma = group_heads(inputs.gamma, K)
    key_norm_weight = group_heads(inputs.key_norm_weight, K)
    key_norms = jnp.sum(key * key, axis=-1).swapaxes(1, 2)[:, :, None, None, :]  # B K 1 1 S
    products = einsum("btkgh,bskh->bkgts", query, key)
    logits = 2 * gamma * products - key_norm_weight * gamma * key_norms

    positions = jnp.arange(T, dtype=jnp.int32), jnp.arange(S, dtype=jnp.int32)
    bias = alibi_bias(masking, K, *positions)
    if bias is not None:
        logits = logits + bias
    allowed = allowed_pairs(masking, options, K, *positions)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)

    sink = jnp.zeros((), dtype) if options.origin_sink else jnp.full((), -jnp.inf, dtype)
    maximum = jax.lax.stop_gradient(jnp.maximum(logits.max(-1, keepdims=True), sink))
    maximum = jnp.where(jnp.isneginf(maximum), 0, maximum)
    weights = jnp.exp(logits - maximum)
    total = weights.sum(-1, keepdims=True) + jnp.exp(sink - maximum)
    nothing = total == 0  # a row that may attend to nothing: output 0, gradient 0
    total = jnp.where(nothing, 1, total)
    logsumexp = jnp.where(nothing, -jnp.inf, maximum + jnp.log(total))

    out = einsum("bkgts,bskh->btkgh", weights / total, value).reshape(B, T, N, H)
    logsumexp = logsumexp[..., 0].transpose(0, 3, 1, 2).reshape(B, T, N)
    return out.astype(inputs.query.dtype), logsumexp

"""Sums of kernel values without a denominator, from a softmax and its logsumexp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rbf_jax.ops.call import accumulation_dtype, squared_norms


def unnormalize(
    query: jax.Array, gamma: ArrayLike, out: jax.Array, logsumexp: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Σ_j exp(2γ q_i·k_j − λγ‖k_j‖² − γ‖q_i‖²) v_j from the softmax of the same logits.

    The softmax's denominator is exp(logsumexp), so that its output times exp(logsumexp − γ‖q‖²)
    is the sum. The factor is multiplied in the accumulation dtype.

    Args:
      query: (..., T, N, H).
      gamma: γ, scalar or (N,).
      out: (..., T, N, H), of the softmax.
      logsumexp: (..., T, N), of 2γ q·k − λγ‖k‖²; −inf where a row sees nothing.

    Returns:
      The sum, as out, and the logarithm of the sum of its weights, as logsumexp.
    """
    dtype = accumulation_dtype(query.dtype)
    own = jnp.asarray(gamma).astype(dtype) * squared_norms(query)
    # A row that sees nothing has no gradient, of its own norm neither.
    log_total = logsumexp - jnp.where(jnp.isneginf(logsumexp), 0, own)
    total = jnp.exp(log_total)[..., None]
    return (out.astype(dtype) * total).astype(out.dtype), log_total

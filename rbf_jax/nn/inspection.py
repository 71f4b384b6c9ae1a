"""Attention weights for looking at, from the quadratic formula. The operation never forms them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def attention_logits(
    query: jax.Array, key: jax.Array, *, gamma: ArrayLike, key_norm_weight: ArrayLike
) -> jax.Array:
    """2γ q·k − λγ‖k‖², float32.

    Args:
      query: (B, T, N, H).
      key: (B, S, K, H), K divides N.
      gamma: γ, scalar or (N,).
      key_norm_weight: λ, scalar or (N,).

    Returns:
      (B, N, T, S).
    """
    N = query.shape[2]
    query = query.astype(jnp.float32)
    key = jnp.repeat(key.astype(jnp.float32), N // key.shape[2], axis=2)
    gamma = jnp.broadcast_to(jnp.asarray(gamma, jnp.float32), (N,))[:, None, None]
    weight = jnp.broadcast_to(jnp.asarray(key_norm_weight, jnp.float32), (N,))[:, None, None]
    products = jnp.einsum("btnh,bsnh->bnts", query, key, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sum(key * key, axis=-1).swapaxes(1, 2)[:, :, None, :]
    return 2 * gamma * products - weight * gamma * norms


def softmax_with_sink(
    logits: jax.Array, allowed: jax.Array | None, *, origin_sink: bool
) -> jax.Array:
    """Softmax over the last axis; an origin sink takes a share that belongs to no column.

    Args:
      logits: (..., S) float32.
      allowed: bool, broadcastable to logits; None for all. Rows with none allowed are 0.
      origin_sink: adds exp(0) to every denominator.

    Returns:
      As logits; rows sum to 1, with a sink to less.
    """
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    maximum = logits.max(axis=-1, keepdims=True, initial=0.0 if origin_sink else -jnp.inf)
    maximum = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    weights = jnp.exp(logits - maximum)
    total = weights.sum(axis=-1, keepdims=True)
    if origin_sink:
        total = total + jnp.exp(-maximum)
    return weights / jnp.where(total == 0, 1.0, total)


def causal_rules(
    num_tokens: int,
    num_registers: int,
    *,
    segment_ids: jax.Array | None,
    window: int | None,
    alibi_slopes: ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
    """Who among T tokens sees what of R registers and T tokens, and ALiBi's penalty for it.

    Returns:
      allowed, bool (B or 1, 1, T, R+T), and the bias, float32 (N or 1, T, R+T).
    """
    rows, columns = jnp.arange(num_tokens)[:, None], jnp.arange(num_tokens)[None, :]
    allowed = columns <= rows
    if window is not None:
        allowed = allowed & (columns >= rows - window)
    allowed = allowed[None]
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, :, None] == segment_ids[:, None, :])
    slopes = jnp.zeros((1,)) if alibi_slopes is None else jnp.asarray(alibi_slopes, jnp.float32)
    bias = -slopes[:, None, None] * jnp.abs(rows - columns).astype(jnp.float32)
    in_front = ((0, 0), (0, 0), (num_registers, 0))
    return jnp.pad(allowed, in_front, constant_values=True)[:, None], jnp.pad(bias, in_front)

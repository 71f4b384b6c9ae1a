"""Logits and attention weights for looking at. The operation never forms them."""

from __future__ import annotations

import flax.linen as nn
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
    rows: jax.Array,
    num_tokens: int,
    num_registers: int,
    *,
    segment_ids: jax.Array | None,
    window: int | None,
    alibi_slopes: ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
    """What some of T tokens see of R registers and T tokens, and ALiBi's penalty for it.

    Args:
      rows: integer (Q,), which tokens.
      num_tokens: T.
      num_registers: R.
      segment_ids: integer (B, T), or None.
      window: text sees this many tokens back, and itself; None for all.
      alibi_slopes: (N,), or None.

    Returns:
      allowed, bool (B or 1, 1, Q, R+T), and the bias, float32 (N or 1, Q, R+T).
    """
    behind = rows[:, None] - jnp.arange(num_tokens)[None, :]
    allowed = behind >= 0
    if window is not None:
        allowed = allowed & (behind <= window)
    allowed = allowed[None]
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, rows, None] == segment_ids[:, None, :])
    slopes = jnp.zeros((1,)) if alibi_slopes is None else jnp.asarray(alibi_slopes, jnp.float32)
    bias = -slopes[:, None, None] * jnp.abs(behind).astype(jnp.float32)
    in_front = ((0, 0), (0, 0), (num_registers, 0))
    return jnp.pad(allowed, in_front, constant_values=True)[:, None], jnp.pad(bias, in_front)


def largest_logit(
    query: jax.Array,
    key: jax.Array,
    num_registers: int,
    *,
    gamma: ArrayLike,
    key_norm_weight: ArrayLike,
    segment_ids: jax.Array | None,
    window: int | None,
    alibi_slopes: ArrayLike | None,
    chunk: int = 128,
) -> jax.Array:
    """Largest logit of text queries, by `causal_rules`; memory grows with T, not T².

    Segment 0 is padding: neither its queries nor, since no other sees them, its keys count.

    Args:
      query: (B, T, N, H), of the text.
      key: (B, R+T, K, H), registers first.
      num_registers: R.
      gamma: γ, scalar or (N,).
      key_norm_weight: λ, scalar or (N,).
      segment_ids: as for `causal_rules`; None for text everywhere.
      window: as for `causal_rules`.
      alibi_slopes: as for `causal_rules`.
      chunk: queries looked at at once.

    Returns:
      float32 (); −inf if there is no text.
    """

    def of_row(row: jax.Array) -> jax.Array:
        rows = row[None]
        allowed, bias = causal_rules(
            rows,
            query.shape[1],
            num_registers,
            segment_ids=segment_ids,
            window=window,
            alibi_slopes=alibi_slopes,
        )
        if segment_ids is not None:
            allowed = allowed & (segment_ids[:, None, rows, None] > 0)
        logits = bias + attention_logits(
            query[:, rows], key, gamma=gamma, key_norm_weight=key_norm_weight
        )
        return jnp.max(logits, where=allowed, initial=-jnp.inf)

    return jnp.max(jax.lax.map(of_row, jnp.arange(query.shape[1]), batch_size=chunk))


def statistics_collection(module: nn.Module) -> str | None:
    """Where a module sows statistics: "intermediates", "statistics", or None if not asked to."""
    if module.is_initializing():  # All but "intermediates" is mutable then.
        return None
    asked = filter(module.is_mutable_collection, ("intermediates", "statistics"))
    return next(asked, None)

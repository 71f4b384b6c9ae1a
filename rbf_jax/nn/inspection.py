"""Logits and attention weights for looking at. The operation never forms them."""

from __future__ import annotations

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rbf_jax.ops import logits as formula
from rbf_jax.ops.call import Rules, squared_norms


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
    norms = squared_norms(key).swapaxes(1, 2)[:, :, None, :]
    return formula.rbf_logits(products, formula.key_penalties(norms, gamma, weight), gamma)


def attention_weights(
    logits: jax.Array, allowed: jax.Array, sink_logits: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """Softmax over the keys; a sink takes a share that belongs to no column.

    Args:
      logits: (B, N, T, S) float32.
      allowed: bool, broadcastable to logits.
      sink_logits: logit of a virtual key, scalar or (N,); None: no such key.

    Returns:
      The weights, as logits: rows sum to 1, with a sink to less, where nothing is allowed to 0; and
      the logsumexp (B, N, T), sink included.
    """
    if sink_logits is not None:
        sink_logits = jnp.asarray(sink_logits, logits.dtype)[..., None, None]
    return formula.softmax_with_sink(jnp.where(allowed, logits, -jnp.inf), sink_logits)


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
    R = num_registers
    rules = Rules(left=window, right=0, num_global_keys=R)
    positions, columns = R + rows[:, None], jnp.arange(R + num_tokens)[None]
    same_segment = None
    if segment_ids is not None:
        key_segments = jnp.pad(segment_ids, ((0, 0), (R, 0)))  # registers are global keys
        same_segment = segment_ids[:, rows, None] == key_segments[:, None, :]
    near = formula.allowed_by_position(rules, positions, columns, same_segment)
    allowed = cast(jax.Array, near)  # causality is a rule
    slopes = jnp.zeros((1,)) if alibi_slopes is None else jnp.asarray(alibi_slopes, jnp.float32)
    bias = -slopes[:, None, None] * formula.alibi_distance(rules, positions, columns)
    return allowed.reshape(-1, 1, *allowed.shape[-2:]), bias


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

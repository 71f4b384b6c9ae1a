"""What every implementation of the operation receives: validated arrays and static options."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Masking(NamedTuple):
    """Arrays that say who may attend to whom; never differentiated. ``None`` means no rule.

    Attributes:
      mask: bool, (B or 1, N or 1, T or 1, S or 1), True = attend.
      query_lengths: int32 (B,), 0 to T; rows at or beyond the length attend to nothing.
      key_lengths: int32 (B,), 0 to S; keys at or beyond the length are not attended to.
      query_segments: integer (B, T); a query attends only to keys of its own segment.
      key_segments: integer (B, S), of any integer dtype each.
      alibi_slopes: accumulation dtype, (N,); adds −slope·|i − j| to the logits.
      query_offset: int32 (B,); query i is at position i + offset for causality, windows and ALiBi,
        keys are at their index. Lengths, segments and the mask go by index.
    """

    mask: jax.Array | None = None
    query_lengths: jax.Array | None = None
    key_lengths: jax.Array | None = None
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    alibi_slopes: jax.Array | None = None
    query_offset: jax.Array | None = None


class Inputs(NamedTuple):
    """The differentiable arrays, and what has been made of them already.

    Attributes:
      query: (B, T, N, H).
      key: (B, S, K, H), K divides N.
      value: (B, S, K, H).
      gamma: (N,), bandwidth γ per query head, accumulation dtype.
      key_norm_weight: (N,), λ per query head, accumulation dtype.
      key_norms: of `squared_norms`, (B, S, K), where they are at hand; None where the
        implementation is to make them. Gradients are those of the keys in either case.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    gamma: jax.Array
    key_norm_weight: jax.Array
    key_norms: jax.Array | None = None

    def squared_key_norms(self) -> jax.Array:
        """‖k‖², (B, S, K), accumulation dtype."""
        return squared_norms(self.key) if self.key_norms is None else self.key_norms


@dataclasses.dataclass(frozen=True)
class Options:
    """Static choices, hashable.

    Attributes:
      is_causal: query i attends to keys j ≤ i.
      window: (left, right): query i attends to keys i − left ≤ j ≤ i + right.
      origin_sink: a virtual key at the origin with value 0 takes part in every row.
      return_residual: the caller wants the logsumexp.
      shared_key_norm_weight: λ was given as one number for all heads.
      static_gamma: γ where it is one number known while tracing, else None. ``Inputs.gamma``
        holds γ in either case.
      static_key_norm_weight: λ likewise.
    """

    is_causal: bool = False
    window: tuple[int, int] | None = None
    origin_sink: bool = False
    return_residual: bool = False
    shared_key_norm_weight: bool = True
    static_gamma: float | None = None
    static_key_norm_weight: float | None = None


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of logits, norms, sums and logsumexp: float32, or float64 for float64 inputs."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def squared_norms(key: jax.Array) -> jax.Array:
    """‖k‖² over the last axis, in the accumulation dtype."""
    return jnp.sum(jnp.square(key.astype(accumulation_dtype(key.dtype))), axis=-1)


def group_heads(per_head: jax.Array, num_kv_heads: int) -> jax.Array:
    """One number per query head, (N,), as (1, K, G, 1, 1), to go with logits (B, K, G, T, S)."""
    return per_head.reshape(1, num_kv_heads, -1, 1, 1)


def allowed_pairs(
    masking: Masking,
    options: Options,
    num_kv_heads: int,
    query_positions: jax.Array,
    key_positions: jax.Array,
) -> jax.Array | None:
    """Who attends to whom in a tile of the logits.

    The arrays of ``masking`` must already be cut to the tile; only the lengths are per batch
    element and need no cutting.

    Args:
      masking: rules, cut to the tile.
      options: static rules.
      num_kv_heads: K.
      query_positions: int32 (T,), indices of the tile's rows in the whole sequence.
      key_positions: int32 (S,), indices of the tile's columns.

    Returns:
      bool, broadcastable to (B, K, G, T, S); None when every pair is allowed.
    """
    rows = query_positions[None, None, None, :, None]
    columns = key_positions[None, None, None, None, :]
    positions = _offset_rows(masking, query_positions)
    rules = []
    if options.is_causal:
        rules.append(columns <= positions)
    if options.window is not None:
        left, right = options.window
        rules.append((columns >= positions - left) & (columns <= positions + right))
    if masking.query_lengths is not None:
        rules.append(rows < _per_row(masking.query_lengths))
    if masking.key_lengths is not None:
        rules.append(columns < _per_row(masking.key_lengths))
    if masking.query_segments is not None and masking.key_segments is not None:
        same = masking.query_segments[:, :, None] == masking.key_segments[:, None, :]
        rules.append(same[:, None, None])
    if masking.mask is not None:
        B, N, T, S = masking.mask.shape
        heads = (1, 1) if N == 1 else (num_kv_heads, N // num_kv_heads)
        rules.append(masking.mask.reshape(B, *heads, T, S))
    if not rules:
        return None
    allowed = rules[0]
    for rule in rules[1:]:
        allowed = allowed & rule
    return allowed


def alibi_bias(
    masking: Masking, num_kv_heads: int, query_positions: jax.Array, key_positions: jax.Array
) -> jax.Array | None:
    """−slope·|i − j| of a tile, (B or 1, K, G, T, S), or None (Press et al., arXiv:2108.12409)."""
    if masking.alibi_slopes is None:
        return None
    rows = _offset_rows(masking, query_positions)
    distance = jnp.abs(rows - key_positions[None, None, None, None, :])
    slopes = group_heads(masking.alibi_slopes, num_kv_heads)
    return -slopes * distance.astype(slopes.dtype)


def _offset_rows(masking: Masking, query_positions: jax.Array) -> jax.Array:
    """Positions of the rows for rules of distance, (B or 1, 1, 1, T, 1)."""
    rows = query_positions[None, None, None, :, None]
    return rows if masking.query_offset is None else rows + _per_row(masking.query_offset)


def _per_row(lengths: jax.Array) -> jax.Array:
    return lengths[:, None, None, None, None]

"""The formula, masks, sinks and visible blocks: stated once for everything that is written in JAX.

The Triton kernels state the same once more, as jit helpers (gpu/triton/tile.py).
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from rbf_jax.ops.call import Masking, Rules, accumulation_dtype, squared_norms


def group_heads(per_head: jax.Array, num_kv_heads: int) -> jax.Array:
    """Reshapes one number per query head, (N,), to (1, K, G, 1, 1), for logits (B, K, G, T, S)."""
    return per_head.reshape(1, num_kv_heads, -1, 1, 1)


def rbf_logits(products: jax.Array, penalties: jax.Array, gamma: jax.Array) -> jax.Array:
    """2γ q·k − λγ‖k‖² from the products q·k and `key_penalties`; shapes broadcast to the logits."""
    return 2 * gamma * products - penalties


def key_penalties(key_norms: jax.Array, gamma: jax.Array, key_norm_weight: jax.Array) -> jax.Array:
    """λγ‖k‖² from ‖k‖²; the shapes broadcast to that of the logits."""
    return key_norm_weight * gamma * key_norms


def allowed_by_position(
    rules: Rules,
    positions: jax.Array,
    columns: jax.Array,
    same_segment: jax.Array | None = None,
) -> jax.Array | None:
    """Returns the pairs that causality, window, segments and global keys allow.

    Args:
      rules: static rules.
      positions: int32, positions of the queries.
      columns: int32, positions of the keys; broadcasts with `positions`.
      same_segment: bool, whether a pair is of one segment; None without segments.

    Returns:
      bool, broadcastable to the pairs; None when every pair is allowed.
    """
    local = [] if same_segment is None else [same_segment]  # what global keys are exempt from
    if rules.left is not None:
        local.append(columns >= positions - rules.left)
    if rules.right is not None and not rules.causal:
        local.append(columns <= positions + rules.right)
    if local and rules.num_global_keys:
        local = [_all(local) | (columns < rules.num_global_keys)]
    if rules.causal:
        local.append(columns <= positions)
    return _all(local) if local else None


def allowed_pairs(
    rules: Rules, masking: Masking, num_kv_heads: int, rows: jax.Array, columns: jax.Array
) -> jax.Array | None:
    """Returns who attends to whom in a tile of the logits.

    The mask and the segments in ``masking`` must already be cut to the tile.

    Args:
      rules: static rules.
      masking: arrays of rules, cut to the tile.
      num_kv_heads: K.
      rows: int32 (T,), indices of the tile's queries in the whole sequence.
      columns: int32 (S,) or (B, S), positions of its keys.

    Returns:
      bool, broadcastable to (B, K, G, T, S); None when every pair is allowed.
    """
    positions, keys = _positions(masking, rows), _columns(columns)
    same_segment = None
    if masking.query_segments is not None and masking.key_segments is not None:
        same_segment = masking.query_segments[:, :, None] == masking.key_segments[:, None, :]
        same_segment = same_segment[:, None, None]
    near = allowed_by_position(rules, positions, keys, same_segment)
    allowed = [] if near is None else [near]
    if masking.query_lengths is not None:
        allowed.append(rows[None, None, None, :, None] < _per_row(masking.query_lengths))
    if masking.key_lengths is not None:
        allowed.append(keys < _per_row(masking.key_lengths))
    if masking.mask is not None:
        B, N, T, S = masking.mask.shape
        heads = (1, 1) if N == 1 else (num_kv_heads, N // num_kv_heads)
        allowed.append(masking.mask.reshape(B, *heads, T, S))
    return _all(allowed) if allowed else None


def alibi_distance(rules: Rules, positions: jax.Array, columns: jax.Array) -> jax.Array:
    """|i − j|, float32; 0 for global keys (ALiBi: Press et al., arXiv:2108.12409)."""
    distance = jnp.abs(positions - columns)
    if rules.num_global_keys:
        distance = jnp.where(columns < rules.num_global_keys, 0, distance)
    return distance.astype(jnp.float32)


def with_rules(
    logits: jax.Array,
    rules: Rules,
    masking: Masking,
    num_kv_heads: int,
    rows: jax.Array,
    columns: jax.Array,
) -> jax.Array:
    """Adds ALiBi to a tile of logits (B, K, G, T, S), and −∞ where a pair is not allowed.

    The arguments are those of `allowed_pairs`.
    """
    if masking.alibi_slopes is not None:
        distance = alibi_distance(rules, _positions(masking, rows), _columns(columns))
        slopes = group_heads(masking.alibi_slopes, num_kv_heads)
        logits = logits - slopes * distance.astype(slopes.dtype)
    allowed = allowed_pairs(rules, masking, num_kv_heads, rows, columns)
    return logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)


def softmax_with_sink(
    logits: jax.Array, sink: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the softmax over the last axis and its logsumexp.

    Args:
      logits: (..., S), −∞ where a pair is not allowed.
      sink: the logit of a virtual key of its own, broadcastable to (..., 1); None: no such key.

    Returns:
      The weights, as logits: rows sum to 1, to less with a sink, to 0 where nothing is allowed; and
      the logsumexp, (...), the sink included: −∞ where nothing is allowed.
    """
    sink = jnp.asarray(-jnp.inf if sink is None else sink, logits.dtype)
    maximum = lax.stop_gradient(jnp.maximum(logits.max(axis=-1, keepdims=True), sink))
    maximum = jnp.where(jnp.isneginf(maximum), 0, maximum)
    weights = jnp.exp(logits - maximum)
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - maximum)
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    logsumexp = jnp.where(nothing, -jnp.inf, maximum + jnp.log(total))
    return weights / total, logsumexp[..., 0]


def merge(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns attention over two sets of keys from attention over each.

    Args:
      a: the output (..., H) and the logsumexp (...) over the first set, −inf where it has no key.
      b: the same over the second set.

    Returns:
      (e^a out_a + e^b out_b) / (e^a + e^b), of out_a's dtype, 0 where both are −inf, and the
      logsumexp over both; computed in the logsumexps' dtype.
    """
    (out_a, logsumexp_a), (out_b, logsumexp_b) = a, b
    maximum = lax.stop_gradient(jnp.maximum(logsumexp_a, logsumexp_b))
    maximum = jnp.where(jnp.isneginf(maximum), 0, maximum)
    weight_a, weight_b = jnp.exp(logsumexp_a - maximum), jnp.exp(logsumexp_b - maximum)
    total = weight_a + weight_b
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    out_a, out_b, dtype = out_a.astype(total.dtype), out_b.astype(total.dtype), out_a.dtype
    out = (weight_a / total)[..., None] * out_a + (weight_b / total)[..., None] * out_b
    return out.astype(dtype), jnp.where(nothing, -jnp.inf, maximum + jnp.log(total))


class Blocks(NamedTuple):
    """Blocks of one axis that a tile of the other must read.

    Read 0 to `global_stop`, then `start` to `stop`. Between the inner two every pair is allowed by
    position.
    """

    global_stop: jax.Array
    start: jax.Array
    inner_start: jax.Array
    inner_stop: jax.Array
    stop: jax.Array


def visible_keys(rules: Rules, first: jax.Array, last: jax.Array, stop, block: int) -> Blocks:
    """Returns the blocks of keys that queries at positions `first` to `last` may attend to.

    Args:
      rules: static rules.
      first: int32, position of the first query.
      last: int32, of the last.
      stop: number of keys, or where they end.
      block: keys of a block.
    """
    blocks = _in_reach(first, last, stop, stop, block, before=rules.left, after=rules.right)
    if not rules.num_global_keys:
        return blocks
    end = jnp.minimum(stop, rules.num_global_keys)
    if rules.causal:
        end = jnp.minimum(end, last + 1)
    end = blocks_of(jnp.maximum(end, 0), block)
    start, stop = blocks.start, blocks.stop
    return blocks._replace(
        global_stop=jnp.minimum(end, start),
        stop=jnp.where(start < end, jnp.maximum(stop, end), stop),
    )


def visible_queries(
    rules: Rules, key: jax.Array, first: jax.Array, last: jax.Array, stop, inner_stop, block: int
) -> Blocks:
    """Returns the blocks of queries that may attend to keys; the first query is at position 0.

    Args:
      rules: static rules.
      key: int32, index of the first key.
      first: int32, its position.
      last: int32, position of the last key.
      stop: number of queries, or where they end.
      inner_stop: where those end of which every pair is allowed.
      block: queries of a block.
    """
    blocks = _in_reach(first, last, stop, inner_stop, block, before=rules.right, after=rules.left)
    if not rules.num_global_keys:
        return blocks
    every = blocks_of(jnp.maximum(stop, 0), block)
    least = jnp.int32(0)
    if rules.causal:
        least = jnp.minimum(lax.div(jnp.maximum(first, 0), jnp.int32(block)), every)
    holds_global = key < rules.num_global_keys
    return blocks._replace(
        start=jnp.where(holds_global, least, blocks.start),
        stop=jnp.where(holds_global, every, blocks.stop),
    )


def _in_reach(first, last, stop, inner_stop, block, *, before, after) -> Blocks:
    """The blocks that positions `first` to `last` see, up to `before` and `after` them."""
    size, zero = jnp.int32(block), jnp.int32(0)
    start, inner_start = zero, zero
    if after is not None:
        stop = jnp.minimum(stop, last + after + 1)
        inner_stop = jnp.minimum(inner_stop, first + after + 1)
    if before is not None:
        start = lax.div(jnp.maximum(first - before, 0), size)
        inner_start = blocks_of(jnp.maximum(last - before, 0), size)
    stop = blocks_of(jnp.maximum(stop, 0), size)
    start = jnp.minimum(start, stop)
    inner_start = jnp.clip(inner_start, start, stop)
    inner_stop = jnp.clip(lax.div(jnp.maximum(inner_stop, 0), size), inner_start, stop)
    return Blocks(zero, start, inner_start, inner_stop, stop)


def blocks_of(length, size) -> jax.Array:
    """How many blocks of a size hold the length, which is not negative."""
    size = jnp.int32(size)
    return lax.div(jnp.int32(length) + size - 1, size)


def undo_normalization(
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


def _positions(masking: Masking, rows: jax.Array) -> jax.Array:
    """Positions of the queries, (B or 1, 1, 1, T, 1)."""
    rows = rows[None, None, None, :, None]
    return rows if masking.query_offset is None else rows + _per_row(masking.query_offset)


def _columns(columns: jax.Array) -> jax.Array:
    """Positions of the keys, (B or 1, 1, 1, 1, S)."""
    columns = columns if columns.ndim == 2 else columns[None]
    return columns[:, None, None, None, :]


def _per_row(lengths: jax.Array) -> jax.Array:
    return lengths[:, None, None, None, None]


def _all(conditions: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.and_, conditions)

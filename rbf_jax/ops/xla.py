"""RBF attention in blocks of queries and keys, for any device: O(T) memory, forward and backward.

Online softmax (Milakov and Gimelshein, arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691) in
plain JAX. Blocks that a causal, window or length rule empties are not visited. Inside, heads come
before positions and the heads of a group stay apart: queries (B, K, G, T, H), keys (B, K, S, H).

Matrix products take their operands as they are given and accumulate in float32; the attention
weights are rounded to bfloat16 for the second product where the inputs are bfloat16. For float16
they stay float32: weights below 2⁻²⁴ would be lost.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbf_jax.ops.types import (
    Inputs,
    Masking,
    Options,
    accumulation_dtype,
    alibi_bias,
    allowed_pairs,
    group_heads,
)
from rbf_jax.ops.vjp import DotGradients, Residuals, with_custom_vjp

# Upper limits of a block; the fastest of 64 to 512 on two AMD EPYC cores (docs/measurements).
_MAX_BLOCK_QUERIES = 256
_MAX_BLOCK_KEYS = 512


class _Axis(NamedTuple):
    """A sequence axis cut into blocks of equal size, the last one filled up."""

    length: int
    block: int
    count: int

    @classmethod
    def cut(cls, length: int, limit: int) -> _Axis:
        count = -(-length // limit)
        block = -(-length // count)
        if count > 1:
            block = -(-block // 8) * 8  # whole vector registers; the last block has a few more to fill
        return cls(length, block, count)

    def pad(self, array: jax.Array, axis: int, fill=0) -> jax.Array:
        missing = self.count * self.block - self.length
        if missing == 0:
            return array
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, missing)
        return jnp.pad(array, widths, constant_values=fill)

    def slice(self, array: jax.Array, index, axis: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, index * self.block, self.block, axis)

    def update(self, array: jax.Array, block: jax.Array, index, axis: int) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(array, block, index * self.block, axis)

    def positions(self, index) -> jax.Array:
        return index * self.block + jnp.arange(self.block)


class _Operands(NamedTuple):
    """The inputs as the loops want them: heads first, filled up to whole blocks."""

    query: jax.Array  # B K G T H
    key: jax.Array  # B K S H
    value: jax.Array  # B K S H, in the dtype of the weights
    key_penalty: jax.Array  # λγ‖k‖², B K G 1 S, accumulation dtype
    double_gamma: jax.Array  # 2γ, K G 1 1, accumulation dtype


def _forward(inputs: Inputs, masking: Masking, options: Options):
    rows, columns = _axes(inputs)
    operands = _operands(inputs, rows, columns)
    masking = _pad_masking(masking, rows, columns)
    B, K, G, T, H = operands.query.shape
    dtype = operands.key_penalty.dtype

    def query_block(i, carry):
        out, logsumexp = carry
        query = rows.slice(operands.query, i, 3)

        def key_block(j, carry):
            weighted, total, maximum = carry
            logits = _logits(query, operands, masking, options, rows, columns, i, j)
            value = columns.slice(operands.value, j, 2)
            new_maximum = jnp.maximum(maximum, logits.max(axis=-1))
            # A row that has seen no key yet keeps −inf; its reference must be finite.
            reference = jnp.where(jnp.isneginf(new_maximum), 0, new_maximum)
            weights = jnp.exp(logits - reference[..., None])
            decay = jnp.exp(maximum - reference)
            total = total * decay + weights.sum(axis=-1)
            products = _dot(weights.astype(value.dtype), value, ((4,), (2,)))
            return weighted * decay[..., None] + products, total, new_maximum

        # The origin sink is a key with logit 0 and value 0 that every row sees first.
        start = 0 if options.origin_sink else -jnp.inf
        carry = (
            jnp.zeros((B, K, G, rows.block, H), dtype),
            jnp.full((B, K, G, rows.block), 1 if options.origin_sink else 0, dtype),
            jnp.full((B, K, G, rows.block), start, dtype),
        )
        first, last = _key_blocks(i, rows, columns, masking, options)
        weighted, total, maximum = lax.fori_loop(first, last, key_block, carry)
        nothing = total == 0
        total = jnp.where(nothing, 1, total)
        block = (weighted / total[..., None]).astype(out.dtype)
        row_logsumexp = jnp.where(nothing, -jnp.inf, maximum + jnp.log(total))
        return rows.update(out, block, i, 3), rows.update(logsumexp, row_logsumexp, i, 3)

    carry = jnp.zeros((B, K, G, T, H), inputs.query.dtype), jnp.zeros((B, K, G, T), dtype)
    out, logsumexp = lax.fori_loop(0, rows.count, query_block, carry)
    return _lengths_first(out, rows), _lengths_first(logsumexp, rows)


def _backward(
    residuals: Residuals, dout: jax.Array, delta: jax.Array, options: Options
) -> DotGradients:
    inputs = residuals.inputs
    rows, columns = _axes(inputs)
    operands = _operands(inputs, rows, columns)
    masking = _pad_masking(residuals.masking, rows, columns)
    B, K, G, T, H = operands.query.shape
    S = operands.key.shape[2]
    dtype, weight_dtype = operands.key_penalty.dtype, operands.value.dtype

    dout = _heads_first(dout, K, rows).astype(weight_dtype)
    delta = _heads_first(delta, K, rows)
    # Rows that attend to nothing, and those filled up: exp(logits − ∞) gives them weight 0.
    logsumexp = jnp.where(jnp.isneginf(residuals.logsumexp), jnp.inf, residuals.logsumexp)
    logsumexp = _heads_first(logsumexp, K, rows, fill=jnp.inf)

    def key_block(j, carry):
        query_gradient, key_gradient, value_gradient, column_sums = carry
        key = columns.slice(operands.key, j, 2)
        value = columns.slice(operands.value, j, 2)

        def query_block(i, carry):
            query_gradient, key_part, value_part, column_part = carry
            query, row_dout = rows.slice(operands.query, i, 3), rows.slice(dout, i, 3)
            logits = _logits(query, operands, masking, options, rows, columns, i, j)
            weights = jnp.exp(logits - rows.slice(logsumexp, i, 3)[..., None])
            value_part += _dot(weights.astype(weight_dtype), row_dout, ((2, 3), (2, 3)))
            weights_gradient = _dot(row_dout, value, ((4,), (3,)))
            logits_gradient = weights * (weights_gradient - rows.slice(delta, i, 3)[..., None])
            column_part += logits_gradient.sum(axis=3)
            scaled = (logits_gradient * operands.double_gamma).astype(weight_dtype)
            key_part += _dot(scaled, query.astype(weight_dtype), ((2, 3), (2, 3)))
            row_gradient = rows.slice(query_gradient, i, 3)
            row_gradient += _dot(scaled, key.astype(weight_dtype), ((4,), (2,)))
            query_gradient = rows.update(query_gradient, row_gradient, i, 3)
            return query_gradient, key_part, value_part, column_part

        first, last = _query_blocks(j, rows, columns, masking, options)
        carry = (
            query_gradient,
            jnp.zeros((B, K, columns.block, H), dtype),
            jnp.zeros((B, K, columns.block, H), dtype),
            jnp.zeros((B, K, G, columns.block), dtype),
        )
        query_gradient, key_part, value_part, column_part = lax.fori_loop(
            first, last, query_block, carry
        )
        return (
            query_gradient,
            columns.update(key_gradient, key_part, j, 2),
            columns.update(value_gradient, value_part, j, 2),
            columns.update(column_sums, column_part, j, 3),
        )

    carry = (
        jnp.zeros((B, K, G, T, H), dtype),
        jnp.zeros((B, K, S, H), dtype),
        jnp.zeros((B, K, S, H), dtype),
        jnp.zeros((B, K, G, S), dtype),
    )
    query_gradient, key_gradient, value_gradient, column_sums = lax.fori_loop(
        0, columns.count, key_block, carry
    )
    return DotGradients(
        query=_lengths_first(query_gradient, rows),
        key=_lengths_first(key_gradient[:, :, None], columns),
        value=_lengths_first(value_gradient[:, :, None], columns),
        column_sums=_lengths_first(column_sums, columns),
    )


attend = with_custom_vjp(_forward, _backward)


def _logits(query, operands: _Operands, masking, options, rows, columns, i, j) -> jax.Array:
    """2γ q·k − λγ‖k‖² (+ ALiBi) of block (i, j), −inf where masked: (B, K, G, T', S')."""
    K = operands.key.shape[1]
    positions = rows.positions(i), columns.positions(j)
    products = _dot(query, columns.slice(operands.key, j, 2), ((4,), (3,)))
    logits = operands.double_gamma * products - columns.slice(operands.key_penalty, j, 4)
    bias = alibi_bias(masking, K, *positions)
    if bias is not None:
        logits = logits + bias
    allowed = allowed_pairs(_cut_masking(masking, rows, columns, i, j), options, K, *positions)
    if columns.length % columns.block:
        inside = positions[1] < columns.length
        allowed = inside if allowed is None else allowed & inside
    return logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)


def _dot(a: jax.Array, b: jax.Array, contract) -> jax.Array:
    """Product over the axes `contract`, batched over the first two (B, K), accumulated in float32.

    float32 operands are never rounded: tf32 would lose the small differences of large norms.
    """
    dtype = accumulation_dtype(a.dtype)
    precision = lax.Precision.HIGHEST if a.dtype == dtype else None
    return lax.dot_general(
        a, b, (contract, ((0, 1), (0, 1))), precision=precision, preferred_element_type=dtype
    )


def _axes(inputs: Inputs) -> tuple[_Axis, _Axis]:
    T, S = inputs.query.shape[1], inputs.key.shape[1]
    return _Axis.cut(T, _MAX_BLOCK_QUERIES), _Axis.cut(S, _MAX_BLOCK_KEYS)


def _operands(inputs: Inputs, rows: _Axis, columns: _Axis) -> _Operands:
    dtype = accumulation_dtype(inputs.query.dtype)
    weight_dtype = inputs.query.dtype if inputs.query.dtype == jnp.bfloat16 else dtype
    K = inputs.key.shape[2]
    key = _heads_first(inputs.key, K, columns)[:, :, 0]
    value = _heads_first(inputs.value, K, columns)[:, :, 0]
    key_norms = jnp.sum(jnp.square(key.astype(dtype)), axis=-1)[:, :, None, None, :]
    gamma = group_heads(inputs.gamma, K)
    return _Operands(
        query=_heads_first(inputs.query, K, rows),
        key=key,
        value=value.astype(weight_dtype),
        key_penalty=group_heads(inputs.key_norm_weight, K) * gamma * key_norms,
        double_gamma=2 * gamma,
    )


def _heads_first(array: jax.Array, num_kv_heads: int, axis: _Axis, fill=0) -> jax.Array:
    """(B, T, N, ...) to (B, K, G, T, ...), filled up to whole blocks."""
    B, T, N = array.shape[:3]
    array = array.reshape(B, T, num_kv_heads, N // num_kv_heads, *array.shape[3:])
    return axis.pad(jnp.moveaxis(array, 1, 3), 3, fill)


def _lengths_first(array: jax.Array, axis: _Axis) -> jax.Array:
    """The inverse of `_heads_first`."""
    array = jnp.moveaxis(lax.slice_in_dim(array, 0, axis.length, axis=3), 3, 1)
    B, T, K, G = array.shape[:4]
    return array.reshape(B, T, K * G, *array.shape[4:])


def _pad_masking(masking: Masking, rows: _Axis, columns: _Axis) -> Masking:
    """Fills the masks up as the operands are; what stands in for a pair outside is never used."""

    def pad(array, axis, sequence):
        return array if array is None or array.shape[axis] == 1 else sequence.pad(array, axis)

    return masking._replace(
        mask=pad(pad(masking.mask, 2, rows), 3, columns) if masking.mask is not None else None,
        query_segments=pad(masking.query_segments, 1, rows),
        key_segments=pad(masking.key_segments, 1, columns),
    )


def _cut_masking(masking: Masking, rows: _Axis, columns: _Axis, i, j) -> Masking:
    """The rules of block (i, j)."""

    def cut(array, axis, sequence, index):
        whole = array is None or array.shape[axis] == 1
        return array if whole else sequence.slice(array, index, axis)

    mask = masking.mask
    return masking._replace(
        mask=None if mask is None else cut(cut(mask, 2, rows, i), 3, columns, j),
        query_segments=cut(masking.query_segments, 1, rows, i),
        key_segments=cut(masking.key_segments, 1, columns, j),
    )


def _key_blocks(i, rows: _Axis, columns: _Axis, masking: Masking, options: Options):
    """The key blocks [first, last) that query block i can attend to, by the structural rules."""
    first, last = i * rows.block, (i + 1) * rows.block - 1  # positions
    lowest, highest = 0, columns.length - 1
    if options.window is not None:
        left, right = options.window
        lowest, highest = jnp.maximum(lowest, first - left), jnp.minimum(highest, last + right)
    if options.is_causal:
        highest = jnp.minimum(highest, last)
    if masking.key_lengths is not None:
        highest = jnp.minimum(highest, masking.key_lengths.max() - 1)
    return lowest // columns.block, highest // columns.block + 1


def _query_blocks(j, rows: _Axis, columns: _Axis, masking: Masking, options: Options):
    """The query blocks [first, last) that can attend to key block j."""
    first, last = j * columns.block, (j + 1) * columns.block - 1  # positions
    lowest, highest = 0, rows.length - 1
    if options.window is not None:
        left, right = options.window
        lowest, highest = jnp.maximum(lowest, first - right), jnp.minimum(highest, last + left)
    if options.is_causal:
        lowest = jnp.maximum(lowest, first)
    if masking.query_lengths is not None:
        highest = jnp.minimum(highest, masking.query_lengths.max() - 1)
    return lowest // rows.block, highest // rows.block + 1

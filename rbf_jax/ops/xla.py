"""RBF attention in blocks of queries and keys, for any device: O(T) memory, forward and backward.

Online softmax (Milakov and Gimelshein, arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691) in
plain JAX. Blocks that a causal, window or length rule empties are not visited. Inside, heads come
before positions and the heads of a group stay apart: queries (B, K, G, T, H), keys (B, K, S, H).

Matrix products take their operands as they are given and accumulate in float32; the attention
weights are rounded to bfloat16 for the second product where the inputs are bfloat16. For float16
they stay float32: weights below 2⁻²⁴ would be lost.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbf_jax.ops.call import Inputs, Masking, Rules, accumulation_dtype
from rbf_jax.ops.logits import (
    Blocks,
    group_heads,
    key_penalties,
    rbf_logits,
    visible_keys,
    visible_queries,
    with_rules,
)
from rbf_jax.ops.vjp import Gradients, Passes, Residuals

SUPPORTS = frozenset(
    {
        *("left", "right", "num_global_keys", "sink", "return_residual"),
        *("mask", "query_lengths", "key_lengths", "query_segments", "key_segments"),
        *("alibi_slopes", "query_offset"),
    }
)
# Upper limits of a block of queries and of keys, found by trying on two CPU cores: smaller ones pay
# for more loop turns, larger ones fall out of the cache.
_MAX_BLOCKS = (256, 512)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A sequence axis cut into blocks of equal size, the last one filled up."""

    length: int
    block: int
    num_blocks: int

    @classmethod
    def cut(cls, length: int, limit: int) -> _Axis:
        num_blocks = -(-length // limit)
        block = -(-length // num_blocks)
        if num_blocks > 1:  # whole vector registers; the last block has a few more rows to fill
            block = -(-block // 8) * 8
        return cls(length, block, num_blocks)

    def pad(self, array: jax.Array, axis: int, fill=0) -> jax.Array:
        missing = self.num_blocks * self.block - self.length
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
        return index * self.block + jnp.arange(self.block, dtype=jnp.int32)


class _Call(NamedTuple):
    """One call, its arrays as the loops want them: heads first, filled up to whole blocks."""

    rows: _Axis
    columns: _Axis
    query: jax.Array  # B K G T H
    key: jax.Array  # B K S H
    value: jax.Array  # B K S H, in the dtype of the weights
    key_penalties: jax.Array  # λγ‖k‖², B K G 1 S, accumulation dtype
    gamma: jax.Array  # γ, 1 K G 1 1, accumulation dtype
    sink_logits: jax.Array | None  # likewise
    masking: Masking
    rules: Rules

    @classmethod
    def prepare(
        cls, inputs: Inputs, masking: Masking, rules: Rules, limits: tuple[int, int]
    ) -> _Call:
        dtype = accumulation_dtype(inputs.query.dtype)
        weight_dtype = inputs.query.dtype if inputs.query.dtype == jnp.bfloat16 else dtype
        K = inputs.key.shape[2]
        rows = _Axis.cut(inputs.query.shape[1], limits[0])
        columns = _Axis.cut(inputs.key.shape[1], limits[1])
        key = _heads_first(inputs.key, K, columns)[:, :, 0]
        value = _heads_first(inputs.value, K, columns)[:, :, 0]
        gamma, weight = group_heads(inputs.gamma, K), group_heads(inputs.key_norm_weight, K)
        sink = inputs.sink_logits
        return cls(
            rows=rows,
            columns=columns,
            query=_heads_first(inputs.query, K, rows),
            key=key,
            value=value.astype(weight_dtype),
            key_penalties=key_penalties(
                _heads_first(inputs.squared_key_norms(), K, columns)[:, :, :, None], gamma, weight
            ),
            gamma=gamma,
            sink_logits=None if sink is None else group_heads(sink, K),
            masking=_pad_masking(masking, rows, columns),
            rules=rules,
        )

    def logits(self, query: jax.Array, key: jax.Array, i, j) -> jax.Array:
        """2γ q·k − λγ‖k‖² (+ ALiBi) of block (i, j), −inf where masked: (B, K, G, T', S')."""
        rows, columns, K = self.rows, self.columns, self.key.shape[1]
        positions = rows.positions(i), columns.positions(j)
        products = _dot(query, key, ((4,), (3,)))
        logits = rbf_logits(products, columns.slice(self.key_penalties, j, 4), self.gamma)
        masking = _cut_masking(self.masking, rows, columns, i, j)
        logits = with_rules(logits, self.rules, masking, K, *positions)
        if columns.length % columns.block:
            inside = (positions[1] < columns.length)[None, None, None, None]
            logits = jnp.where(inside, logits, -jnp.inf)
        return logits

    def offsets(self):
        """The least and the largest position of the first query."""
        offset = self.masking.query_offset
        return (jnp.int32(0),) * 2 if offset is None else (offset.min(), offset.max())

    def key_blocks(self, i) -> Blocks:
        """The blocks of keys that query block i can attend to, by position and lengths."""
        least, most = self.offsets()
        first, last = i * self.rows.block + least, (i + 1) * self.rows.block - 1 + most
        lengths = self.masking.key_lengths
        stop = jnp.int32(self.columns.length) if lengths is None else lengths.max()
        return visible_keys(self.rules, first, last, stop, self.columns.block)

    def query_blocks(self, j) -> Blocks:
        """The blocks of queries that can attend to key block j."""
        least, most = self.offsets()
        key, last_key = j * self.columns.block, (j + 1) * self.columns.block - 1
        lengths = self.masking.query_lengths
        stop = jnp.int32(self.rows.length) if lengths is None else lengths.max()
        return visible_queries(
            self.rules, key, key - most, last_key - least, stop, stop, self.rows.block
        )


# Compiled as a unit: outside a jit, loops whose bodies are new functions each time would be
# compiled at every call.
@functools.partial(jax.jit, static_argnames=("rules", "limits"))
def _forward_in_blocks(
    inputs: Inputs, masking: Masking, rules: Rules, limits: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    call = _Call.prepare(inputs, masking, rules, limits)
    rows, columns = call.rows, call.columns
    dtype = call.key_penalties.dtype
    zeros = _zeros(call.query, dtype)
    row_zeros = zeros[..., 0]

    def query_block(i, carry):
        out, logsumexp = carry
        query = rows.slice(call.query, i, 3)

        def key_block(j, carry):
            weighted, total, maximum = carry
            logits = call.logits(query, columns.slice(call.key, j, 2), i, j)
            value = columns.slice(call.value, j, 2)
            # The maximum's derivative cancels; JAX's is 0/0 where two fusions round a logit apart.
            new_maximum = jnp.maximum(maximum, lax.stop_gradient(logits).max(axis=-1))
            # A row that has seen no key yet keeps −inf; what it is measured from must be finite.
            reference = jnp.where(jnp.isneginf(new_maximum), 0, new_maximum)
            weights = jnp.exp(logits - reference[..., None])
            decay = jnp.exp(maximum - reference)
            total = total * decay + weights.sum(axis=-1)
            products = _dot(weights.astype(value.dtype), value, ((4,), (2,)))
            return weighted * decay[..., None] + products, total, new_maximum

        carry = rows.slice(zeros, i, 3), *_before_keys(rows.slice(row_zeros, i, 3), call)
        blocks = call.key_blocks(i)
        if rules.num_global_keys:
            carry = lax.fori_loop(jnp.int32(0), blocks.global_stop, key_block, carry)
        weighted, total, maximum = lax.fori_loop(blocks.start, blocks.stop, key_block, carry)
        nothing = total == 0
        total = jnp.where(nothing, 1, total)
        block = (weighted / total[..., None]).astype(out.dtype)
        row_logsumexp = jnp.where(nothing, -jnp.inf, maximum + jnp.log(total))
        return rows.update(out, block, i, 3), rows.update(logsumexp, row_logsumexp, i, 3)

    carry = zeros.astype(inputs.query.dtype), row_zeros
    out, logsumexp = lax.fori_loop(jnp.int32(0), jnp.int32(rows.num_blocks), query_block, carry)
    return _lengths_first(out, rows), _lengths_first(logsumexp, rows)


@functools.partial(jax.jit, static_argnames=("rules", "limits"))
def _backward_in_blocks(
    residuals: Residuals,
    dout: jax.Array,
    delta: jax.Array,
    rules: Rules,
    limits: tuple[int, int],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    call = _Call.prepare(residuals.inputs, residuals.masking, rules, limits)
    rows, columns, K = call.rows, call.columns, call.key.shape[1]
    dtype, weight_dtype = call.key_penalties.dtype, call.value.dtype
    zeros = _zeros(call.query, dtype), _zeros(call.key, dtype), _zeros(call.key_penalties, dtype)

    dout = _heads_first(dout, K, rows).astype(weight_dtype)
    delta = _heads_first(delta, K, rows)
    # Rows that attend to nothing, and those filled up: exp(logits − ∞) gives them weight 0.
    logsumexp = jnp.where(jnp.isneginf(residuals.logsumexp), jnp.inf, residuals.logsumexp)
    logsumexp = _heads_first(logsumexp, K, rows, fill=jnp.inf)

    def key_block(j, carry):
        dq, dk, dv, column_sums = carry
        key, value = columns.slice(call.key, j, 2), columns.slice(call.value, j, 2)

        def query_block(i, carry):
            dq, dk, dv, column_sums = carry
            query, row_dout = rows.slice(call.query, i, 3), rows.slice(dout, i, 3)
            logits = call.logits(query, key, i, j)
            weights = jnp.exp(logits - rows.slice(logsumexp, i, 3)[..., None])
            dv += _dot(weights.astype(weight_dtype), row_dout, ((2, 3), (2, 3)))
            dweights = _dot(row_dout, value, ((4,), (3,)))
            dlogits = weights * (dweights - rows.slice(delta, i, 3)[..., None])
            column_sums += dlogits.sum(axis=3)
            dproducts = (dlogits * 2 * call.gamma).astype(weight_dtype)
            dk += _dot(dproducts, query.astype(weight_dtype), ((2, 3), (2, 3)))
            row_dq = rows.slice(dq, i, 3) + _dot(dproducts, key.astype(weight_dtype), ((4,), (2,)))
            return rows.update(dq, row_dq, i, 3), dk, dv, column_sums

        blocks = [columns.slice(x, j, axis) for x, axis in zip((dk, dv, column_sums), (2, 2, 3))]
        visible = call.query_blocks(j)
        dq, *blocks = lax.fori_loop(visible.start, visible.stop, query_block, (dq, *blocks))
        return (
            dq,
            columns.update(dk, blocks[0], j, 2),
            columns.update(dv, blocks[1], j, 2),
            columns.update(column_sums, blocks[2], j, 3),
        )

    carry = zeros[0], zeros[1], zeros[1], zeros[2][..., 0, :]
    dq, dk, dv, column_sums = lax.fori_loop(
        jnp.int32(0), jnp.int32(columns.num_blocks), key_block, carry
    )
    return (
        _lengths_first(dq, rows),
        _lengths_first(dk[:, :, None], columns),
        _lengths_first(dv[:, :, None], columns),
        _lengths_first(column_sums, columns),
    )


def _forward(inputs: Inputs, masking: Masking, rules: Rules):
    return _forward_in_blocks(inputs, masking, rules.for_kernels(masking), _MAX_BLOCKS)


def _backward(residuals: Residuals, dout: jax.Array, dlogsumexp: jax.Array, rules: Rules):
    # The logsumexp of a row that may attend to nothing is the constant −∞.
    dlogsumexp = jnp.where(jnp.isneginf(residuals.logsumexp), 0, dlogsumexp)
    dtype = dlogsumexp.dtype
    delta = jnp.sum(residuals.out.astype(dtype) * dout.astype(dtype), axis=-1) - dlogsumexp
    dq, dk, dv, column_sums = _backward_in_blocks(
        residuals, dout, delta, rules.for_kernels(residuals.masking), _MAX_BLOCKS
    )
    # What the key norms contribute.
    inputs = residuals.inputs
    query, key = inputs.query.astype(dtype), inputs.key.astype(dtype)
    K = key.shape[2]
    column_sums = column_sums.reshape(*key.shape[:3], -1)  # B S K G
    norm_weight = (2 * inputs.gamma * inputs.key_norm_weight).reshape(1, 1, K, -1)
    dk -= jnp.sum(column_sums * norm_weight, axis=-1, keepdims=True) * key
    norms = inputs.squared_key_norms()[..., None]  # B S K 1
    return Gradients(
        dq,
        dk,
        dv,
        query_moment=jnp.sum(query * dq, axis=(0, 1, 3)),
        norm_moment=jnp.sum(column_sums * norms, axis=(0, 1)).reshape(inputs.gamma.shape),
    )


PASSES = Passes(_forward, _backward)


def _before_keys(zeros: jax.Array, call: _Call) -> tuple[jax.Array, jax.Array]:
    """Sum of weights and maximum of rows that have seen no key, but the sink if there is one."""
    if call.sink_logits is None:
        return zeros, zeros - jnp.inf
    return zeros + 1, zeros + call.sink_logits[..., 0]


def _zeros(like: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Zeros of a shape, with the sharding and the varying axes too: the loops' carries need them.

    (`jnp.zeros_like` does not keep an explicit sharding.)
    """
    return jnp.where(like == like, 0, 0).astype(dtype)


def _dot(a: jax.Array, b: jax.Array, contract) -> jax.Array:
    """Product over the axes `contract`, batched over the first two (B, K), accumulated in float32.

    float32 operands are never rounded: tf32 would lose the small differences of large norms.
    """
    dtype = accumulation_dtype(a.dtype)
    precision = lax.Precision.HIGHEST if a.dtype == dtype else None
    return lax.dot_general(
        a, b, (contract, ((0, 1), (0, 1))), precision=precision, preferred_element_type=dtype
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
        mask=pad(pad(masking.mask, 2, rows), 3, columns),
        query_segments=pad(masking.query_segments, 1, rows),
        key_segments=pad(masking.key_segments, 1, columns),
    )


def _cut_masking(masking: Masking, rows: _Axis, columns: _Axis, i, j) -> Masking:
    """The rules of block (i, j)."""

    def cut(array, axis, sequence, index):
        whole = array is None or array.shape[axis] == 1
        return array if whole else sequence.slice(array, index, axis)

    return masking._replace(
        mask=cut(cut(masking.mask, 2, rows, i), 3, columns, j),
        query_segments=cut(masking.query_segments, 1, rows, i),
        key_segments=cut(masking.key_segments, 1, columns, j),
    )

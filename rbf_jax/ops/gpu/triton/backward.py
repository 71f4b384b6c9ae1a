"""Backward kernels: gradients of the queries, a tile of them at a time, then of keys and values.

Both make the weights again from the logits, computed as in the forward pass, and the logsumexp
that it kept. `queries_kernel` goes first: it also makes δ, which `keys_kernel` reads. No two
programs add to the same memory, so the result is the same, to the bit, from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rbf_jax.ops.gpu.triton.tile import (
    PARTS,
    aligned,
    allowed_pairs,
    load_numbers,
    load_rows,
    position_of,
    rbf_logits,
    store_rows,
    tile_of,
    visible_keys,
    visible_queries,
    with_global_keys,
    within_segments,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def queries_kernel(
    query_ptr,  # (B, T, N, H)
    key_ptr,  # (B, S, K, H)
    value_ptr,  # (B, S, K, H)
    norms_ptr,  # float32 (B, K, S'): ‖k‖²
    per_head_ptr,  # float32 (B or 1, 3 or 4, N): c, w, ALiBi slope and sink, times log₂e
    query_lengths_ptr,  # int32 (B,)
    key_lengths_ptr,  # int32 (B,)
    query_segments_ptr,  # (B, T)
    key_segments_ptr,  # (B, S)
    offsets_ptr,  # int32 (B,): the position of query 0
    bounds_ptr,  # int32 (B, tiles of queries, 2): where the keys of the tile's segments are
    mask_ptr,  # bool (B or 1, N or 1, T or 1, S or 1)
    out_ptr,  # (B, T, N, H)
    dout_ptr,  # (B, T, N, H)
    logsumexp_ptr,  # float32 (B, N, T'), base 2; +∞ where a row may attend to nothing
    dlogsumexp_ptr,  # float32 (B, T, N), of the natural logarithm
    T,
    S,
    per_head_stride,  # of the batch axis
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_column_stride,
    dquery_ptr,  # (B, T, N, H)
    delta_ptr,  # float32 (B, N, T'): δ
    moments_ptr,  # float32 (B, N, T): q·dq
    RULES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    HAS_DLOGSUMEXP: tl.constexpr,
    MAX_REGISTERS: tl.constexpr,  # read by launch.py
):
    """One program per tile of queries: dq_i = 2γ Σ_j dS_ij k_j, and δ."""
    N: tl.constexpr = HEADS.num_heads
    K: tl.constexpr = HEADS.num_kv_heads
    H: tl.constexpr = HEADS.head_dim
    num_tiles = tl.cdiv(T, BLOCK_Q)
    tile, batch_head = tile_of(num_tiles, HEADS_AT_ONCE, RULES.causal)
    batch, head = (batch_head // N).to(tl.int64), batch_head % N
    key_head = head // (N // K)
    first = tile * BLOCK_Q
    query_stop, key_stop = T, S
    if RULES.has_query_lengths:
        query_stop = tl.load(query_lengths_ptr + batch)
    if RULES.has_key_lengths:
        key_stop = tl.load(key_lengths_ptr + batch)
    per_head_ptr += batch * per_head_stride + head
    scale, norm_weight = tl.load(per_head_ptr), tl.load(per_head_ptr + N)
    slope = tl.load(per_head_ptr + 2 * N)

    rows, features = first + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_H)
    offsets = ((batch * T + rows) * (N * H) + head * H)[:, None] + features[None, :]
    query = load_rows(query_ptr + offsets, rows, T, False, HEADS)
    dout = load_rows(dout_ptr + offsets, rows, T, False, HEADS)
    out = load_rows(out_ptr + offsets, rows, T, False, HEADS)
    per_row = batch_head.to(tl.int64) * aligned(T) + rows
    logsumexp = tl.load(logsumexp_ptr + per_row, mask=rows < query_stop, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLOGSUMEXP:
        index = (batch * T + rows) * N + head
        dlogsumexp = tl.load(dlogsumexp_ptr + index, mask=rows < T, other=0.0)
        delta -= tl.where(logsumexp == float("inf"), 0.0, dlogsumexp)
    tl.store(delta_ptr + per_row, delta, mask=rows < T)

    key_start = batch * S * (K * H) + key_head * H
    tile_offsets = tl.arange(0, BLOCK_K)[:, None] * (K * H) + features[None, :]
    norms_ptr += (batch * K + key_head) * aligned(S)
    keys = (key_ptr + key_start, value_ptr + key_start, tile_offsets, norms_ptr)
    row_segments = rows[:, None]
    if RULES.has_segments:
        row_segments = tl.load(query_segments_ptr + batch * T + rows, mask=rows < T, other=0)
        row_segments = row_segments[:, None]
        key_segments_ptr += batch * S
    if RULES.has_mask:
        mask_ptr += batch * mask_batch_stride + head.to(tl.int64) * mask_head_stride
    masking = (row_segments, key_segments_ptr, mask_ptr, mask_row_stride, mask_column_stride)
    queries = (query, dout, logsumexp, delta)
    numbers = (scale, norm_weight, slope)
    position = position_of(offsets_ptr, batch, RULES)
    where = (rows, rows + position, T, key_stop, S)

    position += first
    last = position + BLOCK_Q - 1
    start, inner_start, inner_stop, stop = visible_keys(position, last, key_stop, BLOCK_K, RULES)
    start, stop = within_segments(bounds_ptr, batch, tile, num_tiles, start, stop, RULES)
    global_stop, stop = with_global_keys(start, stop, last, key_stop, RULES)
    stop = tl.where(first < query_stop, stop, start)
    global_stop = tl.where(first < query_stop, global_stop, 0)
    dq = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    call = (queries, keys, numbers, where, masking)
    if RULES.num_global_keys > 0:
        dq = _add_keys(dq, 0, global_stop, call, RULES, HEADS, False)
    if RULES.pairwise:
        dq = _add_keys(dq, start, stop, call, RULES, HEADS, False)
    else:
        if RULES.left is not None:
            dq = _add_keys(dq, start, tl.minimum(inner_start, stop), call, RULES, HEADS, False)
        dq = _add_keys(dq, inner_start, tl.minimum(inner_stop, stop), call, RULES, HEADS, True)
        dq = _add_keys(dq, inner_stop, stop, call, RULES, HEADS, False)
    dq *= scale * LN2
    store_rows(dquery_ptr + offsets, dq, rows, T, HEADS)
    moments = tl.sum(dq * query.to(tl.float32), 1)
    tl.store(moments_ptr + batch_head.to(tl.int64) * T + rows, moments, mask=rows < T)


@triton.jit
def _add_keys(
    dq,
    begin,
    end,
    call,
    RULES: tl.constexpr,
    HEADS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Adds what the keys from `begin` to `end` give to Σ_j dS_ij k_j.

    `WHOLE`: they are whole blocks, and every row may attend to each of them.
    """
    queries, keys, numbers, where, masking = call
    query, dout, logsumexp, delta = queries
    key_ptr, value_ptr, tile_offsets, norms_ptr = keys
    scale, norm_weight, slope = numbers
    rows, positions, T, key_stop, S = where
    row_segments, key_segments_ptr, mask_ptr, row_stride, column_stride = masking
    ROW: tl.constexpr = HEADS.num_kv_heads * HEADS.head_dim
    BLOCK_K: tl.constexpr = tile_offsets.shape[0]
    for block in tl.range(begin // BLOCK_K, tl.cdiv(end, BLOCK_K)):
        at = block * BLOCK_K
        columns = at + tl.arange(0, BLOCK_K)
        allowed, any_allowed = True, True
        if not WHOLE:
            column_segments = columns[None, :]
            if RULES.has_segments:
                column_segments = tl.load(key_segments_ptr + columns, mask=columns < S, other=0)
                column_segments = column_segments[None, :]
            allowed, any_allowed = allowed_pairs(
                rows[:, None],
                positions[:, None],
                columns[None, :],
                (row_segments, column_segments),
                (mask_ptr, row_stride, column_stride),
                (T, key_stop, S),
                RULES,
            )
        if any_allowed:
            offset = tl.cast(at, tl.int64) * ROW
            key = load_rows(key_ptr + offset + tile_offsets, columns, key_stop, WHOLE, HEADS)
            value = load_rows(value_ptr + offset + tile_offsets, columns, key_stop, WHOLE, HEADS)
            norms = load_numbers(norms_ptr + columns, columns, key_stop, 0.0, WHOLE)
            products = tl.dot(query, tl.trans(key), input_precision="tf32x3")
            logits = rbf_logits(
                products,
                (norms * norm_weight)[None, :],
                (scale, slope),
                positions[:, None],
                columns[None, :],
                allowed,
                RULES,
                WHOLE,
            )
            weights = tl.exp2(logits - logsumexp[:, None])
            dweights = tl.dot(dout, tl.trans(value), input_precision="tf32x3")
            dlogits = weights * (dweights - delta[:, None])
            dq = tl.dot(dlogits.to(key.dtype), key, dq, input_precision="tf32x3")
    return dq


@triton.jit
def keys_kernel(
    query_ptr,  # (B, T, N, H)
    key_ptr,  # (B, S, K, H)
    value_ptr,  # (B, S, K, H)
    norms_ptr,  # float32 (B, K, S'): ‖k‖²
    per_head_ptr,  # float32 (B or 1, 3 or 4, N): c, w, ALiBi slope and sink, times log₂e
    query_lengths_ptr,  # int32 (B,)
    key_lengths_ptr,  # int32 (B,)
    query_segments_ptr,  # (B, T)
    key_segments_ptr,  # (B, S)
    offsets_ptr,  # int32 (B,): the position of query 0
    bounds_ptr,  # int32 (B, tiles of keys, 2): where the queries of the tile's segments are
    mask_ptr,  # bool (B or 1, N or 1, T or 1, S or 1)
    dout_ptr,  # (B, T, N, H)
    logsumexp_ptr,  # float32 (B, N, T'), base 2; +∞ where a row may attend to nothing
    delta_ptr,  # float32 (B, N, T'): δ
    T,
    S,
    per_head_stride,  # of the batch axis
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_column_stride,
    dkey_ptr,  # (B, S, K, H)
    dvalue_ptr,  # (B, S, K, H)
    column_sums_ptr,  # float32 (B, N, S): Σ_i dS_ij
    RULES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    MAX_REGISTERS: tl.constexpr,  # read by launch.py
):
    """One program per tile of keys, for all query heads of their group."""
    N: tl.constexpr = HEADS.num_heads
    K: tl.constexpr = HEADS.num_kv_heads
    H: tl.constexpr = HEADS.head_dim
    GROUP: tl.constexpr = N // K
    num_tiles = tl.cdiv(S, BLOCK_K)
    tile, batch_head = tile_of(num_tiles, HEADS_AT_ONCE, False)
    batch, key_head = (batch_head // K).to(tl.int64), batch_head % K
    first = tile * BLOCK_K
    query_stop, key_stop = T, S
    if RULES.has_query_lengths:
        query_stop = tl.load(query_lengths_ptr + batch)
    if RULES.has_key_lengths:
        key_stop = tl.load(key_lengths_ptr + batch)

    columns, features = first + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_H)
    offsets = ((batch * S + columns) * (K * H) + key_head * H)[:, None] + features[None, :]
    key = load_rows(key_ptr + offsets, columns, S, False, HEADS)
    value = load_rows(value_ptr + offsets, columns, S, False, HEADS)
    norms_ptr += batch_head.to(tl.int64) * aligned(S)
    norms = tl.load(norms_ptr + columns, mask=columns < S, other=0.0)
    column_segments = columns[:, None]
    if RULES.has_segments:
        column_segments = tl.load(key_segments_ptr + batch * S + columns, mask=columns < S, other=0)
        column_segments = column_segments[:, None]
        query_segments_ptr += batch * T

    last = first + BLOCK_K - 1
    position = position_of(offsets_ptr, batch, RULES)
    start, inner_start, inner_stop, stop = visible_queries(
        first, first - position, last - position, query_stop, BLOCK_Q, RULES
    )
    start, stop = within_segments(bounds_ptr, batch, tile, num_tiles, start, stop, RULES)
    stop = tl.where(first < key_stop, stop, start)
    if last >= key_stop:  # some of these keys are not to be attended to
        inner_stop = inner_start

    tile_offsets = tl.arange(0, BLOCK_Q)[:, None] * (N * H) + features[None, :]
    where = (columns, position, query_stop, T, key_stop, S)
    dk = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)  # in units of the 2γ of the head at hand
    dv = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    norm_part = tl.zeros([BLOCK_K], tl.float32)
    per_head_ptr += batch * per_head_stride + key_head * GROUP
    scale = tl.load(per_head_ptr)
    for member in tl.range(GROUP):
        head = key_head * GROUP + member
        old_scale, scale = scale, tl.load(per_head_ptr + member)
        norm_weight = tl.load(per_head_ptr + member + N)
        numbers = (scale, norms * norm_weight, tl.load(per_head_ptr + member + 2 * N))
        dk *= old_scale / scale
        vectors = batch * T * (N * H) + head * H
        per_row = (batch * N + head) * aligned(T)
        queries = (
            query_ptr + vectors,
            dout_ptr + vectors,
            tile_offsets,
            logsumexp_ptr + per_row,
            delta_ptr + per_row,
        )
        matrix_ptr = mask_ptr
        if RULES.has_mask:
            matrix_ptr += batch * mask_batch_stride + head.to(tl.int64) * mask_head_stride
        masking = (
            query_segments_ptr,
            column_segments,
            matrix_ptr,
            mask_row_stride,
            mask_column_stride,
        )
        call = ((key, value), queries, numbers, where, masking)
        state = (dk, dv, tl.zeros([BLOCK_K, PARTS], tl.float32))
        if RULES.pairwise:
            state = _add_queries(state, start, stop, call, RULES, HEADS, False)
        else:
            if RULES.right is not None:
                end = tl.minimum(inner_start, stop)
                state = _add_queries(state, start, end, call, RULES, HEADS, False)
            end = tl.minimum(inner_stop, stop)
            state = _add_queries(state, inner_start, end, call, RULES, HEADS, True)
            state = _add_queries(state, inner_stop, stop, call, RULES, HEADS, False)
        dk, dv, sums = state
        sums = tl.sum(sums, 1)
        norm_part += sums * (2 * LN2 * norm_weight)
        sums_ptr = column_sums_ptr + (batch * N + head) * S
        tl.store(sums_ptr + columns, sums, mask=columns < S)
    dk = dk * (scale * LN2) - norm_part[:, None] * key.to(tl.float32)
    store_rows(dkey_ptr + offsets, dk, columns, S, HEADS)
    store_rows(dvalue_ptr + offsets, dv, columns, S, HEADS)


@triton.jit
def _add_queries(
    state,
    begin,
    end,
    call,
    RULES: tl.constexpr,
    HEADS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Adds what queries `begin` to `end` give to Σ_i dS_ij q_i, Σ_i P_ij dout_i and Σ_i dS_ij.

    Tiles of logits are transposed, (keys, queries), so that their products with queries need no
    transposition. `WHOLE`: these are whole blocks, and all may attend to every one of the keys.
    """
    dk, dv, sums = state
    keys, queries, numbers, where, masking = call
    key, value = keys
    query_ptr, dout_ptr, tile_offsets, logsumexp_ptr, delta_ptr = queries
    scale, weighted_norms, slope = numbers
    columns, position, query_stop, T, key_stop, S = where
    query_segments_ptr, column_segments, mask_ptr, row_stride, column_stride = masking
    ROW: tl.constexpr = HEADS.num_heads * HEADS.head_dim
    BLOCK_Q: tl.constexpr = tile_offsets.shape[0]
    BLOCK_K: tl.constexpr = key.shape[0]
    for block in tl.range(begin // BLOCK_Q, tl.cdiv(end, BLOCK_Q)):
        at = block * BLOCK_Q
        rows = at + tl.arange(0, BLOCK_Q)
        positions = rows + position
        allowed, any_allowed = True, True
        if not WHOLE:
            row_segments = rows[None, :]
            if RULES.has_segments:
                row_segments = tl.load(query_segments_ptr + rows, mask=rows < T, other=0)
                row_segments = row_segments[None, :]
            allowed, any_allowed = allowed_pairs(
                rows[None, :],
                positions[None, :],
                columns[:, None],
                (row_segments, column_segments),
                (mask_ptr, row_stride, column_stride),
                (T, key_stop, S),
                RULES,
            )
        if any_allowed:
            offset = tl.cast(at, tl.int64) * ROW
            query = load_rows(query_ptr + offset + tile_offsets, rows, query_stop, WHOLE, HEADS)
            dout = load_rows(dout_ptr + offset + tile_offsets, rows, query_stop, WHOLE, HEADS)
            logsumexp = load_numbers(logsumexp_ptr + rows, rows, query_stop, float("inf"), WHOLE)
            delta = load_numbers(delta_ptr + rows, rows, query_stop, 0.0, WHOLE)
            if query.dtype == tl.float32:
                # tf32x3 rounds a·b and b·a differently: where logits are huge, the weights are
                # right only if they are made from the very logits of the forward pass.
                products = tl.trans(tl.dot(query, tl.trans(key), input_precision="tf32x3"))
            else:
                products = tl.dot(key, tl.trans(query))
            logits = rbf_logits(
                products,
                weighted_norms[:, None],
                (scale, slope),
                positions[None, :],
                columns[:, None],
                allowed,
                RULES,
                WHOLE,
            )
            weights = tl.exp2(logits - logsumexp[None, :])
            dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="tf32x3")
            dweights = tl.dot(value, tl.trans(dout), input_precision="tf32x3")
            dlogits = weights * (dweights - delta[None, :])
            sums += tl.sum(tl.reshape(dlogits, [BLOCK_K, BLOCK_Q // PARTS, PARTS]), 1)
            dk = tl.dot(dlogits.to(query.dtype), query, dk, input_precision="tf32x3")
    return dk, dv, sums

"""Forward kernels: a tile of queries at a time, one pass over the keys they may attend to.

The logits in base 2 are x_ij = c q_i·k_j − w‖k_j‖² with c = 2γ log₂e and w = λγ log₂e. For w > 0
they never exceed c²‖q_i‖²/4w, a bound known before the first key is read. With R the largest bound
of a tile, logits are measured from R − 60: no weight exp2(x − R + 60) overflows, so the running
maximum of online softmax and the rescaling that it needs are left out; the reference is folded
into the norms, and a score costs one fused multiply-add and one exp2. What can go wrong is
underflow, where the nearest key of a row is so far away that its sum comes out tiny, and overflow
of sums where values are huge. `forward_kernel` raises a flag for such a tile, and `gate_kernel`
does the flagged tiles again with online softmax: the result is right on any input.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rbf_jax.ops.gpu import bound
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
    with_global_keys,
    within_segments,
)

HEADROOM = tl.constexpr(bound.HEADROOM)
SMALLEST_SUM = tl.constexpr(bound.SMALLEST_SUM)
LARGEST_REFERENCE = tl.constexpr(bound.LARGEST_REFERENCE)


@triton.jit
def forward_kernel(
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
    T,
    S,
    per_head_stride,  # of the batch axis
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_column_stride,
    out_ptr,  # (B, T, N, H)
    logsumexp_ptr,  # float32 (B, N, T'), base 2; +∞ where a row may attend to nothing
    flags_ptr,  # int32 (B·N·tiles of queries,): 1 where the gate must do the tile again
    RULES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    ONLINE: tl.constexpr,
    MAX_REGISTERS: tl.constexpr,  # read by launch.py
):
    """One program per tile of queries; `ONLINE` softmax needs no gate."""
    num_tiles = tl.cdiv(T, BLOCK_Q)
    tile, batch_head = tile_of(num_tiles, HEADS_AT_ONCE, RULES.causal)
    strides = (
        per_head_stride,
        mask_batch_stride,
        mask_head_stride,
        mask_row_stride,
        mask_column_stride,
    )
    inputs = (query_ptr, key_ptr, value_ptr, norms_ptr, per_head_ptr)
    masking = (
        query_lengths_ptr,
        key_lengths_ptr,
        query_segments_ptr,
        key_segments_ptr,
        offsets_ptr,
        bounds_ptr,
        mask_ptr,
    )
    flag = _do_tile(
        tile,
        batch_head,
        inputs,
        masking,
        T,
        S,
        strides,
        out_ptr,
        logsumexp_ptr,
        RULES,
        HEADS,
        BLOCK_Q,
        BLOCK_K,
        BLOCK_H,
        ONLINE,
        True,
    )
    if not ONLINE:
        tl.store(flags_ptr + batch_head * num_tiles + tile, flag.to(tl.int32))


@triton.jit
def gate_kernel(
    query_ptr,  # as in forward_kernel
    key_ptr,
    value_ptr,
    norms_ptr,
    per_head_ptr,
    query_lengths_ptr,
    key_lengths_ptr,
    query_segments_ptr,
    key_segments_ptr,
    offsets_ptr,
    bounds_ptr,
    mask_ptr,
    flags_ptr,
    old_out_ptr,  # the same memory as out_ptr
    old_logsumexp_ptr,  # the same memory as logsumexp_ptr
    T,
    S,
    per_head_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_column_stride,
    num_flags,
    out_ptr,
    logsumexp_ptr,
    RULES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    FLAGS_PER_PROGRAM: tl.constexpr,  # a power of two, enough for all
    MAX_REGISTERS: tl.constexpr,  # read by launch.py
):
    """Does the flagged tiles again; a few programs look through all flags."""
    strides = (
        per_head_stride,
        mask_batch_stride,
        mask_head_stride,
        mask_row_stride,
        mask_column_stride,
    )
    inputs = (query_ptr, key_ptr, value_ptr, norms_ptr, per_head_ptr)
    masking = (
        query_lengths_ptr,
        key_lengths_ptr,
        query_segments_ptr,
        key_segments_ptr,
        offsets_ptr,
        bounds_ptr,
        mask_ptr,
    )
    num_tiles = tl.cdiv(T, BLOCK_Q)
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    indices = program + tl.arange(0, FLAGS_PER_PROGRAM) * num_programs
    flags = tl.load(flags_ptr + indices, mask=indices < num_flags, other=0)
    stop = tl.where(tl.max(flags) > 0, num_flags, 0)  # mostly there is nothing to do
    for index in tl.range(program, stop, num_programs):
        if tl.load(flags_ptr + index) != 0:
            _do_tile(
                index % num_tiles,
                index // num_tiles,
                inputs,
                masking,
                T,
                S,
                strides,
                out_ptr,
                logsumexp_ptr,
                RULES,
                HEADS,
                BLOCK_Q,
                BLOCK_K,
                BLOCK_H,
                True,
                False,
            )


@triton.jit
def _do_tile(
    tile,
    batch_head,
    inputs,
    masking,
    T,
    S,
    strides,
    out_ptr,
    logsumexp_ptr,
    RULES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ONLINE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Writes the output and the logsumexp of a tile; returns whether the gate must do it again.

    `SPLIT` the keys into those that need rules and those that need none; else apply rules to all.
    """
    query_ptr, key_ptr, value_ptr, norms_ptr, per_head_ptr = inputs
    (
        query_lengths_ptr,
        key_lengths_ptr,
        query_segments_ptr,
        key_segments_ptr,
        offsets_ptr,
        bounds_ptr,
        mask_ptr,
    ) = masking
    N: tl.constexpr = HEADS.num_heads
    K: tl.constexpr = HEADS.num_kv_heads
    H: tl.constexpr = HEADS.head_dim
    batch, head = (batch_head // N).to(tl.int64), batch_head % N
    key_head = head // (N // K)
    first = tile * BLOCK_Q
    query_stop, key_stop = T, S
    if RULES.has_query_lengths:
        query_stop = tl.load(query_lengths_ptr + batch)
    if RULES.has_key_lengths:
        key_stop = tl.load(key_lengths_ptr + batch)
    per_head_ptr += batch * strides[0] + head
    scale, norm_weight = tl.load(per_head_ptr), tl.load(per_head_ptr + N)
    slope, sink = tl.load(per_head_ptr + 2 * N), -float("inf")
    if RULES.sink:
        sink = tl.load(per_head_ptr + 3 * N)

    rows, features = first + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_H)
    offsets = ((batch * T + rows) * (N * H) + head * H)[:, None] + features[None, :]
    query = load_rows(query_ptr + offsets, rows, T, False, HEADS)
    key_start = batch * S * (K * H) + key_head * H
    tile_offsets = tl.arange(0, BLOCK_K)[:, None] * (K * H) + features[None, :]
    keys = (
        key_ptr + key_start,
        value_ptr + key_start,
        tile_offsets,
        norms_ptr + (batch * K + key_head) * aligned(S),
    )
    row_segments = rows[:, None]
    if RULES.has_segments:
        row_segments = tl.load(query_segments_ptr + batch * T + rows, mask=rows < T, other=0)[
            :, None
        ]
        key_segments_ptr += batch * S
    if RULES.has_mask:
        mask_ptr += batch * strides[1] + head.to(tl.int64) * strides[2]
    position = position_of(offsets_ptr, batch, RULES)
    places = (rows, rows + position, T, key_stop, S)
    rules = (row_segments, key_segments_ptr, mask_ptr, strides[3], strides[4])

    position += first
    last = position + BLOCK_Q - 1
    start, inner_start, inner_stop, stop = visible_keys(position, last, key_stop, BLOCK_K, RULES)
    start, stop = within_segments(bounds_ptr, batch, tile, tl.cdiv(T, BLOCK_Q), start, stop, RULES)
    global_stop, stop = with_global_keys(start, stop, last, key_stop, RULES)
    stop = tl.where(first < query_stop, stop, start)
    global_stop = tl.where(first < query_stop, global_stop, 0)

    acc = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    total = tl.zeros([BLOCK_Q, PARTS], tl.float32)
    if ONLINE:
        reference, safe = 0.0, True
        maximum = tl.zeros([BLOCK_Q], tl.float32) + sink
    else:
        query_norms = tl.sum(query.to(tl.float32) * query.to(tl.float32), 1)
        bound = tl.max(query_norms) * scale * scale / (4 * norm_weight)
        if RULES.sink:
            bound = tl.maximum(bound, sink)
        safe = (norm_weight > 0) & (bound <= LARGEST_REFERENCE)
        reference = tl.where(safe, bound - HEADROOM, 0.0)
        stop = tl.where(safe, stop, start)
        global_stop = tl.where(safe, global_stop, 0)
        maximum = 0.0
    numbers = (scale, norm_weight, reference, slope)
    state = (acc, total, maximum)
    call = (query, keys, numbers, places, rules)
    if RULES.num_global_keys > 0:
        state = _attend(state, 0, global_stop, call, RULES, HEADS, False, ONLINE)
    if RULES.pairwise or not SPLIT:
        state = _attend(state, start, stop, call, RULES, HEADS, False, ONLINE)
    else:
        if RULES.left is not None:
            end = tl.minimum(inner_start, stop)
            state = _attend(state, start, end, call, RULES, HEADS, False, ONLINE)
        end = tl.minimum(inner_stop, stop)
        state = _attend(state, inner_start, end, call, RULES, HEADS, True, ONLINE)
        state = _attend(state, inner_stop, stop, call, RULES, HEADS, False, ONLINE)
    acc, total, maximum = state

    total = tl.sum(total, 1)
    if RULES.has_query_lengths:  # a row beyond its length sees the sink at most
        beyond = rows >= query_stop
        acc = tl.where(beyond[:, None], 0.0, acc)
        total = tl.where(beyond, 0.0, total)
        maximum = tl.where(beyond, (sink if RULES.sink else 0.0) - reference, maximum)
    if RULES.sink:
        total += tl.exp2(sink - reference - maximum)
    empty = total == 0
    store_rows(out_ptr + offsets, acc / tl.where(empty, 1.0, total)[:, None], rows, T, HEADS)
    logsumexp = tl.where(empty, float("inf"), reference + maximum + tl.log2(total))
    logsumexp_ptr += batch_head.to(tl.int64) * aligned(T)
    tl.store(logsumexp_ptr + rows, logsumexp, mask=rows < T)
    if ONLINE:
        return False
    else:
        smallest = tl.min(tl.where(rows < tl.minimum(query_stop, T), total, 1.0))
        finite = tl.min(tl.min((tl.abs(acc) < float("inf")).to(tl.int32), 1), 0)
        return (smallest < SMALLEST_SUM) | (finite == 0) | (not safe)


@triton.jit
def _attend(
    state,
    begin,
    end,
    call,
    RULES: tl.constexpr,
    HEADS: tl.constexpr,
    WHOLE: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """Adds the keys from `begin` to `end`: to weights times values, sum of weights, maximum.

    `WHOLE`: they are whole blocks, and every row may attend to each of them. The logits are
    measured from their running maximum if `ONLINE`, else from the reference.
    """
    acc, total, maximum = state
    query, keys, numbers, places, rules = call
    key_ptr, value_ptr, tile_offsets, norms_ptr = keys
    scale, norm_weight, reference, slope = numbers
    rows, positions, T, key_stop, S = places
    row_segments, key_segments_ptr, mask_ptr, row_stride, column_stride = rules
    ROW: tl.constexpr = HEADS.num_kv_heads * HEADS.head_dim
    BLOCK_Q: tl.constexpr = query.shape[0]
    BLOCK_K: tl.constexpr = tile_offsets.shape[0]
    for block in tl.range(begin // BLOCK_K, tl.cdiv(end, BLOCK_K)):
        at = block * BLOCK_K
        columns = at + tl.arange(0, BLOCK_K)
        allowed, any_allowed = True, True
        if not WHOLE:
            column_segments = columns[None, :]
            if RULES.has_segments:
                column_segments = tl.load(key_segments_ptr + columns, mask=columns < S, other=0)[
                    None, :
                ]
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
            norms = load_numbers(norms_ptr + columns, columns, key_stop, 0.0, WHOLE)
            products = tl.dot(query, tl.trans(key), input_precision="tf32x3")
            logits = rbf_logits(
                products,
                (norms * norm_weight + reference)[None, :],
                (scale, slope),
                positions[:, None],
                columns[None, :],
                allowed,
                RULES,
                WHOLE,
            )
            if ONLINE:
                new_maximum = tl.maximum(maximum, tl.max(logits, 1))
                subtract = new_maximum
                if not WHOLE:  # a row may not have met a key yet
                    subtract = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
                rescale = tl.exp2(maximum - subtract)
                maximum = new_maximum
                total *= rescale[:, None]
                acc *= rescale[:, None]
                logits -= subtract[:, None]
            weights = tl.exp2(logits)
            total += tl.sum(tl.reshape(weights, [BLOCK_Q, BLOCK_K // PARTS, PARTS]), 1)
            value = load_rows(value_ptr + offset + tile_offsets, columns, key_stop, WHOLE, HEADS)
            acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="tf32x3")
    return acc, total, maximum

"""Attention of a few queries to a cache: a part of the keys to a program, then the parts together.

A step of generation reads every key and value once, and all else is little: it takes as long as
memory takes. So the rows of a program are all that read the same keys, the new tokens of all query
heads of a group; and keys are shared out to more programs than there are heads, enough to keep all
of memory busy. Logits are in base 2, as in forward.py, measured from the running maximum.

The keys that a row of the batch may see are counted 0, 1, …: the registers, then its tokens from
the first one within the window. Programs share out this count, whatever the length of the row, and
read no other slot of the cache. Token p is in slot R + p mod C: the count may go once around the
ring.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rbf_jax.ops.gpu.triton.tile import load_rows, store_rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def decode_kernel(
    query_ptr,  # (B, T, N, H)
    key_ptr,  # (B, K, S, H)
    value_ptr,  # (B, K, S, H)
    norms_ptr,  # float32 (B, K, S): ‖k‖²
    offsets_ptr,  # int32 (B,): R + the position of query 0
    lengths_ptr,  # int32 (B,): tokens in the cache
    per_head_ptr,  # float32 (B or 1, 3 or 4, N): c, w, ALiBi slope and sink, times log₂e
    S,
    per_head_stride,  # of the batch axis
    num_splits,
    out_ptr,  # (B, T, N, splits, H): softmax over the keys of a split
    logsumexp_ptr,  # float32 (B, T, N, splits); −∞ where a row may attend to none of them
    RULES: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,  # T
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    MAX_REGISTERS: tl.constexpr,  # read by launch.py
):
    """One program per row of the batch, key/value head, split of the keys, tile of the rows."""
    N: tl.constexpr = HEADS.num_heads
    K: tl.constexpr = HEADS.num_kv_heads
    H: tl.constexpr = HEADS.head_dim
    REGISTERS: tl.constexpr = RULES.num_global_keys
    LEFT: tl.constexpr = RULES.left
    ROWS: tl.constexpr = N // K * QUERIES
    TILES: tl.constexpr = (ROWS + BLOCK_Q - 1) // BLOCK_Q
    # Tiles of the same keys are neighbours, so that these stay in the L2 cache.
    program = tl.program_id(0)
    tile, split = program % TILES, program // TILES % num_splits
    batch_head = program // (TILES * num_splits)
    batch, key_head = (batch_head // K).to(tl.int64), batch_head % K

    rows, features = tile * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_H)
    tokens = rows % QUERIES
    heads = key_head * (N // K) + tl.minimum(rows // QUERIES, N // K - 1)
    places = (batch * QUERIES + tokens) * N + heads
    query = load_rows(
        query_ptr + (places * H)[:, None] + features[None, :], rows, ROWS, False, HEADS
    )
    per_head_ptr += batch * per_head_stride + heads
    scale, norm_weight = tl.load(per_head_ptr), tl.load(per_head_ptr + N)
    slope = scale
    if RULES.has_alibi:
        slope = tl.load(per_head_ptr + 2 * N)

    start, length = tl.load(offsets_ptr + batch) - REGISTERS, tl.load(lengths_ptr + batch)
    ring = S - REGISTERS
    first = tl.maximum(length - ring, 0)
    if LEFT is not None:
        first = tl.maximum(first, start - LEFT)
    first_slot = first % ring
    count = REGISTERS + tl.maximum(tl.minimum(start + QUERIES, length) - first, 0)
    share = tl.cdiv(tl.cdiv(count, BLOCK_K), num_splits) * BLOCK_K
    begin = split * share
    stop = tl.minimum(begin + share, count)

    offset = batch_head.to(tl.int64) * S
    key_ptr += offset * H
    value_ptr += offset * H
    norms_ptr += offset
    acc = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    # Sums stay apart, added up at the end: warps would wait for each other in every block.
    PARTS: tl.constexpr = BLOCK_K if BLOCK_K < 32 else 32
    total = tl.zeros([BLOCK_Q, PARTS], tl.float32)
    maximum = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    sink = maximum
    if RULES.sink:  # one split has it
        sink = tl.where(split == 0, tl.load(per_head_ptr + 3 * N), -float("inf"))
        maximum = sink
    for at in tl.range(begin, stop, BLOCK_K):
        counted = at + tl.arange(0, BLOCK_K)
        here = counted < stop
        slots = first_slot + counted - REGISTERS
        slots = REGISTERS + tl.where(slots >= ring, slots - ring, slots)
        behind = (start + tokens)[:, None] - (first + counted - REGISTERS)[None, :]
        if REGISTERS > 0:
            is_register = counted < REGISTERS
            slots = tl.where(is_register, counted, slots)
            behind = tl.where(is_register[None, :], 0, behind)
        allowed = here[None, :] & (behind >= 0)
        if LEFT is not None:
            allowed = allowed & (behind <= LEFT)

        offsets = (slots * H)[:, None] + features[None, :]
        key = load_rows(key_ptr + offsets, counted, stop, False, HEADS)
        norms = tl.load(norms_ptr + slots, mask=here, other=0.0)
        products = tl.dot(query, tl.trans(key), input_precision="tf32x3")
        logits = products * scale[:, None] - norms[None, :] * norm_weight[:, None]
        if RULES.has_alibi:
            logits -= slope[:, None] * behind.to(tl.float32)
        logits = tl.where(allowed, logits, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        # A row may not have met a key yet.
        subtract = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        rescale = tl.exp2(maximum - subtract)
        weights = tl.exp2(logits - subtract[:, None])
        maximum = new_maximum
        parts = tl.reshape(weights, [BLOCK_Q, BLOCK_K // PARTS, PARTS])
        total = total * rescale[:, None] + tl.sum(parts, 1)
        value = load_rows(value_ptr + offsets, counted, stop, False, HEADS)
        acc = tl.dot(
            weights.to(value.dtype), value, acc * rescale[:, None], input_precision="tf32x3"
        )

    total = tl.sum(total, 1)
    if RULES.sink:
        total += tl.where(split == 0, tl.exp2(sink - maximum), 0.0)
    empty = total == 0
    places = places * num_splits + split
    out = acc / tl.where(empty, 1.0, total)[:, None]
    store_rows(out_ptr + (places * H)[:, None] + features[None, :], out, rows, ROWS, HEADS)
    logsumexp = tl.where(empty, -float("inf"), (maximum + tl.log2(total)) * LN2)
    tl.store(logsumexp_ptr + places, logsumexp, mask=rows < ROWS)


@triton.jit
def merge_kernel(
    parts_ptr,  # float32 (rows, splits, H)
    part_logsumexp_ptr,  # float32 (rows, splits)
    num_splits,
    out_ptr,  # (rows, H)
    logsumexp_ptr,  # float32 (rows,)
    HEAD_DIM: tl.constexpr,  # H
    BLOCK_SPLITS: tl.constexpr,  # a power of two, at least splits
    BLOCK_H: tl.constexpr,
    MAX_REGISTERS: tl.constexpr,  # read by launch.py
):
    """One program per row and BLOCK_H features."""
    BLOCKS: tl.constexpr = (HEAD_DIM + BLOCK_H - 1) // BLOCK_H
    row, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    splits, features = tl.arange(0, BLOCK_SPLITS), block * BLOCK_H + tl.arange(0, BLOCK_H)
    places = row * num_splits + splits
    logsumexps = tl.load(part_logsumexp_ptr + places, mask=splits < num_splits, other=-float("inf"))
    inside = (splits < num_splits)[:, None] & (features < HEAD_DIM)[None, :]
    offsets = (places * HEAD_DIM)[:, None] + features[None, :]
    parts = tl.load(parts_ptr + offsets, mask=inside, other=0.0)
    largest = tl.max(logsumexps, 0)
    reference = tl.where(largest == -float("inf"), 0.0, largest)
    weights = tl.exp2((logsumexps - reference) * LOG2E)
    total = tl.sum(weights, 0)
    empty = total == 0
    out = tl.sum(parts * weights[:, None], 0) / tl.where(empty, 1.0, total)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * HEAD_DIM + features, out, mask=features < HEAD_DIM)
    logsumexp = tl.where(empty, -float("inf"), reference + tl.log2(total) * LN2)
    tl.store(logsumexp_ptr + row, logsumexp)

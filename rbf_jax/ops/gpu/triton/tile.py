"""What the kernels share: which program does which tile, which blocks it reads, masks and logits.

These are the statements of logits.py once more, as jit helpers. `RULES` is a `call.Rules`, `HEADS`
a `Heads`. B batch, T queries, S keys, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl

# Rows of float32 arrays that hold one number per query or key are this long, or a multiple of it,
# so that they can be read 16 bytes at a time.
ALIGNMENT = tl.constexpr(16)
# The sum of a row of a tile is kept in this many parts, those that a thread holds, and added up
# at the end: adding across threads for every tile costs time.
PARTS = tl.constexpr(8)


@dataclasses.dataclass(frozen=True)
class Heads:
    """The numbers of heads that a kernel is compiled for.

    Attributes:
      num_heads: N.
      num_kv_heads: K.
      head_dim: H.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int


@triton.jit
def aligned(length):
    """The length of a row that holds `length` numbers."""
    return tl.cdiv(length, ALIGNMENT) * ALIGNMENT


@triton.jit
def tile_of(num_tiles, HEADS_AT_ONCE: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The tile and the head, among those of all batch elements, that this program does.

    Programs start in the order of their ids. `HEADS_AT_ONCE` heads are worked on together, so that
    their keys and values stay in the L2 cache. Under a causal rule the last tiles of queries have
    the most to do and go first.
    """
    program = tl.program_id(0)
    num_heads = tl.num_programs(0) // num_tiles
    first_head = program // (num_tiles * HEADS_AT_ONCE) * HEADS_AT_ONCE
    together = tl.minimum(num_heads - first_head, HEADS_AT_ONCE)
    within = program - first_head * num_tiles
    tile = within // together
    if LAST_FIRST:
        tile = num_tiles - 1 - tile
    return tile, first_head + within % together


@triton.jit
def zero(length):
    """0, which the compiler does not know to be 0.

    Where a loop starts at a known 0, ptxas (of Triton 3.6) serializes its wgmma instructions.
    """
    return tl.minimum(length, 0)


@triton.jit
def visible_keys(first, last, num_keys, BLOCK: tl.constexpr, RULES: tl.constexpr):
    """Which keys the queries at positions `first` to `last` may attend to, but for global keys.

    Returns:
      start, inner_start, inner_stop, stop: visit the keys from start to stop; between the inner
      two, which are whole blocks, position allows every pair.
    """
    start, stop, inner_start, inner_stop = zero(num_keys), num_keys, zero(num_keys), num_keys
    RIGHT: tl.constexpr = RULES.right
    if RIGHT is not None:
        stop = tl.minimum(stop, last + RIGHT + 1)
        inner_stop = tl.minimum(inner_stop, first + RIGHT + 1)
    LEFT: tl.constexpr = RULES.left
    if LEFT is not None:
        start = tl.maximum(first - LEFT, 0) // BLOCK * BLOCK
        inner_start = tl.cdiv(tl.maximum(last - LEFT, 0), BLOCK) * BLOCK
    return start, inner_start, tl.maximum(inner_stop // BLOCK * BLOCK, inner_start), stop


@triton.jit
def with_global_keys(start, stop, last, num_keys, RULES: tl.constexpr):
    """Adds the global keys to the range from `start` to `stop`.

    Returns:
      global_stop, stop: visit the keys before global_stop as well.
    """
    global_stop = zero(num_keys)
    GLOBAL: tl.constexpr = RULES.num_global_keys
    if GLOBAL > 0:
        end = tl.minimum(num_keys, GLOBAL)
        if RULES.causal:
            end = tl.minimum(end, last + 1)
        global_stop = tl.minimum(end, start)
        stop = tl.where(start < end, tl.maximum(stop, end), stop)
    return global_stop, stop


@triton.jit
def visible_queries(key, first, last, num_queries, BLOCK: tl.constexpr, RULES: tl.constexpr):
    """Which queries may attend to the keys from `key` on, as `visible_keys` says it of keys.

    The first query is at position 0, the keys are at positions `first` to `last`.
    """
    start, stop = zero(num_queries), num_queries
    inner_start, inner_stop = zero(num_queries), num_queries
    LEFT: tl.constexpr = RULES.left
    if LEFT is not None:
        stop = tl.minimum(stop, last + LEFT + 1)
        inner_stop = tl.minimum(inner_stop, first + LEFT + 1)
    RIGHT: tl.constexpr = RULES.right
    if RULES.causal:
        start = first
        inner_start = last
    elif RIGHT is not None:
        start = tl.maximum(start, first - RIGHT)
        inner_start = tl.maximum(inner_start, last - RIGHT)
    if RULES.has_offset:  # keys may be before the first query
        start, inner_start = tl.maximum(start, 0), tl.maximum(inner_start, 0)
    if RULES.num_global_keys > 0 and not RULES.causal:
        start = tl.where(key < RULES.num_global_keys, 0, start)
    if RULES.num_global_keys > 0:
        stop = tl.where(key < RULES.num_global_keys, num_queries, stop)
    start = start // BLOCK * BLOCK
    inner_start = tl.cdiv(inner_start, BLOCK) * BLOCK
    return start, inner_start, tl.maximum(inner_stop // BLOCK * BLOCK, inner_start), stop


@triton.jit
def position_of(offsets_ptr, batch, RULES: tl.constexpr):
    """The position of query 0."""
    if RULES.has_offset:
        return tl.load(offsets_ptr + batch)
    else:
        return 0


@triton.jit
def load_rows(pointers, rows, stop, WHOLE: tl.constexpr, HEADS: tl.constexpr):
    """Loads a tile of vectors, (rows, features): 0 beyond row `stop` and beyond feature H.

    `WHOLE` promises that all rows are before `stop`.
    """
    H: tl.constexpr = HEADS.head_dim
    PADDED: tl.constexpr = pointers.shape[1]
    if PADDED == H:
        if WHOLE:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(rows < stop)[:, None], other=0.0)
    else:
        inside = (tl.arange(0, PADDED) < H)[None, :]
        if WHOLE:
            return tl.load(pointers, mask=inside, other=0.0)
        else:
            return tl.load(pointers, mask=inside & (rows < stop)[:, None], other=0.0)


@triton.jit
def load_numbers(pointers, rows, stop, other, WHOLE: tl.constexpr):
    """Loads one number per row, `other` beyond row `stop`."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=rows < stop, other=other)


@triton.jit
def store_rows(pointers, tile, rows, stop, HEADS: tl.constexpr):
    """Stores a tile of vectors in the type of the pointers, up to row `stop` and feature H."""
    H: tl.constexpr = HEADS.head_dim
    PADDED: tl.constexpr = pointers.shape[1]
    inside = (rows < stop)[:, None]
    if PADDED != H:
        inside = inside & (tl.arange(0, PADDED) < H)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def allowed_pairs(
    rows,
    positions,
    columns,
    segments,
    mask,
    shape,
    RULES: tl.constexpr,
):
    """Who may attend to whom in a tile; what belongs to rows and to columns broadcasts together.

    Rows beyond the last query attend by position: what they give is not stored.

    Args:
      rows: indices of the queries.
      positions: their positions.
      columns: indices of the keys.
      segments: those of the queries and of the keys.
      mask: pointer to the head's matrix, strides of its rows and columns.
      shape: T, where the keys end, S.
      RULES: the rules.

    Returns:
      allowed, and whether any pair is.
    """
    T, key_stop, S = shape
    row_segments, column_segments = segments
    mask_ptr, row_stride, column_stride = mask
    near = columns < key_stop
    LEFT: tl.constexpr = RULES.left
    RIGHT: tl.constexpr = RULES.right
    GLOBAL: tl.constexpr = RULES.num_global_keys
    if RULES.causal:
        near = near & (columns <= positions)
    local = near
    if LEFT is not None:
        local = local & (columns >= positions - LEFT)
    if RIGHT is not None and not RULES.causal:
        local = local & (columns <= positions + RIGHT)
    if RULES.has_segments:
        local = local & (row_segments == column_segments)
    if GLOBAL > 0:
        local = local | (near & (columns < GLOBAL))
    any_allowed = True
    if RULES.has_mask:
        inside = (rows < T) & (columns < S)
        offsets = rows.to(tl.int64) * row_stride + columns * column_stride
        local = local & (tl.load(mask_ptr + offsets, mask=inside, other=0) != 0)
        any_allowed = tl.max(tl.max(local.to(tl.int32), 1), 0) > 0
    return local, any_allowed


@triton.jit
def rbf_logits(
    products, penalties, head, positions, columns, allowed, RULES: tl.constexpr, WHOLE: tl.constexpr
):
    """The logits of a tile in base 2: c q·k − w‖k‖², with ALiBi, −∞ where a pair is not allowed.

    Args:
      products: q·k.
      penalties: w‖k‖², broadcasts to the tile.
      head: c and the ALiBi slope, both times log₂e.
      positions: of the queries, broadcasts to the tile.
      columns: of the keys, likewise.
      allowed: the pairs.
      RULES: the rules.
      WHOLE: every pair is allowed.
    """
    scale, slope = head
    logits = products * scale - penalties
    if RULES.has_alibi:
        distance = tl.abs(positions - columns)
        if RULES.num_global_keys > 0:
            distance = tl.where(columns < RULES.num_global_keys, 0, distance)
        logits -= slope * distance.to(tl.float32)
    if not WHOLE:
        logits = tl.where(allowed, logits, -float("inf"))
    return logits


@triton.jit
def within_segments(bounds_ptr, batch, tile, num_tiles, start, stop, RULES: tl.constexpr):
    """Narrows [start, stop) to the blocks that share a segment with the tile: (B, tiles, 2)."""
    if RULES.has_segments:
        bounds_ptr += (batch * num_tiles + tile) * 2
        start = tl.maximum(start, tl.load(bounds_ptr))
        stop = tl.minimum(stop, tl.load(bounds_ptr + 1))
    return start, stop

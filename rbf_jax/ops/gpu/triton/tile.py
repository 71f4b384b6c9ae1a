"""What the kernels share: which program does which tile, which keys it must see, who may attend.

B batch, T queries, S keys, N query heads, K key/value heads, H head dimension, as everywhere.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl

from rbf_jax.ops.gpu.program import CommonRules

# Rows of float32 arrays that hold one number per query or key are this long, or a multiple of it,
# so that they can be read 16 bytes at a time.
ALIGNMENT = tl.constexpr(16)
# The sum of a row of a tile is kept in this many parts, those that a thread holds, and added up
# at the end: adding across threads for every tile costs time.
PARTS = tl.constexpr(8)


@dataclasses.dataclass(frozen=True)
class Rules(CommonRules):
    """The static rules of a call: which code the kernels contain. Read as `RULES` in a kernel.

    Attributes:
      num_heads: N.
      num_kv_heads: K.
      head_dim: H.
      left: query i attends to keys j ≥ i − left; −1 for no such rule.
      right: query i attends to keys j ≤ i + right; −1 for no such rule.
      segments: whether there are any.
      mask: whether there is one.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    left: int = -1
    right: int = -1
    segments: bool = False
    mask: bool = False

    @property
    def left_rule(self) -> bool:
        """Whether the first keys, or the last queries of a key, are cut off by a rule."""
        return self.left >= 0

    @property
    def right_rule(self) -> bool:
        """Whether the last keys, or the first queries of a key, are cut off by a rule."""
        return self.causal or self.right >= 0

    @property
    def any_pair(self) -> bool:
        """Whether position alone does not say who may attend to whom."""
        return self.segments or self.mask


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
def key_range(first, last, num_keys, BLOCK: tl.constexpr, RULES: tl.constexpr):
    """Which keys the queries at positions `first` to `last` may attend to.

    Returns:
      start, inner_start, inner_stop, stop: keys from start to stop are to be visited; between the
      inner two, which are whole blocks, every one of the queries may attend to every key.
    """
    start, stop, inner_start, inner_stop = zero(num_keys), num_keys, zero(num_keys), num_keys
    if RULES.causal:
        stop = tl.minimum(stop, last + 1)
        inner_stop = tl.minimum(inner_stop, first + 1)
    RIGHT: tl.constexpr = RULES.right
    if RIGHT >= 0:
        stop = tl.minimum(stop, last + RIGHT + 1)
        inner_stop = tl.minimum(inner_stop, first + RIGHT + 1)
    LEFT: tl.constexpr = RULES.left
    if LEFT >= 0:
        start = tl.maximum(first - LEFT, 0) // BLOCK * BLOCK
        inner_start = tl.cdiv(tl.maximum(last - LEFT, 0), BLOCK) * BLOCK
    return start, inner_start, tl.maximum(inner_stop // BLOCK * BLOCK, inner_start), stop


@triton.jit
def query_range(first, last, num_queries, BLOCK: tl.constexpr, RULES: tl.constexpr):
    """Which queries may attend to the keys `first` to `last`, as `key_range` says it of keys.

    The first query is at position 0.
    """
    start, stop = zero(num_queries), num_queries
    inner_start, inner_stop = zero(num_queries), num_queries
    LEFT: tl.constexpr = RULES.left
    if LEFT >= 0:
        stop = tl.minimum(stop, last + LEFT + 1)
        inner_stop = tl.minimum(inner_stop, first + LEFT + 1)
    if RULES.causal:
        start = first
        inner_start = last
    RIGHT: tl.constexpr = RULES.right
    if RIGHT >= 0:
        start = tl.maximum(start, first - RIGHT)
        inner_start = tl.maximum(inner_start, last - RIGHT)
    if RULES.offset:  # keys may be before the first query
        start, inner_start = tl.maximum(start, 0), tl.maximum(inner_start, 0)
    start = start // BLOCK * BLOCK
    inner_start = tl.cdiv(inner_start, BLOCK) * BLOCK
    return start, inner_start, tl.maximum(inner_stop // BLOCK * BLOCK, inner_start), stop


@triton.jit
def position_of(offsets_ptr, batch, RULES: tl.constexpr):
    """The position of query 0."""
    if RULES.offset:
        return tl.load(offsets_ptr + batch)
    else:
        return 0


@triton.jit
def load_rows(pointers, rows, stop, WHOLE: tl.constexpr, RULES: tl.constexpr):
    """Loads a tile of vectors, (rows, features): 0 beyond row `stop` and beyond feature H.

    `WHOLE` promises that all rows are before `stop`.
    """
    H: tl.constexpr = RULES.head_dim
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
def store_rows(pointers, tile, rows, stop, RULES: tl.constexpr):
    """Stores a tile of vectors in the type of the pointers, up to row `stop` and feature H."""
    H: tl.constexpr = RULES.head_dim
    PADDED: tl.constexpr = pointers.shape[1]
    inside = (rows < stop)[:, None]
    if PADDED != H:
        inside = inside & (tl.arange(0, PADDED) < H)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def may_attend(rows, columns, key_stop, row_segments, column_segments, RULES: tl.constexpr):
    """Who may attend to whom in a tile; positions of rows and columns broadcast to each other.

    So do their segments. Rows beyond the last query attend by position: what they give is not
    stored.
    """
    allowed = columns < key_stop
    if RULES.causal:
        allowed = allowed & (columns <= rows)
    LEFT: tl.constexpr = RULES.left
    if LEFT >= 0:
        allowed = allowed & (columns >= rows - LEFT)
    RIGHT: tl.constexpr = RULES.right
    if RIGHT >= 0:
        allowed = allowed & (columns <= rows + RIGHT)
    if RULES.segments:
        allowed = allowed & (row_segments == column_segments)
    return allowed


@triton.jit
def within_segments(bounds_ptr, batch, tile, num_tiles, start, stop, RULES: tl.constexpr):
    """Narrows [start, stop) to the blocks that share a segment with the tile: (B, tiles, 2)."""
    if RULES.segments:
        bounds_ptr += (batch * num_tiles + tile) * 2
        start = tl.maximum(start, tl.load(bounds_ptr))
        stop = tl.minimum(stop, tl.load(bounds_ptr + 1))
    return start, stop


@triton.jit
def load_mask(mask_ptr, rows, columns, row_stride, column_stride, num_rows, num_columns):
    """A tile of the mask, True = attend; False outside of it."""
    inside = (rows < num_rows) & (columns < num_columns)
    offsets = rows.to(tl.int64) * row_stride + columns * column_stride
    return tl.load(mask_ptr + offsets, mask=inside, other=0) != 0

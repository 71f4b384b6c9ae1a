"""Attention to a cache by Triton kernels: what surrounds them, and their sizes.

Where keys are split, a second kernel puts the parts together.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from rbf_jax.ops.call import Inputs, Masking, Rules
from rbf_jax.ops.decode import xla
from rbf_jax.ops.gpu import device, program
from rbf_jax.ops.gpu.context import setting
from rbf_jax.ops.gpu.program import numbers_per_head
from rbf_jax.ops.gpu.triton import launch
from rbf_jax.ops.gpu.triton.config import Tiles, padded_head_dim, shared_memory_limit

SUPPORTS = frozenset(
    {
        *("left", "right", "num_global_keys", "sink", "return_residual"),
        *("key_lengths", "alibi_slopes", "query_offset"),
    }
)
# Of the queries of a program; with more it runs out of registers.
_LARGEST_QUERY_BYTES = 2**14
# A program has at most so many keys: rows may be of different lengths, and a program that is left
# alone is slow.
_MOST_KEYS = 8192
_MOST_SPLITS = 128
# What a multiprocessor must have under way, in bytes, to keep its share of memory busy.
_UNDER_WAY = 75_000
# What `_num_splits` weighs, in bytes that a multiprocessor could have read: the start of a program,
# the merge. With the number above they have docs/measurements/decode_sweep_gpu.json, of an H100, in
# its order.
_START, _MERGE = 13_000, 65_000
# Costs within this factor are alike to it; then fewer programs are better.
_ALIKE = 1.02
# A multiprocessor holds no more programs than this: they have too many registers.
_MOST_RESIDENT = 4
# Features of a row that a program of the merge does.
_MERGED_FEATURES = 32


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How the kernel is cut and compiled.

    Attributes:
      tiles: `block_q` rows, which are query heads of a group times new tokens, `block_k` keys;
        `heads_at_once` has no meaning here and must be 1.
      num_splits: programs that share the keys of a head, 1 to 128.
    """

    tiles: Tiles
    num_splits: int

    def __post_init__(self):
        if not 1 <= self.num_splits <= _MOST_SPLITS:
            raise ValueError(f"num_splits={self.num_splits} must be from 1 to {_MOST_SPLITS}.")
        if self.tiles.heads_at_once != 1:
            raise ValueError(f"heads_at_once={self.tiles.heads_at_once} must be 1.")


_in_use: contextvars.ContextVar[Sizes | None] = contextvars.ContextVar(
    "rbf_jax_triton_decode_sizes", default=None
)


def use_sizes(sizes: Sizes) -> contextlib.AbstractContextManager[None]:
    """Sets the sizes of programs that are traced within this context."""
    return setting(_in_use, sizes)


def choose_sizes(
    *,
    heads: int,
    rows: int,
    visible: int,
    head_dim: int,
    dtype: jnp.dtype,
    target: device.Target,
) -> Sizes:
    """Returns the sizes where `use_sizes` sets none.

    Args:
      heads: B·K.
      rows: T·N/K.
      visible: the most keys that a row of the batch sees.
      head_dim: H.
      dtype: of the cache.
      target: the GPU.
    """
    row_bytes = padded_head_dim(head_dim) * dtype.itemsize
    block_q = min(max(16, _power_of_two(rows)), 64, _LARGEST_QUERY_BYTES // row_bytes)
    block_k, num_stages = 64, 3
    # Two programs to a multiprocessor: one loads while the other computes.
    limit = shared_memory_limit(target.compute_capability) // 2
    while 2 * block_k * row_bytes * num_stages > limit and num_stages > 2:
        block_k, num_stages = (block_k // 2, num_stages) if block_k > 16 else (block_k, 2)
    # A stage less than there are is in memory; and queries and weights are.
    block_bytes = 2 * block_k * row_bytes
    under_way = block_bytes * (num_stages - 1)
    processors = _Processors(
        target.num_multiprocessors,
        resident=min(max(1, 2 * limit // (under_way + 8192)), _MOST_RESIDENT),
        busy=_UNDER_WAY / under_way,
    )
    programs, blocks = heads * _cdiv(rows, block_q), _cdiv(visible, block_k)
    splits = _num_splits(programs, blocks, block_bytes, _cdiv(visible, _MOST_KEYS), processors)
    # More rows, or the parts of float32, do not fit into the registers of two.
    num_warps = 2 if block_q == 16 and dtype.itemsize == 2 else 4
    return Sizes(Tiles(block_q, block_k, num_warps, num_stages), splits)


class _Processors(NamedTuple):
    """The multiprocessors of a GPU.

    Attributes:
      number: of them.
      resident: the most programs that one of them holds.
      busy: how many programs of one of them keep its share of memory busy.
    """

    number: int
    resident: int
    busy: float


def _num_splits(
    programs: int, blocks: int, block_bytes: int, least: int, processors: _Processors
) -> int:
    """How many programs, `least` or more, are to share the blocks of keys that one would read.

    They come in waves. Memory bounds a wave, which takes as long as what its fullest multiprocessor
    reads; where too few programs are left to keep memory busy, as long as if there were enough.
    """
    number, resident, busy = processors

    def cost(splits: int) -> float:
        full, left = divmod(programs * splits, number * resident)
        waves = [resident] * full + [_cdiv(left, number)] * (left > 0)
        length = _cdiv(blocks, splits) * block_bytes + _START
        return sum(max(wave, busy) for wave in waves) * length + (_MERGE if splits > 1 else 0)

    most = min(blocks, _MOST_SPLITS)
    costs = {splits: cost(splits) for splits in range(min(least, most), most + 1)}
    enough = _ALIKE * min(costs.values())
    return next(splits for splits in costs if costs[splits] <= enough)


def unsupported(inputs: Inputs, rules: Rules) -> str | None:
    """Returns why this call cannot be done here, as the rest of a sentence, or None if it can."""
    del rules
    reason = launch.unsupported(inputs.query)
    if reason is not None:
        return reason
    S, H = inputs.key.shape[2:]
    if S * H >= 2**31:
        return f"supports less than 2³¹ numbers in the keys of a head, not {S} × {H}"
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All static choices of a call; hashable, since compiled programs are kept by it."""

    rules: Rules
    sizes: Sizes | None
    target: device.Target


def _attend(inputs: Inputs, masking: Masking, rules: Rules) -> tuple[jax.Array, jax.Array]:
    """Returns the output and the logsumexp of a call that `decode.api` has put together."""
    plan = _Plan(rules.for_kernels(masking), _in_use.get(), device.target())
    return program.decode(_kernels, plan, inputs, masking)


def _forward(inputs: Inputs, masking: Masking, rules: Rules):
    return _attend(inputs, masking, rules), (inputs, masking)


def _backward(rules: Rules, residuals, cotangents):
    _, vjp = jax.vjp(lambda inputs, masking: xla.attend(inputs, masking, rules), *residuals)
    return vjp(cotangents)


# The gradient is that of "xla": generation needs none.
attend = jax.custom_vjp(_attend, nondiff_argnums=(2,))
attend.defvjp(_forward, _backward)


def _kernels(plan: _Plan, inputs: Inputs, masking: Masking) -> tuple[jax.Array, jax.Array]:
    from rbf_jax.ops.decode import triton_kernels
    from rbf_jax.ops.gpu.triton.tile import Heads

    B, T, N, H = inputs.query.shape
    K, S = inputs.key.shape[1:3]
    R, window = plan.rules.num_global_keys, plan.rules.left
    rules = (
        plan.rules if window is None else dataclasses.replace(plan.rules, left=min(window, 2**30))
    )
    rows = T * N // K
    sizes = plan.sizes or choose_sizes(
        heads=B * K,
        rows=rows,
        visible=S if window is None else min(S, R + window + T),
        head_dim=H,
        dtype=inputs.query.dtype,
        target=plan.target,
    )
    splits, tiles = sizes.num_splits, sizes.tiles
    per_head, norms = numbers_per_head(inputs, masking), inputs.squared_key_norms()
    places = cast(list[jax.Array], [masking.query_offset, masking.key_lengths])  # always given
    arrays = [*inputs[:3], norms, *places, per_head]
    part_dtype = inputs.query.dtype if splits == 1 else jnp.float32
    out, logsumexp = launch.run(
        triton_kernels.decode_kernel,
        [*arrays, S, per_head.shape[1] * N if per_head.shape[0] > 1 else 0, splits],
        [
            jax.ShapeDtypeStruct((B, T, N, splits, H), part_dtype),
            jax.ShapeDtypeStruct((B, T, N, splits), jnp.float32),
        ],
        programs=B * K * splits * _cdiv(rows, tiles.block_q),
        constants={
            "RULES": rules,
            "HEADS": Heads(N, K, H),
            "QUERIES": T,
            "BLOCK_Q": tiles.block_q,
            "BLOCK_K": tiles.block_k,
            "BLOCK_H": padded_head_dim(H),
        },
        tiles=tiles,
    )
    if splits == 1:
        return out[:, :, :, 0], logsumexp[..., 0]
    block_h = min(_MERGED_FEATURES, padded_head_dim(H))
    out, logsumexp = launch.run(
        triton_kernels.merge_kernel,
        [out, logsumexp, splits],
        [
            jax.ShapeDtypeStruct((B, T, N, H), inputs.query.dtype),
            jax.ShapeDtypeStruct((B, T, N), jnp.float32),
        ],
        programs=B * T * N * _cdiv(H, block_h),
        constants={
            "HEAD_DIM": H,
            "BLOCK_SPLITS": _power_of_two(splits),
            "BLOCK_H": block_h,
        },
        tiles=Tiles(16, 16, num_warps=4, num_stages=1),
    )
    return out, logsumexp


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()

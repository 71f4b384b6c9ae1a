"""The backward kernel of queries.

The arithmetic is that of the Triton kernels (`gpu/triton/backward.py`): the weights are made again
from the logits and the logsumexp. One warpgroup loads tiles and the others compute, as in the
forward kernel. No two CTAs add to the same memory, so the result is the same, to the bit, from
run to run. The same holds for the kernel of keys and values, `backward_keys.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rbf_jax.ops.call import Rules
from rbf_jax.ops.gpu.mosaic.common import COLUMNS, ROWS, Lengths, kernel, load, swizzled
from rbf_jax.ops.gpu.mosaic.config import BLOCK_Q, BackwardTiles
from rbf_jax.ops.gpu.mosaic.query_block import QueryBlock, ring_of_keys
from rbf_jax.ops.gpu.program import LN2
from rbf_jax.ops.manual_axes import struct_like


class _QueriesMemory(NamedTuple):
    """Shared memory and barriers of `queries`: their types, and in the kernel the refs."""

    query: Any  # (consumers, block_q, H), later the gradient
    dout: Any  # (consumers, block_q, H)
    key: Any  # (stages, block_k, H)
    value: Any
    norms: Any  # float32 (stages, block_k)
    rows: Any  # float32 (2, consumers, block_q): the logsumexp and δ; the former later q·dq
    rows_loaded: Any
    key_loaded: Any
    value_loaded: Any
    key_free: Any
    value_free: Any


def queries(
    inputs: list[jax.Array],
    rows: list[jax.Array],
    *,
    rules: Rules,
    true_lengths: Lengths,
    tiles: BackwardTiles,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel for the gradient of the queries.

    Args:
      inputs: the arrays of `forward.forward`.
      rows: dout (B, T, N, H), the logsumexp in base 2 and δ, float32 (B, N, T'), T' a multiple of
        the queries of a CTA.
      rules: as in the forward pass.
      true_lengths: T and S of the call.
      tiles: sizes.

    Returns:
      dq, (B, T, N, H), and q·dq, float32 (B, N, T').
    """
    query, logsumexp = inputs[0], rows[1]
    B, T, N, _ = query.shape
    num_tiles = -(-T // tiles.rows)
    consumers = tiles.consumers

    def rbf_attention_queries(*refs):
        memory = _QueriesMemory(*refs[11:])
        block = _QueriesBlock(
            [*refs[:6], *refs[9:11]], memory, rules, true_lengths, tiles, num_tiles
        )
        pl.when(block.warpgroup < consumers)(lambda: block.at(0).differentiate(refs[6:9]))
        pl.when(block.warpgroup == consumers)(block.load)

    results = [
        struct_like(query.shape, query.dtype, query),
        struct_like(logsumexp.shape, jnp.float32, query),
    ]
    call = kernel(
        rbf_attention_queries, results, memory_of(query, tiles), (N, num_tiles, B), consumers
    )
    return tuple(call(*inputs, *rows))


def memory_of(query: jax.Array, tiles: BackwardTiles) -> _QueriesMemory:
    """Returns the types of what a CTA has in shared memory, for queries and keys (..., H)."""
    consumers = tiles.consumers
    return _QueriesMemory(
        query=swizzled(query, consumers, BLOCK_Q),
        dout=swizzled(query, consumers, BLOCK_Q),
        rows=plgpu.SMEM((2, consumers, BLOCK_Q), jnp.float32),
        rows_loaded=plgpu.Barrier(num_arrivals=4, num_barriers=consumers),
        **ring_of_keys(query, tiles),
    )


class _QueriesBlock(QueryBlock):
    """A CTA of `queries`; it loads what the forward kernel loads."""

    def differentiate(self, rows) -> None:
        """A warpgroup that computes: its tile of dq."""
        plgpu.set_max_registers(self.tiles.registers[0], action="increase")
        memory, mine = self.memory, self.warpgroup
        dout, logsumexp, delta = rows
        where = pl.ds(self.first_row, BLOCK_Q)
        vectors, numbers = (self.batch, where, self.head), (self.batch, self.head, where)
        loaded = memory.rows_loaded.at[mine]
        plgpu.copy_gmem_to_smem(self.query.at[vectors], memory.query.at[mine], loaded)
        plgpu.copy_gmem_to_smem(dout.at[vectors], memory.dout.at[mine], loaded)
        plgpu.copy_gmem_to_smem(logsumexp.at[numbers], memory.rows.at[0, mine], loaded)
        plgpu.copy_gmem_to_smem(delta.at[numbers], memory.rows.at[1, mine], loaded)
        plgpu.barrier_wait(loaded)
        per_row = [load(memory.rows.at[i, mine], ROWS) for i in range(2)]
        if self.rules.has_query_lengths:
            inside = self.row_indices() < self.query_stop
            per_row[0] = jnp.where(inside, per_row[0], jnp.inf)
        shape = (BLOCK_Q, self.head_dim)
        dq = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

        def section(begin, end, dq, whole):
            return lax.fori_loop(
                begin, end, lambda block, dq: self._add(block, dq, per_row, whole), dq
            )

        _, start, inner_start, inner_stop, stop = self.blocks
        if self.rules.left is not None:
            dq = section(start, inner_start, dq, False)
        dq = section(inner_start, inner_stop, dq, True)
        if self.has_rest():
            dq = section(inner_stop, stop, dq, False)
        dq *= self.numbers[0][...] * LN2
        query = load(memory.query.at[mine], plgpu.Layout.WGMMA)
        memory.rows[0, mine] = jnp.sum(query.astype(jnp.float32) * dq, axis=1)
        memory.query[mine] = dq.astype(self.out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory.query.at[mine], self.out.at[vectors])
        plgpu.copy_smem_to_gmem(memory.rows.at[0, mine], self.logsumexp.at[numbers])
        plgpu.wait_smem_to_gmem(0)

    def _add(self, block, dq, per_row, whole):
        """Adds what a block of keys gives to Σ_j dS_ij k_j."""
        memory = self.memory
        slot = self.slot(block - self.blocks.start)
        shape = (BLOCK_Q, self.tiles.block_k)
        logsumexp, delta = (lax.broadcast_in_dim(x, shape, [0]) for x in per_row)
        plgpu.barrier_wait(memory.key_loaded.at[slot])
        norms = load(memory.norms.at[slot], COLUMNS)
        key = memory.key.at[slot].transpose((1, 0))
        dots = product(memory.query.at[self.warpgroup], key, shape)
        scale, weight = self.numbers[0][...], self.numbers[1][...]
        logits = dots * scale - lax.broadcast_in_dim(norms * weight, shape, [1])
        weights = jnp.exp2(self.with_rules(logits, block, whole) - logsumexp)
        plgpu.barrier_wait(memory.value_loaded.at[slot])
        value = memory.value.at[slot].transpose((1, 0))
        dweights = product(memory.dout.at[self.warpgroup], value, shape)
        plgpu.barrier_arrive(memory.value_free.at[slot])
        dlogits = (weights * (dweights - delta)).astype(self.key.dtype)

        def add(acc):
            plgpu.wgmma(acc, dlogits, memory.key.at[slot])

        dq = pl.run_state(add)(plgpu.ACC.init(dq))
        plgpu.barrier_arrive(memory.key_free.at[slot])
        return dq


def product(a, b, shape) -> jax.Array:
    """The float32 product of two tiles in shared memory."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

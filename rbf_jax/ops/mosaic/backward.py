"""The backward kernels: the gradient of the queries, then those of keys and values.

The arithmetic is that of the Triton kernels (`ops/triton/backward.py`): both make the weights again
from the logits and the logsumexp. In each one warpgroup loads tiles and the others compute, as in
the forward kernel. No two blocks add to the same memory, so the result is the same, to the bit,
from run to run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rbf_jax.ops.mosaic.forward import (
    COLUMNS,
    ROWS,
    Block,
    Rules,
    blocks_of,
    extent,
    kernel,
    near_enough,
    swizzled,
)
from rbf_jax.ops.mosaic.tiles import Tiles

_LN2 = 0.6931471805599453


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
    inputs: list[jax.Array], rows: list[jax.Array], *, rules: Rules, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel for the gradient of the queries.

    Args:
      inputs: the arrays of `forward.forward`.
      rows: dout (B, T, N, H), the logsumexp in base 2 and δ, float32 (B, N, T'), T' a multiple of
        the queries of a block of threads.
      rules: as in the forward pass.
      tiles: sizes.

    Returns:
      dq, (B, T, N, H), and q·dq, float32 (B, N, T').
    """
    query, logsumexp = inputs[0], rows[1]
    B, T, N, _ = query.shape
    num_tiles = -(-T // tiles.rows)
    stages, consumers = tiles.stages, tiles.consumers
    memory = _QueriesMemory(
        query=swizzled(query, consumers, tiles.block_q),
        dout=swizzled(query, consumers, tiles.block_q),
        key=swizzled(query, stages, tiles.block_k),
        value=swizzled(query, stages, tiles.block_k),
        norms=plgpu.SMEM((stages, tiles.block_k), jnp.float32),
        rows=plgpu.SMEM((2, consumers, tiles.block_q), jnp.float32),
        rows_loaded=plgpu.Barrier(num_arrivals=4, num_barriers=consumers),
        key_loaded=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        value_loaded=plgpu.Barrier(num_barriers=stages),
        key_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        value_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    )

    def rbf_attention_queries(*refs):
        memory = _QueriesMemory(*refs[11:])
        block = _QueriesBlock([*refs[:6], *refs[9:11]], memory, rules, tiles, num_tiles)
        pl.when(block.warpgroup < consumers)(lambda: block.differentiate(refs[6:9]))
        pl.when(block.warpgroup == consumers)(block.load)

    results = [
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct(logsumexp.shape, jnp.float32),
    ]
    call = kernel(rbf_attention_queries, results, memory, (N, num_tiles, B), consumers)
    return tuple(call(*inputs, *rows))


class _QueriesBlock(Block):
    """A block of threads of `queries`; it loads what the forward kernel loads."""

    def differentiate(self, rows) -> None:
        """A warpgroup that computes: its tile of dq."""
        plgpu.set_max_registers(self.tiles.registers[0], action="increase")
        memory, mine = self.memory, self.warpgroup
        dout, logsumexp, delta = rows
        where = pl.ds(self.first_row, self.tiles.block_q)
        vectors, numbers = (self.batch, where, self.head), (self.batch, self.head, where)
        loaded = memory.rows_loaded.at[mine]
        plgpu.copy_gmem_to_smem(self.query.at[vectors], memory.query.at[mine], loaded)
        plgpu.copy_gmem_to_smem(dout.at[vectors], memory.dout.at[mine], loaded)
        plgpu.copy_gmem_to_smem(logsumexp.at[numbers], memory.rows.at[0, mine], loaded)
        plgpu.copy_gmem_to_smem(delta.at[numbers], memory.rows.at[1, mine], loaded)
        plgpu.barrier_wait(loaded)
        per_row = [plgpu.load(memory.rows.at[i, mine], (), layout=ROWS) for i in range(2)]
        if self.rules.query_lengths:
            inside = self.row_indices() < self.query_stop
            per_row[0] = jnp.where(inside, per_row[0], jnp.inf)
        shape = (self.tiles.block_q, self.head_dim)
        dq = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

        def section(begin, end, dq, whole):
            return lax.fori_loop(
                begin, end, lambda block, dq: self._add(block, dq, per_row, whole), dq
            )

        start, inner_start, inner_stop, stop = self.blocks
        if self.rules.left is not None:
            dq = section(start, inner_start, dq, False)
        dq = section(inner_start, inner_stop, dq, True)
        if self.has_rest():
            dq = section(inner_stop, stop, dq, False)
        dq *= self.numbers[0][...] * _LN2
        query = plgpu.load(memory.query.at[mine], (), layout=plgpu.Layout.WGMMA)
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
        shape = (self.tiles.block_q, self.tiles.block_k)
        logsumexp, delta = (lax.broadcast_in_dim(x, shape, [0]) for x in per_row)
        plgpu.barrier_wait(memory.key_loaded.at[slot])
        norms = plgpu.load(memory.norms.at[slot], (), layout=COLUMNS)
        key = plgpu.transpose_ref(memory.key.at[slot], (1, 0))
        dots = product(memory.query.at[self.warpgroup], key, shape)
        scale, weight = self.numbers[0][...], self.numbers[1][...]
        logits = dots * scale - lax.broadcast_in_dim(norms * weight, shape, [1])
        weights = jnp.exp2(self.with_rules(logits, block, whole) - logsumexp)
        plgpu.barrier_wait(memory.value_loaded.at[slot])
        value = plgpu.transpose_ref(memory.value.at[slot], (1, 0))
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


class _KeysMemory(NamedTuple):
    """Shared memory and barriers of `keys`: their types, and in the kernel the refs."""

    key: Any  # (consumers, block_k, H), later the gradients
    value: Any
    columns: Any  # float32 (consumers, block_k): the norms, later column sums
    query: Any  # (stages, block_q, H)
    dout: Any
    rows: Any  # float32 (2, stages, block_q): the logsumexp and δ
    key_loaded: Any
    query_loaded: Any
    dout_loaded: Any
    query_free: Any
    dout_free: Any


def keys(
    inputs: list[jax.Array], rows: list[jax.Array], *, rules: Rules, tiles: Tiles
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the kernel for the gradients of keys and values.

    Args:
      inputs: the arrays of `forward.forward`.
      rows: as `queries` takes them.
      rules: as in the forward pass.
      tiles: sizes; `block_k` is the number of keys of a consumer, `block_q` of queries of a step.

    Returns:
      dk and dv, (B, S, K, H), and Σ_i dS_ij, float32 (B, N, S') with S' a multiple of the keys of a
      block of threads.
    """
    key = inputs[1]
    B, S, K, _ = key.shape
    N = inputs[0].shape[2]
    stages, consumers = tiles.stages, tiles.consumers
    num_tiles = -(-S // tiles.keys)
    memory = _KeysMemory(
        key=swizzled(key, consumers, tiles.block_k),
        value=swizzled(key, consumers, tiles.block_k),
        columns=plgpu.SMEM((consumers, tiles.block_k), jnp.float32),
        query=swizzled(key, stages, tiles.block_q),
        dout=swizzled(key, stages, tiles.block_q),
        rows=plgpu.SMEM((2, stages, tiles.block_q), jnp.float32),
        key_loaded=plgpu.Barrier(num_arrivals=3, num_barriers=consumers),
        query_loaded=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        dout_loaded=plgpu.Barrier(num_barriers=stages),
        query_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        dout_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    )

    def rbf_attention_keys(*refs):
        block = _KeysBlock(refs[:9], refs[9:12], _KeysMemory(*refs[12:]), rules, tiles)
        pl.when(block.warpgroup < consumers)(block.differentiate)
        pl.when(block.warpgroup == consumers)(block.load)

    results = [
        jax.ShapeDtypeStruct(key.shape, key.dtype),
        jax.ShapeDtypeStruct(key.shape, key.dtype),
        jax.ShapeDtypeStruct((B, N, num_tiles * tiles.keys), jnp.float32),
    ]
    call = kernel(rbf_attention_keys, results, memory, (K, num_tiles, B), consumers)
    return tuple(call(*inputs, *rows))


class _KeysBlock:
    """A block of threads of `keys`, and what its warpgroups do."""

    def __init__(self, arrays, outputs, memory: _KeysMemory, rules: Rules, tiles: Tiles):
        self.query, self.key, self.value, self.norms, self.per_head, lengths = arrays[:6]
        self.dout, self.logsumexp, self.delta = arrays[6:]
        self.outputs, self.memory, self.rules, self.tiles = outputs, memory, rules, tiles
        self.head_dim = self.key.shape[-1]
        self.group = self.query.shape[2] // self.key.shape[2]
        self.warpgroup = lax.axis_index("warpgroup")
        self.batch, self.key_head = lax.axis_index("batch"), lax.axis_index("heads")
        first = lax.axis_index("tiles") * tiles.keys
        self.first_column = first + self.warpgroup * tiles.block_k
        self.query_stop, self.key_stop, self.offset = extent(rules, lengths, self.batch)
        self.set = self.batch if self.per_head.shape[0] > 1 else 0
        self.start, self.stop = self._visited(first)
        self.steps = self.stop - self.start

    def _visited(self, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The blocks of queries that may attend to the block's keys, from `first`."""
        rules, size = self.rules, jnp.int32(self.tiles.block_q)
        last = first + self.tiles.block_k * self.tiles.consumers - 1
        start, stop = jnp.int32(0), self.query_stop
        if rules.left is not None:
            stop = jnp.minimum(stop, last - self.offset + rules.left + 1)
        if rules.causal:
            start = jnp.maximum(start, first - self.offset)
        if rules.right is not None:
            start = jnp.maximum(start, first - self.offset - rules.right)
        stop = blocks_of(jnp.maximum(stop, 0), size)
        stop = jnp.where(first < self.key_stop, stop, 0)
        return jnp.minimum(lax.div(start, size), stop), stop

    def _slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.tiles.stages))

    def load(self) -> None:
        """The warpgroup that loads queries, dout and what belongs to them."""
        plgpu.set_max_registers(self.tiles.registers[1], action="decrease")
        memory, stages = self.memory, self.tiles.stages
        total = self.group * self.steps

        def wait(barriers, step):
            plgpu.barrier_wait(barriers.at[self._slot(step)])

        @pl.loop(0, total)
        def _step(step):
            head = self.key_head * self.group + lax.div(step, self.steps)
            block = self.start + lax.rem(step, self.steps)
            rows = pl.ds(block * self.tiles.block_q, self.tiles.block_q)
            vectors, numbers = (self.batch, rows, head), (self.batch, head, rows)
            slot, full = self._slot(step), step >= stages
            pl.when(full)(lambda: wait(memory.query_free, step))
            loaded = memory.query_loaded.at[slot]
            plgpu.copy_gmem_to_smem(self.query.at[vectors], memory.query.at[slot], loaded)
            plgpu.copy_gmem_to_smem(self.logsumexp.at[numbers], memory.rows.at[0, slot], loaded)
            plgpu.copy_gmem_to_smem(self.delta.at[numbers], memory.rows.at[1, slot], loaded)
            pl.when(full)(lambda: wait(memory.dout_free, step))
            loaded = memory.dout_loaded.at[slot]
            plgpu.copy_gmem_to_smem(self.dout.at[vectors], memory.dout.at[slot], loaded)

        @pl.loop(jnp.maximum(total - stages, 0), total)
        def _all_is_read(step):
            wait(memory.query_free, step)
            wait(memory.dout_free, step)

    def differentiate(self) -> None:
        """A warpgroup that computes: its tiles of dk and dv, and its column sums."""
        plgpu.set_max_registers(self.tiles.registers[0], action="increase")
        memory, mine = self.memory, self.warpgroup
        dkey, dvalue, column_sums = self.outputs
        columns = pl.ds(self.first_column, self.tiles.block_k)
        tile, loaded = (self.batch, columns, self.key_head), memory.key_loaded.at[mine]
        plgpu.copy_gmem_to_smem(self.key.at[tile], memory.key.at[mine], loaded)
        plgpu.copy_gmem_to_smem(self.value.at[tile], memory.value.at[mine], loaded)
        norms = self.norms.at[self.batch, self.key_head, columns]
        plgpu.copy_gmem_to_smem(norms, memory.columns.at[mine], loaded)
        plgpu.barrier_wait(loaded)
        norms = plgpu.load(memory.columns.at[mine], (), layout=ROWS)
        shape = (self.tiles.block_k, self.head_dim)
        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        row = plgpu.layout_cast(jnp.zeros(shape[:1], jnp.float32), ROWS)
        scales, weights, _ = (self.per_head.at[self.set, i] for i in range(3))

        def one_head(member, carry):
            """dk is in units of the scale of the head at hand."""
            dk, dv, norm_part, old_scale = carry
            head = self.key_head * self.group + member
            scale, weight = scales[head], weights[head]
            dk *= old_scale / scale

            def step(block, state):
                return self._add(member * self.steps, block, head, norms * weight, state)

            dk, dv, sums = lax.fori_loop(self.start, self.stop, step, (dk, dv, row))
            memory.columns[mine] = sums
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                memory.columns.at[mine], column_sums.at[self.batch, head, columns]
            )
            plgpu.wait_smem_to_gmem(0)
            return dk, dv, norm_part + sums * (2 * _LN2 * weight), scale

        first = scales[self.key_head * self.group]
        carry = (zeros, zeros, row, first)
        dk, dv, norm_part, scale = lax.fori_loop(0, self.group, one_head, carry)
        key = plgpu.load(memory.key.at[mine], (), layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        dk = dk * (scale * _LN2) - lax.broadcast_in_dim(norm_part, shape, [0]) * key
        memory.key[mine] = dk.astype(dkey.dtype)
        memory.value[mine] = dv.astype(dvalue.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory.key.at[mine], dkey.at[tile])
        plgpu.copy_smem_to_gmem(memory.value.at[mine], dvalue.at[tile])
        plgpu.wait_smem_to_gmem(0)

    def _add(self, steps_before, block, head, weighted_norms, state):
        """Adds a block of queries; tiles of logits are transposed, (keys, queries)."""
        dk, dv, sums = state
        memory, mine = self.memory, self.warpgroup
        slot = self._slot(steps_before + block - self.start)
        shape = (self.tiles.block_k, self.tiles.block_q)
        plgpu.barrier_wait(memory.query_loaded.at[slot])
        logsumexp, delta = (
            plgpu.load(memory.rows.at[i, slot], (), layout=COLUMNS) for i in range(2)
        )
        query = plgpu.transpose_ref(memory.query.at[slot], (1, 0))
        dots = product(memory.key.at[mine], query, shape)
        logits = dots * self.per_head[self.set, 0, head]
        logits -= lax.broadcast_in_dim(weighted_norms, shape, [0])
        logits = self._with_rules(logits, block, head)
        weights = jnp.exp2(logits - lax.broadcast_in_dim(logsumexp, shape, [1]))
        plgpu.barrier_wait(memory.dout_loaded.at[slot])
        dout = plgpu.transpose_ref(memory.dout.at[slot], (1, 0))
        dweights = product(memory.value.at[mine], dout, shape)
        dlogits = weights * (dweights - lax.broadcast_in_dim(delta, shape, [1]))
        sums += jnp.sum(dlogits, axis=1)
        weights = weights.astype(self.value.dtype)
        dlogits = dlogits.astype(self.value.dtype)

        def add(accumulators):
            plgpu.wgmma(accumulators[0], dlogits, memory.query.at[slot])
            plgpu.wgmma(accumulators[1], weights, memory.dout.at[slot])

        dk, dv = pl.run_state(add)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))
        plgpu.barrier_arrive(memory.query_free.at[slot])
        plgpu.barrier_arrive(memory.dout_free.at[slot])
        return dk, dv, sums

    def _with_rules(self, logits, block, head):
        rules = self.rules
        columns, rows = (
            plgpu.broadcasted_iota(jnp.int32, logits.shape, axis, layout=plgpu.Layout.WGMMA)
            for axis in (0, 1)
        )
        columns, rows = columns + self.first_column, rows + block * self.tiles.block_q
        allowed = (columns < self.key_stop) & (rows < self.query_stop)
        rows += self.offset
        if rules.slopes:
            slope = self.per_head[self.set, 2, head]
            logits -= jnp.abs(rows - columns).astype(jnp.float32) * slope
        return jnp.where(near_enough(rules, allowed, rows, columns), logits, -jnp.inf)

"""A block of threads that has a tile of keys in registers, as the backward kernels of keys have.

Tiles of logits are transposed, (keys, queries), so that weights are a first operand of the products
that follow as they are, in registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rbf_jax.ops.gpu.mosaic.common import (
    COLUMNS,
    ROWS,
    Blocks,
    Rules,
    blocks_of,
    extent,
    load,
    near_enough,
    sum_of_eights,
    swizzled,
    tile_indices,
)
from rbf_jax.ops.gpu.mosaic.config import Tiles
from rbf_jax.ops.gpu.program import LN2
from rbf_jax.ops.parallel.manual_axes import struct_like


class KeyMemory(NamedTuple):
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


class _State(NamedTuple):
    """What a warpgroup has of its keys; dk is in units of the scale of the head at hand."""

    dkey: jax.Array  # float32 (block_k, H)
    dvalue: jax.Array
    sums: jax.Array  # float32 (block_k, 8): Σ_i dS_ij in parts


class Head(NamedTuple):
    """A query head, and its numbers."""

    number: jax.Array
    scale: jax.Array
    weighted_norms: jax.Array  # float32 (block_k,)
    slope: jax.Array


def results_and_grid(
    inputs: list[jax.Array], tiles: Tiles
) -> tuple[list[jax.ShapeDtypeStruct], tuple[int, int, int]]:
    """The types of what `keys` returns, and its blocks of threads by heads, tiles and batch."""
    key = inputs[1]
    B, S, K, _ = key.shape
    num_tiles = -(-S // tiles.keys)
    gradient = struct_like(key.shape, key.dtype, key)
    sums = struct_like((B, inputs[0].shape[2], num_tiles * tiles.keys), jnp.float32, key)
    return [gradient, gradient, sums], (K, num_tiles, B)


def memory_of(key: jax.Array, tiles: Tiles) -> KeyMemory:
    """The types of what a block of threads has in shared memory."""
    stages, consumers = tiles.stages, tiles.consumers
    return KeyMemory(
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


def hidden(*numbers: jax.Array) -> tuple[jax.Array, ...]:
    """The numbers, unknown to the compiler.

    What it makes of known ones, as descriptors of tiles, it makes before the loop and then has no
    registers for it.
    """
    return tuple(lax.optimization_barrier(numbers))


class KeyBlock:
    """A block of threads, and what its warpgroups do.

    A step is a number of tiles of queries, `tiles_at_once`.
    """

    tiles_at_once = 1

    def __init__(self, arrays, outputs, memory: KeyMemory, rules: Rules, tiles: Tiles):
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
        self.steps = self._visited(first)
        self.num_steps = self.steps.stop - self.steps.start

    def run(self) -> None:
        """What the warpgroup at hand does."""
        pl.when(self.warpgroup < self.tiles.consumers)(self.differentiate)
        pl.when(self.warpgroup == self.tiles.consumers)(self.load)

    def _visited(self, first: jax.Array) -> Blocks:
        """The steps whose queries may attend to the block's keys, from `first`."""
        rules, size = self.rules, jnp.int32(self.tiles.block_q * self.tiles_at_once)
        end = first + self.tiles.keys
        # The queries at the positions of the first and of the last key.
        row, last_row = first - self.offset, end - 1 - self.offset
        start, inner_start = jnp.int32(0), jnp.int32(0)
        stop = self.query_stop
        # Beyond the last query the logsumexp is +∞.
        inner_stop = stop if rules.query_lengths else stop + size - 1
        reaches = [0] if rules.causal else []
        if rules.right is not None:
            reaches.append(rules.right)
        for reach in reaches:
            start = jnp.maximum(start, row - reach)
            inner_start = jnp.maximum(inner_start, last_row - reach)
        if rules.left is not None:
            stop = jnp.minimum(stop, last_row + rules.left + 1)
            inner_stop = jnp.minimum(inner_stop, row + rules.left + 1)
        stop = blocks_of(jnp.maximum(stop, 0), size)
        stop = jnp.where(first < self.key_stop, stop, 0)
        start = jnp.minimum(lax.div(start, size), stop)
        inner_start = jnp.clip(blocks_of(inner_start, size), start, stop)
        inner_start = jnp.where(end <= self.key_stop, inner_start, stop)
        inner_stop = lax.div(jnp.maximum(inner_stop, 0), size)
        return Blocks(start, inner_start, jnp.clip(inner_stop, inner_start, stop), stop)

    def _slot(self, tile: jax.Array) -> jax.Array:
        return lax.rem(tile, jnp.int32(self.tiles.stages))

    def load(self) -> None:
        """The warpgroup that loads queries, dout and what belongs to them."""
        plgpu.set_max_registers(self.tiles.registers[1], action="decrease")
        memory, stages = self.memory, self.tiles.stages
        per_head = self.num_steps * self.tiles_at_once
        total = self.group * per_head

        def wait(barriers, tile):
            plgpu.barrier_wait(barriers.at[self._slot(tile)])

        @pl.loop(0, total)
        def _tile(tile):
            head = self.key_head * self.group + lax.div(tile, per_head)
            first = self.steps.start * self.tiles_at_once + lax.rem(tile, per_head)
            rows = pl.ds(first * self.tiles.block_q, self.tiles.block_q)
            vectors, numbers = (self.batch, rows, head), (self.batch, head, rows)
            slot, full = self._slot(tile), tile >= stages
            pl.when(full)(lambda: wait(memory.query_free, tile))
            loaded = memory.query_loaded.at[slot]
            plgpu.copy_gmem_to_smem(self.query.at[vectors], memory.query.at[slot], loaded)
            plgpu.copy_gmem_to_smem(self.logsumexp.at[numbers], memory.rows.at[0, slot], loaded)
            plgpu.copy_gmem_to_smem(self.delta.at[numbers], memory.rows.at[1, slot], loaded)
            pl.when(full)(lambda: wait(memory.dout_free, tile))
            loaded = memory.dout_loaded.at[slot]
            plgpu.copy_gmem_to_smem(self.dout.at[vectors], memory.dout.at[slot], loaded)

        @pl.loop(jnp.maximum(total - stages, 0), total)
        def _all_is_read(tile):
            wait(memory.query_free, tile)
            wait(memory.dout_free, tile)

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
        norms = load(memory.columns.at[mine], ROWS)
        shape = (self.tiles.block_k, self.head_dim)
        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        row = plgpu.layout_cast(jnp.zeros(shape[:1], jnp.float32), ROWS)
        parts = plgpu.layout_cast(jnp.zeros((shape[0], 8), jnp.float32), plgpu.Layout.WGMMA)
        scales, weights, slopes = (self.per_head.at[self.set, i] for i in range(3))

        def one_head(member, carry):
            dk, dv, norm_part, old_scale = carry
            index = self.key_head * self.group + member
            weight = weights[index]
            head = Head(index, scales[index], norms * weight, slopes[index])
            state = _State(dk * (old_scale / head.scale), dv, parts)
            dk, dv, sums = self._all_steps(member, head, state)
            self.after_steps(head)
            sums = jnp.sum(sums, axis=1)
            memory.columns[mine] = sums
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                memory.columns.at[mine], column_sums.at[self.batch, index, columns]
            )
            plgpu.wait_smem_to_gmem(0)
            return dk, dv, norm_part + sums * (2 * LN2 * weight), head.scale

        first = scales[self.key_head * self.group]
        carry = (zeros, zeros, row, first)
        dk, dv, norm_part, scale = lax.fori_loop(0, self.group, one_head, carry)
        key = load(memory.key.at[mine], plgpu.Layout.WGMMA).astype(jnp.float32)
        dk = dk * (scale * LN2) - lax.broadcast_in_dim(norm_part, shape, [0]) * key
        self.before_store()
        memory.key[mine] = dk.astype(dkey.dtype)
        memory.value[mine] = dv.astype(dvalue.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory.key.at[mine], dkey.at[tile])
        plgpu.copy_smem_to_gmem(memory.value.at[mine], dvalue.at[tile])
        plgpu.wait_smem_to_gmem(0)

    def _all_steps(self, member, head: Head, state: _State) -> _State:
        """Goes over the queries of a head."""
        rules = self.rules

        def section(begin, end, state, whole):
            def one(step, state):
                return self.step(
                    member * self.num_steps + step - self.steps.start, step, head, state, whole
                )

            return lax.fori_loop(begin, end, one, state)

        start, inner_start, inner_stop, stop = self.steps
        some_keys = rules.key_lengths or rules.num_keys % self.tiles.keys > 0
        if rules.causal or rules.right is not None or some_keys:
            state = section(start, inner_start, state, False)
        state = section(inner_start, inner_stop, state, True)
        if rules.left is not None or rules.query_lengths:
            state = section(inner_stop, stop, state, False)
        return state

    def step(self, count, step, head: Head, state: _State, whole: bool) -> _State:
        """Adds the queries of a step, `count` steps after the first of all heads."""
        return self.add(self._slot(count), step, head, state, whole)

    def after_steps(self, head: Head) -> None:
        """What is left to do for a head."""

    def before_store(self) -> None:
        """What has to happen before the gradients overwrite keys and values."""

    def add(self, slot, tile, head: Head, state: _State, whole: bool, keep=None) -> _State:
        """Adds a tile of queries; `whole` promises that every pair is allowed.

        `keep` is called with dS, (keys, queries), in the dtype of the keys.
        """
        memory = self.memory
        mine, slot = hidden(self.warpgroup, slot)
        shape = (self.tiles.block_k, self.tiles.block_q)
        query, dout = memory.query.at[slot], memory.dout.at[slot]

        def products(dots, dweights):
            plgpu.barrier_wait(memory.query_loaded.at[slot])
            plgpu.wgmma(dots, memory.key.at[mine], query.transpose((1, 0)))
            plgpu.barrier_wait(memory.dout_loaded.at[slot])
            plgpu.wgmma(dweights, memory.value.at[mine], dout.transpose((1, 0)))
            dots = plgpu.wgmma_accumulator_load(dots, wait_n=1)
            logits = dots * head.scale - lax.broadcast_in_dim(head.weighted_norms, shape, [0])
            logits = self._with_rules(logits, tile, head, whole)
            logsumexp = load(memory.rows.at[0, slot], COLUMNS)
            # Else the compiler moves them behind the second product.
            weights = jnp.exp2(logits - lax.broadcast_in_dim(logsumexp, shape, [1]))
            weights = lax.optimization_barrier(weights)
            return weights, dweights[...]

        accumulator = plgpu.ACC(shape, jnp.float32)
        weights, dweights = pl.run_scoped(products, accumulator, accumulator)

        def add(refs):
            dkey, dvalue, sums = refs
            plgpu.wgmma(dvalue, weights.astype(self.value.dtype), dout)
            delta = load(memory.rows.at[1, slot], COLUMNS)
            dlogits = weights * (dweights - lax.broadcast_in_dim(delta, shape, [1]))
            sums[...] += sum_of_eights(dlogits)
            dlogits = dlogits.astype(self.key.dtype)
            if keep is not None:
                keep(dlogits)
            plgpu.wgmma(dkey, dlogits, query)

        dkey, dvalue, sums = state
        state = _State(*pl.run_state(add)((plgpu.ACC.init(dkey), plgpu.ACC.init(dvalue), sums)))
        plgpu.barrier_arrive(memory.query_free.at[slot])
        plgpu.barrier_arrive(memory.dout_free.at[slot])
        return state

    def _with_rules(self, logits, tile, head: Head, whole: bool) -> jax.Array:
        rules = self.rules
        if whole and not rules.slopes:
            return logits
        first = (self.first_column, tile * self.tiles.block_q)
        columns, rows = tile_indices(logits.shape, *first)
        # Beyond the last query the logsumexp is +∞.
        allowed = columns < (self.key_stop if rules.key_lengths else rules.num_keys)
        if rules.query_lengths:
            allowed &= rows < self.query_stop
        if rules.offset:
            rows += self.offset
        if rules.slopes:
            logits -= jnp.abs(rows - columns).astype(jnp.float32) * head.slope
        if whole:
            return logits
        return jnp.where(near_enough(rules, allowed, rows, columns), logits, -jnp.inf)

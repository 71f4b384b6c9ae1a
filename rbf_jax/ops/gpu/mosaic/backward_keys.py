"""The backward kernel of keys and values, and what the fused kernel shares with it.

A CTA has a tile of keys in registers and goes over the queries; the arithmetic is that of
backward_queries.py.
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

from rbf_jax.ops.call import Rules
from rbf_jax.ops.gpu.mosaic.common import (
    COLUMNS,
    ROWS,
    Lengths,
    extent,
    kernel,
    load,
    sum_of_eights,
    swizzled,
    tile_indices,
    with_rules,
)
from rbf_jax.ops.gpu.mosaic.config import BLOCK_Q, BackwardTiles
from rbf_jax.ops.gpu.program import LN2
from rbf_jax.ops.logits import Blocks, visible_queries
from rbf_jax.ops.manual_axes import struct_like


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


def keys(
    inputs: list[jax.Array],
    rows: list[jax.Array],
    *,
    rules: Rules,
    true_lengths: Lengths,
    tiles: BackwardTiles,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
      inputs: the arrays of `forward.forward`.
      rows: as `backward_queries.queries` takes them; the logsumexp is +∞ beyond the last query.
      rules: as in the forward pass.
      true_lengths: T and S of the call.
      tiles: sizes.

    Returns:
      dk and dv, (B, S, K, H), and Σ_i dS_ij, float32 (B, N, S') with S' a multiple of the keys of a
      CTA.
    """

    def rbf_attention_keys(*refs):
        memory = KeyMemory(*refs[12:])
        KeyBlock(refs[:9], refs[9:12], memory, rules, true_lengths, tiles).run()

    results, grid = results_and_grid(inputs, tiles)
    call = kernel(rbf_attention_keys, results, memory_of(inputs[1], tiles), grid, tiles.consumers)
    return tuple(call(*inputs, *rows))


def results_and_grid(
    inputs: list[jax.Array], tiles: BackwardTiles
) -> tuple[list[jax.ShapeDtypeStruct], tuple[int, int, int]]:
    """The types of what `keys` returns, and its CTAs by heads, tiles and batch."""
    key = inputs[1]
    B, S, K, _ = key.shape
    num_tiles = -(-S // tiles.keys)
    gradient = struct_like(key.shape, key.dtype, key)
    sums = struct_like((B, inputs[0].shape[2], num_tiles * tiles.keys), jnp.float32, key)
    return [gradient, gradient, sums], (K, num_tiles, B)


def memory_of(key: jax.Array, tiles: BackwardTiles) -> KeyMemory:
    """Returns the types of what a CTA has in shared memory, for queries and keys (..., H)."""
    stages, consumers = tiles.stages, tiles.consumers
    return KeyMemory(
        key=swizzled(key, consumers, tiles.block_k),
        value=swizzled(key, consumers, tiles.block_k),
        columns=plgpu.SMEM((consumers, tiles.block_k), jnp.float32),
        query=swizzled(key, stages, BLOCK_Q),
        dout=swizzled(key, stages, BLOCK_Q),
        rows=plgpu.SMEM((2, stages, BLOCK_Q), jnp.float32),
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
    """A CTA, and what its warpgroups do.

    A step is a number of tiles of queries, `tiles_at_once`.
    """

    tiles_at_once = 1

    def __init__(
        self,
        arrays,
        outputs,
        memory: KeyMemory,
        rules: Rules,
        lengths: Lengths,
        tiles: BackwardTiles,
    ):
        self.query, self.key, self.value, self.norms, self.per_head, ends = arrays[:6]
        self.dout, self.logsumexp, self.delta = arrays[6:]
        self.outputs, self.memory, self.tiles = outputs, memory, tiles
        self.rules, self.lengths = rules, lengths
        self.head_dim = self.key.shape[-1]
        self.group = self.query.shape[2] // self.key.shape[2]
        self.warpgroup = lax.axis_index("warpgroup")
        self.batch, self.key_head = lax.axis_index("batch"), lax.axis_index("heads")
        first = lax.axis_index("tiles") * tiles.keys
        self.first_column = first + self.warpgroup * tiles.block_k
        self.query_stop, self.key_stop, self.offset = extent(rules, lengths, ends, self.batch)
        self.set = self.batch if self.per_head.shape[0] > 1 else 0
        self.steps = self._visited(first)
        self.num_steps = self.steps.stop - self.steps.start

    def run(self) -> None:
        """What the warpgroup at hand does."""
        pl.when(self.warpgroup < self.tiles.consumers)(self.differentiate)
        pl.when(self.warpgroup == self.tiles.consumers)(self.load)

    def _visited(self, first: jax.Array) -> Blocks:
        """The steps whose queries may attend to the block's keys, from `first`."""
        size = BLOCK_Q * self.tiles_at_once
        end = first + self.tiles.keys
        stop = self.query_stop
        # Beyond the last query the logsumexp is +∞.
        inner_stop = stop if self.rules.has_query_lengths else stop + size - 1
        steps = visible_queries(
            self.rules, first, first - self.offset, end - 1 - self.offset, stop, inner_stop, size
        )
        steps = Blocks(*(jnp.where(first < self.key_stop, x, 0) for x in steps))
        inner_start = jnp.where(end <= self.key_stop, steps.inner_start, steps.stop)
        inner_stop = jnp.maximum(steps.inner_stop, inner_start)
        return steps._replace(inner_start=inner_start, inner_stop=inner_stop)

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
            rows = pl.ds(first * BLOCK_Q, BLOCK_Q)
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

        _, start, inner_start, inner_stop, stop = self.steps
        some_keys = rules.has_key_lengths or self.lengths.keys % self.tiles.keys > 0
        if rules.right is not None or some_keys:
            state = section(start, inner_start, state, False)
        state = section(inner_start, inner_stop, state, True)
        if rules.left is not None or rules.has_query_lengths:
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
        shape = (self.tiles.block_k, BLOCK_Q)
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
        if whole and not rules.has_alibi:
            return logits
        columns, rows = tile_indices(logits.shape, self.first_column, tile * BLOCK_Q)
        positions = rows + self.offset if rules.has_offset else rows
        inside = None if whole else self._inside(rows, columns)
        return with_rules(logits, rules, head.slope, positions, columns, inside)

    def _inside(self, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """Whether lengths allow a pair; beyond the last query the logsumexp is +∞."""
        key_stop = self.key_stop if self.rules.has_key_lengths else self.lengths.keys
        inside = columns < key_stop
        return inside & (rows < self.query_stop) if self.rules.has_query_lengths else inside

"""A block of threads that has tiles of queries: the keys that it visits, and their loading."""

from __future__ import annotations

import copy
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rbf_jax.ops.gpu.mosaic.common import (
    ROWS,
    Blocks,
    Rules,
    blocks_of,
    extent,
    near_enough,
    swizzled,
    tile_indices,
)
from rbf_jax.ops.gpu.mosaic.config import Tiles


def ring_of_keys(key: jax.Array, tiles: Tiles) -> dict[str, Any]:
    """The types, by name, of the shared memory that `QueryBlock.load` fills, and its barriers."""
    stages, consumers = tiles.stages, tiles.consumers
    return {
        "key": swizzled(key, stages, tiles.block_k),
        "value": swizzled(key, stages, tiles.block_k),
        "norms": plgpu.SMEM((stages, tiles.block_k), jnp.float32),
        "key_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=stages),  # the norms too
        "value_loaded": plgpu.Barrier(num_barriers=stages),
        "key_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        "value_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    }


class QueryBlock:
    """What a block of threads knows, and its warpgroup that loads keys, their norms and values.

    The others, which compute, differ by kernel. The block visits one tile of queries after the
    other; `at` adds what is known of one.
    """

    visit: jax.Array | int
    buffer: jax.Array | int  # in which the tile's queries are
    first_row: jax.Array  # of those that are the warpgroup's
    blocks: Blocks
    steps: jax.Array

    def __init__(self, arrays, memory: Any, rules: Rules, tiles: Tiles, num_blocks: int):
        self.query, self.key, self.value, self.norms, per_head, lengths = arrays[:6]
        self.out, self.logsumexp = arrays[6:]
        self.memory, self.rules, self.tiles = memory, rules, tiles
        self.head_dim = self.query.shape[-1]
        self.warpgroup = lax.axis_index("warpgroup")
        self.batch, self.head = lax.axis_index("batch"), lax.axis_index("heads")
        group = self.query.shape[2] // self.key.shape[2]
        self.key_head = lax.div(self.head, jnp.int32(group))
        self.num_blocks = num_blocks
        self.query_stop, self.key_stop, self.offset = extent(rules, lengths, self.batch)
        batch = self.batch if per_head.shape[0] > 1 else 0
        self.numbers = [per_head.at[batch, i, self.head] for i in range(3)]

    def at(self, visit: jax.Array | int) -> Self:
        """The block at its tile of queries of that number."""
        here = copy.copy(self)
        here.visit = visit
        here.buffer = lax.rem(visit, 2) if self.tiles.visits > 1 else 0
        first = self._tile(visit) * self.tiles.rows
        here.first_row = first + self.warpgroup * self.tiles.block_q
        here.blocks = self._visited(first)
        here.steps = here.blocks.stop - here.blocks.start
        return here

    def _tile(self, visit: jax.Array | int) -> jax.Array:
        """Blocks turn at each end, so that under a causal rule all have as many keys."""
        block, visits = lax.axis_index("tiles"), self.tiles.visits
        if visits > 1:
            odd = lax.rem(visit, 2) == 1
            block = visit * self.num_blocks + jnp.where(odd, self.num_blocks - 1 - block, block)
        if self.rules.causal:  # those with the most keys first
            return self.num_blocks * visits - 1 - block
        return block

    def each_visit(self, function, steps: jax.Array) -> jax.Array:
        """Calls `function(block at a visit, steps before)`; returns the steps before the end."""

        def body(visit, steps):
            return function(self.at(visit), steps)

        if self.tiles.visits == 1:
            return body(0, steps)
        return lax.fori_loop(0, self.tiles.visits, body, steps)

    def _visited(self, first: jax.Array) -> Blocks:
        """The blocks of keys that the block's queries, from `first`, may attend to."""
        rules, size = self.rules, jnp.int32(self.tiles.block_k)
        row, first = first, first + self.offset
        last = first + self.tiles.rows - 1
        start, inner_start = jnp.int32(0), jnp.int32(0)
        stop, inner_stop = self.key_stop, self.key_stop
        reaches = [0] if rules.causal else []
        if rules.right is not None:
            reaches.append(rules.right)
        for reach in reaches:
            stop = jnp.minimum(stop, last + reach + 1)
            inner_stop = jnp.minimum(inner_stop, first + reach + 1)
        if rules.left is not None:
            start = lax.div(jnp.maximum(first - rules.left, 0), size)
            inner_start = blocks_of(jnp.maximum(last - rules.left, 0), size)
        stop = blocks_of(jnp.maximum(stop, 0), size)
        if rules.query_lengths or self.tiles.visits > 1:
            stop = jnp.where(row < self.query_stop, stop, 0)
        start = jnp.minimum(start, stop)
        inner_start = jnp.clip(inner_start, start, stop)
        return Blocks(
            start, inner_start, jnp.clip(lax.div(inner_stop, size), inner_start, stop), stop
        )

    def load(self) -> None:
        """The warpgroup that loads keys, their norms and values."""
        plgpu.set_max_registers(self.tiles.registers[1], action="decrease")
        total = self.each_visit(lambda tile, steps: tile._load_tile(steps), jnp.int32(0))
        total = self.load_again(total)

        @pl.loop(jnp.maximum(total - self.tiles.stages, 0), total)
        def _all_is_read(step):
            self._wait_until_free(self.memory.key_free, step)
            self._wait_until_free(self.memory.value_free, step)

    def load_again(self, steps: jax.Array) -> jax.Array:
        """Loads what is wanted once more, after so many steps; returns the steps before the end."""
        return steps

    def _load_tile(self, steps_before: jax.Array) -> jax.Array:
        self.load_all(steps_before)
        return steps_before + self.steps

    def load_all(self, steps_before: jax.Array) -> None:
        """Loads what the tile of queries visits."""
        memory, size = self.memory, self.tiles.block_k

        @pl.loop(0, self.steps)
        def _step(step):
            columns = pl.ds((self.blocks.start + step) * size, size)
            tile = (self.batch, columns, self.key_head)
            step += steps_before
            slot = self.slot(step)
            full = step >= self.tiles.stages
            pl.when(full)(lambda: self._wait_until_free(memory.key_free, step))
            loaded = memory.key_loaded.at[slot]
            plgpu.copy_gmem_to_smem(self.key.at[tile], memory.key.at[slot], loaded)
            norms = self.norms.at[self.batch, self.key_head, columns]
            plgpu.copy_gmem_to_smem(norms, memory.norms.at[slot], loaded)
            pl.when(full)(lambda: self._wait_until_free(memory.value_free, step))
            loaded = memory.value_loaded.at[slot]
            plgpu.copy_gmem_to_smem(self.value.at[tile], memory.value.at[slot], loaded)

    def slot(self, step: jax.Array) -> jax.Array:
        """Where in the ring of tiles the step's are."""
        return lax.rem(step, jnp.int32(self.tiles.stages))

    def _wait_until_free(self, barriers, step: jax.Array) -> None:
        plgpu.barrier_wait(barriers.at[self.slot(step)])

    def row_indices(self) -> jax.Array:
        """Of the queries of the warpgroup's tile."""
        index = plgpu.broadcasted_iota(jnp.int32, (self.tiles.block_q,), 0, layout=ROWS)
        return index + self.first_row

    def has_rest(self) -> bool:
        """Whether some of the last blocks may be visited in part."""
        rules = self.rules
        by_rule = rules.causal or rules.right is not None or rules.key_lengths
        return by_rule or rules.num_keys % self.tiles.block_k > 0

    def with_rules(self, logits: jax.Array, block: jax.Array, whole: bool) -> jax.Array:
        """Adds ALiBi, and −∞ where a pair is not allowed."""
        rules = self.rules
        if whole and not rules.slopes:
            return logits
        first = (self.first_row + self.offset, block * self.tiles.block_k)
        rows, columns = tile_indices(logits.shape, *first)
        if rules.slopes:
            logits -= jnp.abs(rows - columns).astype(jnp.float32) * self.numbers[2][...]
        if whole:
            return logits
        allowed = near_enough(rules, columns < self.key_stop, rows, columns)
        return jnp.where(allowed, logits, -jnp.inf)

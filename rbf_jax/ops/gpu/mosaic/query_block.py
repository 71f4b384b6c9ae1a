"""A CTA that has tiles of queries: which keys it reads, and how it loads them."""

from __future__ import annotations

import copy
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rbf_jax.ops.call import Rules
from rbf_jax.ops.gpu.mosaic.common import ROWS, Lengths, extent, swizzled, tile_indices, with_rules
from rbf_jax.ops.gpu.mosaic.config import BLOCK_Q, BackwardTiles, ForwardTiles
from rbf_jax.ops.logits import Blocks, visible_keys

Tiles = ForwardTiles | BackwardTiles


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
    """What a CTA knows, and its warpgroup that loads keys, their norms and values.

    The others, which compute, differ by kernel. The CTA processes one tile of queries after the
    other; `at` adds what is known of one.
    """

    tile: jax.Array | int  # 0, 1, … among those of the CTA
    buffer: jax.Array | int  # in which the tile's queries are
    first_row: jax.Array  # of those that are the warpgroup's
    blocks: Blocks
    steps: jax.Array

    def __init__(
        self, arrays, memory: Any, rules: Rules, lengths: Lengths, tiles: Tiles, num_ctas: int
    ):
        self.query, self.key, self.value, self.norms, per_head, ends = arrays[:6]
        self.out, self.logsumexp = arrays[6:]
        self.memory, self.rules, self.lengths, self.tiles = memory, rules, lengths, tiles
        self.head_dim = self.query.shape[-1]
        self.warpgroup = lax.axis_index("warpgroup")
        self.batch, self.head = lax.axis_index("batch"), lax.axis_index("heads")
        group = self.query.shape[2] // self.key.shape[2]
        self.key_head = lax.div(self.head, jnp.int32(group))
        self.num_ctas = num_ctas
        self.query_stop, self.key_stop, self.offset = extent(rules, lengths, ends, self.batch)
        batch = self.batch if per_head.shape[0] > 1 else 0
        self.numbers = [per_head.at[batch, i, self.head] for i in range(per_head.shape[1])]

    def at(self, tile: jax.Array | int) -> Self:
        """The CTA at its tile of queries of that number."""
        here = copy.copy(self)
        here.tile = tile
        here.buffer = lax.rem(tile, 2) if self.tiles.tiles_per_cta > 1 else 0
        first = self._index(tile) * self.tiles.rows
        here.first_row = first + self.warpgroup * BLOCK_Q
        here.blocks = self._visited(first)
        here.steps = here.blocks.stop - here.blocks.start
        return here

    def _index(self, tile: jax.Array | int) -> jax.Array:
        """Returns the tile's place in the sequence; CTAs go to and fro, for equal causal work."""
        cta, count = lax.axis_index("tiles"), self.tiles.tiles_per_cta
        index = cta
        if count > 1:
            odd = lax.rem(tile, 2) == 1
            index = tile * self.num_ctas + jnp.where(odd, self.num_ctas - 1 - cta, cta)
        if self.rules.causal:  # those with the most keys first
            return self.num_ctas * count - 1 - index
        return index

    def each_tile(self, function, steps: jax.Array) -> jax.Array:
        """Calls `function(the CTA at a tile, steps before)`; returns the steps before the end."""

        def body(tile, steps):
            return function(self.at(tile), steps)

        if self.tiles.tiles_per_cta == 1:
            return body(0, steps)
        return lax.fori_loop(0, self.tiles.tiles_per_cta, body, steps)

    def _visited(self, first: jax.Array) -> Blocks:
        """The blocks of keys that the queries of a tile, from `first`, may attend to."""
        position = first + self.offset
        last = position + self.tiles.rows - 1
        blocks = visible_keys(self.rules, position, last, self.key_stop, self.tiles.block_k)
        if self.rules.has_query_lengths or self.tiles.tiles_per_cta > 1:
            nothing = first >= self.query_stop
            blocks = Blocks(*(jnp.where(nothing, 0, x) for x in blocks))
        return blocks

    def load(self) -> None:
        """The warpgroup that loads keys, their norms and values."""
        plgpu.set_max_registers(self.tiles.registers[1], action="decrease")
        total = self.each_tile(lambda tile, steps: tile._load_tile(steps), jnp.int32(0))
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
        """Loads the keys, norms and values of the tile's blocks."""
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
        index = plgpu.broadcasted_iota(jnp.int32, (BLOCK_Q,), 0, layout=ROWS)
        return index + self.first_row

    def has_rest(self) -> bool:
        """Whether some of the last blocks may be visited in part."""
        by_rule = self.rules.right is not None or self.rules.has_key_lengths
        return by_rule or self.lengths.keys % self.tiles.block_k > 0

    def with_rules(self, logits: jax.Array, block: jax.Array, whole: bool) -> jax.Array:
        """Adds ALiBi, and −∞ where a pair is not allowed."""
        rules = self.rules
        if whole and not rules.has_alibi:
            return logits
        first = (self.first_row + self.offset, block * self.tiles.block_k)
        positions, columns = tile_indices(logits.shape, *first)
        slope = self.numbers[2][...] if rules.has_alibi else jnp.float32(0)
        inside = None if whole else columns < self.key_stop
        return with_rules(logits, rules, slope, positions, columns, inside)

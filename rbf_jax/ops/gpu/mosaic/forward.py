"""The forward kernel: a warpgroup loads tiles of keys, others compute on a tile of queries each.

The arithmetic is that of the Triton kernels (`gpu/triton/forward.py`): logits in base 2, x_ij =
c q_i·k_j − w‖k_j‖², are measured from a bound R − 60 known before the first key is read, so that
the loop has neither a running maximum nor a rescaling. Where that bound turns out useless for a row
of the CTA, the same CTA goes over its keys again with online softmax, at once: the
warpgroup that loads waits for the others' verdict. So one kernel is right on any input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rbf_jax.ops.call import Rules
from rbf_jax.ops.gpu.bound import HEADROOM, LARGEST_REFERENCE, SMALLEST_SUM
from rbf_jax.ops.gpu.mosaic.common import (
    COLUMNS,
    ROWS,
    Lengths,
    kernel,
    load,
    sum_of_eights,
    swizzled,
)
from rbf_jax.ops.gpu.mosaic.config import BLOCK_Q, ForwardTiles
from rbf_jax.ops.gpu.mosaic.query_block import QueryBlock, ring_of_keys
from rbf_jax.ops.gpu.program import LOG2E
from rbf_jax.ops.manual_axes import struct_like


class _State(NamedTuple):
    acc: jax.Array  # (block_q, H): weights times values
    total: jax.Array  # (block_q, 8): sums of weights, in the end (block_q,)
    maximum: jax.Array  # (block_q,): of the logits, from the reference


class _Memory(NamedTuple):
    """Shared memory and barriers of a CTA: their types, and in the kernel the refs."""

    query: Any  # (1 or 2, consumers, block_q, H), later the output
    key: Any  # (stages, block_k, H)
    value: Any
    norms: Any  # float32 (stages, block_k)
    rows: Any  # float32 (consumers, block_q): what is reduced over rows
    logsumexp: Any  # float32 (consumers, block_q)
    flags: Any  # int32 (tiles_per_cta, consumers): the gate's verdicts
    query_loaded: Any
    key_loaded: Any
    value_loaded: Any
    key_free: Any
    value_free: Any
    decided: Any
    turn: Any


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    norms: jax.Array,
    per_head: jax.Array,
    lengths: jax.Array,
    *,
    rules: Rules,
    true_lengths: Lengths,
    online: bool,
    tiles: ForwardTiles,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
      query: (B, T, N, H), bfloat16 or float16; H is 64, 128 or 256, lengths are multiples of 8.
      key: (B, S, K, H), K divides N.
      value: (B, S, K, H).
      norms: ‖k‖², float32 (B, K, S'), S' a multiple of the keys of a tile: such a row of numbers is
        copied whole, also beyond its end.
      per_head: float32 (B or 1, 3 or 4, N): 2γ, λγ, ALiBi slope and sink, times log₂e.
      lengths: int32 (B, 3): of the queries and of the keys, and the position of query 0; read where
        the rules say so.
      rules: which rules the kernel contains.
      true_lengths: T and S of the call.
      online: online softmax from the start.
      tiles: sizes.

    Returns:
      The output, (B, T, N, H), and the logsumexp in base 2, float32 (B, N, T'), +∞ where a row may
      attend to nothing. T' is a multiple of the queries of a CTA.
    """
    B, T, N, _ = query.shape
    num_ctas = -(-T // (tiles.rows * tiles.tiles_per_cta))
    consumers = tiles.consumers

    def rbf_attention_forward(*refs):
        arrays, memory = refs[:8], _Memory(*refs[8:])
        block = Block(arrays, memory, rules, true_lengths, tiles, num_ctas)
        block.online = online
        pl.when(block.warpgroup < consumers)(block.compute)
        pl.when(block.warpgroup == consumers)(block.load)

    results = [
        struct_like(query.shape, query.dtype, query),
        struct_like((B, N, num_ctas * tiles.tiles_per_cta * tiles.rows), jnp.float32, query),
    ]
    call = kernel(
        rbf_attention_forward, results, memory_of(query, tiles), (N, num_ctas, B), consumers
    )
    return tuple(call(query, key, value, norms, per_head, lengths))


def memory_of(query: jax.Array, tiles: ForwardTiles) -> _Memory:
    """Returns the types of what a CTA has in shared memory, for queries and keys (..., H)."""
    consumers = tiles.consumers
    return _Memory(
        query=swizzled(query, min(tiles.tiles_per_cta, 2), consumers, BLOCK_Q),
        rows=plgpu.SMEM((consumers, BLOCK_Q), jnp.float32),
        logsumexp=plgpu.SMEM((consumers, BLOCK_Q), jnp.float32),
        flags=plgpu.SMEM((tiles.tiles_per_cta, consumers), jnp.int32),
        query_loaded=plgpu.Barrier(num_barriers=consumers),
        decided=plgpu.Barrier(num_arrivals=consumers),
        turn=plgpu.Barrier(num_arrivals=consumers),
        **ring_of_keys(query, tiles),
    )


class Block(QueryBlock):
    """A CTA of the forward kernel."""

    online: bool

    def load_again(self, steps: jax.Array) -> jax.Array:
        """What the gate's verdicts demand."""
        if self.online:
            return steps
        plgpu.barrier_wait(self.memory.decided)
        return self.each_tile(lambda tile, steps: tile._load_tile_again(steps), steps)

    def _load_tile_again(self, steps_before: jax.Array) -> jax.Array:
        redo = self._verdict()
        pl.when(redo)(lambda: self.load_all(steps_before))
        return jnp.where(redo, steps_before + self.steps, steps_before)

    def _verdict(self) -> jax.Array:
        """Whether any consumer wants online softmax here; all have decided."""
        wanted = self.memory.flags[self.tile, 0]
        for consumer in range(1, self.tiles.consumers):
            wanted |= self.memory.flags[self.tile, consumer]
        return wanted != 0

    def compute(self) -> None:
        """A warpgroup that computes: its tiles of the output and of the logsumexp."""
        plgpu.set_max_registers(self.tiles.registers[0], action="increase")
        self.scale, self.weight = self.numbers[0][...], self.numbers[1][...]
        self.sink = self.numbers[3][...] if self.rules.sink else -jnp.inf
        pl.when(self.warpgroup == 1)(lambda: plgpu.barrier_arrive(self.memory.turn))
        self.at(0)._fetch_query()
        total = self.each_tile(lambda tile, steps: tile._compute(steps), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
        if not self.online:
            plgpu.barrier_arrive(self.memory.decided)
            plgpu.barrier_wait(self.memory.decided)
            self.each_tile(lambda tile, steps: tile._compute_again(steps), total)

    def _fetch_query(self) -> None:
        rows = pl.ds(self.first_row, BLOCK_Q)
        plgpu.copy_gmem_to_smem(
            self.query.at[self.batch, rows, self.head],
            self.memory.query.at[self.buffer, self.warpgroup],
            self.memory.query_loaded.at[self.warpgroup],
        )

    def _wait_for_query(self) -> None:
        plgpu.barrier_wait(self.memory.query_loaded.at[self.warpgroup])

    def _compute(self, steps_before: jax.Array) -> jax.Array:
        """A tile, from the bound where there is one, while the next tile's queries come."""
        zero = jnp.float32(0)
        self._wait_for_query()
        reference, safe = zero, None
        if not self.online:
            bound, safe = self._bound()
            reference = jnp.where(safe, bound - HEADROOM, 0.0)
        if self.tiles.tiles_per_cta > 1:
            # The last tile's output leaves the buffer that the next tile's queries come to.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(self.tile + 1 < self.tiles.tiles_per_cta)(self.at(self.tile + 1)._fetch_query)
        state = self._attend(steps_before, reference, self.online)
        state = self._whole_rows(state, reference)
        if safe is not None:
            self.memory.flags[self.tile, self.warpgroup] = self._must_redo(state, safe)
        self._store(state, reference)
        return steps_before + self.steps

    def _compute_again(self, steps_before: jax.Array) -> jax.Array:
        """The tile by online softmax, if any warpgroup wants that."""
        redo, zero = self._verdict(), jnp.float32(0)

        @pl.when(redo)
        def _again():
            self._fetch_query()
            self._wait_for_query()
            self._store(self._whole_rows(self._attend(steps_before, zero, True), zero), zero)
            plgpu.wait_smem_to_gmem(0)

        return jnp.where(redo, steps_before + self.steps, steps_before)

    def _bound(self) -> tuple[jax.Array, jax.Array]:
        """The largest bound of the tile's logits, and whether it can be measured from."""
        query = self.memory.query.at[self.buffer, self.warpgroup]
        query = load(query, plgpu.Layout.WGMMA).astype(jnp.float32)
        scale, weight = self.scale, self.weight
        largest = self._largest(jnp.sum(query * query, axis=1))
        bound = largest * scale * scale / (4 * weight)
        if self.rules.sink:
            bound = jnp.maximum(bound, self.sink)
        return bound, (weight > 0) & (bound <= LARGEST_REFERENCE)

    def _largest(self, numbers: jax.Array) -> jax.Array:
        """The largest of one number per row.

        By way of shared memory, where a thread reads what all warps have written: the reduction
        across warps that Mosaic offers has one scratch for all warpgroups.
        """
        rows = self.memory.rows.at[self.warpgroup]
        rows[...] = numbers
        plgpu.commit_smem()
        return jnp.max(load(rows, COLUMNS), axis=0)

    def _must_redo(self, state: _State, safe: jax.Array) -> jax.Array:
        inside = self.row_indices() < self.query_stop
        enough = jnp.where(inside, state.total, jnp.inf) >= SMALLEST_SUM
        infinite = jnp.max(jnp.where(jnp.abs(state.acc) < jnp.inf, 0.0, 1.0), axis=1)
        wrong = jnp.maximum(infinite, jnp.where(enough, 0.0, 1.0))
        wrong = jnp.maximum(self._largest(wrong), jnp.where(safe, 0.0, 1.0))
        return (wrong > 0).astype(jnp.int32)

    def _attend(self, steps_before: jax.Array, reference: jax.Array, online: bool) -> _State:
        """Goes over all keys; `steps_before` of the barriers' steps are over."""
        shape = (BLOCK_Q, self.head_dim)
        _, start, inner_start, inner_stop, stop = self.blocks
        lowest = self.sink if online else 0.0
        state = _State(
            plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.zeros((shape[0], 8), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full(shape[:1], lowest, jnp.float32), ROWS),
        )

        def section(begin, end, state, whole):
            def step(block, state):
                return self._step(block, steps_before, state, reference, whole, online)

            return lax.fori_loop(begin, end, step, state)

        @pl.when(self.steps > 0)
        def _first_key():
            plgpu.barrier_wait(self.memory.key_loaded.at[self.slot(steps_before)])

        pl.when(self.warpgroup == 1)(lambda: plgpu.barrier_wait(self.memory.turn))
        if self.rules.left is not None:
            state = section(start, inner_start, state, False)
        state = section(inner_start, inner_stop, state, True)
        if self.has_rest():
            state = section(inner_stop, stop, state, False)
        # The second's arrival is for the next tile, so that the first need not wait for it.
        pl.when(self.warpgroup == 0)(self._hand_over)
        pl.when(self.warpgroup == 1)(lambda: plgpu.barrier_arrive(self.memory.turn))
        return state._replace(total=jnp.sum(state.total, axis=1))

    def _hand_over(self) -> None:
        plgpu.barrier_arrive(self.memory.turn)
        plgpu.barrier_wait(self.memory.turn)

    def _step(self, block, steps_before, state: _State, reference, whole, online) -> _State:
        """Adds a block of keys; `whole` promises that every pair is allowed."""
        memory = self.memory
        step = block - self.blocks.start + steps_before
        slot = self.slot(step)
        shape = (BLOCK_Q, self.tiles.block_k)

        def products(acc):
            key = memory.key.at[slot].transpose((1, 0))
            plgpu.wgmma(acc, memory.query.at[self.buffer, self.warpgroup], key)
            self._hand_over()
            return acc[...]

        dots = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))
        norms = load(memory.norms.at[slot], COLUMNS)
        plgpu.barrier_arrive(memory.key_free.at[slot])
        subtract = lax.broadcast_in_dim(norms * self.weight + reference, shape, [1])
        logits = self.with_rules(dots * self.scale - subtract, block, whole)
        acc, total, maximum = state
        if online:
            new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=1))
            # A row may not have met a key yet, or only such whose norm is infinite.
            subtract = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)
            rescale = jnp.exp2(maximum - subtract)
            maximum = new_maximum
            total *= lax.broadcast_in_dim(rescale, total.shape, [0])
            acc *= lax.broadcast_in_dim(rescale, acc.shape, [0])
            logits -= lax.broadcast_in_dim(subtract, shape, [0])
        weights = jnp.exp2(logits)
        total += sum_of_eights(weights)
        weights = weights.astype(self.value.dtype)
        # Else the compiler moves the softmax into the turn of the other warpgroup.
        acc, total, maximum, weights = lax.optimization_barrier((acc, total, maximum, weights))
        plgpu.barrier_arrive(memory.turn)
        plgpu.barrier_wait(memory.value_loaded.at[slot])
        plgpu.barrier_wait(memory.turn)

        def weighted_values(acc):
            plgpu.wgmma(acc, weights, memory.value.at[slot])

            @pl.when(block + 1 < self.blocks.stop)
            def _next_key():
                plgpu.barrier_wait(memory.key_loaded.at[self.slot(step + 1)])

        acc = pl.run_state(weighted_values)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(memory.value_free.at[slot])
        return _State(acc, total, maximum)

    def _whole_rows(self, state: _State, reference: jax.Array) -> _State:
        """What no key adds: rows beyond their length see nothing, and every row the sink."""
        acc, total, maximum = state
        if self.rules.has_query_lengths:
            inside = self.row_indices() < self.query_stop
            kept = jnp.where(inside, 1.0, 0.0)
            acc = jnp.where(lax.broadcast_in_dim(kept, acc.shape, [0]) > 0, acc, 0.0)
            total = jnp.where(inside, total, 0.0)
            lone = self.sink - reference if self.rules.sink else -reference
            maximum = jnp.where(inside, maximum, lone)
        if self.rules.sink:
            total += jnp.exp2(self.sink - reference - maximum)
        return _State(acc, total, maximum)

    def _store(self, state: _State, reference: jax.Array) -> None:
        acc, total, maximum = state
        memory, mine = self.memory, self.warpgroup
        empty = total == 0
        divisor = jnp.where(empty, 1.0, total)
        out = acc / lax.broadcast_in_dim(divisor, acc.shape, [0])
        logsumexp = jnp.where(empty, jnp.inf, reference + maximum + _log2(divisor))
        memory.query[self.buffer, mine] = out.astype(self.out.dtype)
        memory.logsumexp[mine] = logsumexp
        plgpu.commit_smem()
        rows = pl.ds(self.first_row, BLOCK_Q)
        plgpu.copy_smem_to_gmem(
            memory.query.at[self.buffer, mine], self.out.at[self.batch, rows, self.head]
        )
        plgpu.copy_smem_to_gmem(
            memory.logsumexp.at[mine], self.logsumexp.at[self.batch, self.head, rows]
        )


def _log2(x: jax.Array) -> jax.Array:
    return jnp.log(x) * LOG2E

"""All gradients in one backward kernel: that of keys and values also adds up those of queries.

It makes the logits and dP once, where two kernels make them twice: 5 products, not 7. A step is one
tile of queries per consumer. The consumers bring dSᵀ of all of them to shared memory, each that of
its keys; then each multiplies that of one tile of queries by all keys of the CTA. CTAs add their
parts of Σ_j dS_ij k_j in global memory, in float32 and in any order: so the last bits of dq differ
from run to run.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rbf_jax.ops.call import Rules
from rbf_jax.ops.gpu.mosaic import backward_keys
from rbf_jax.ops.gpu.mosaic.backward_keys import KeyBlock, KeyMemory, hidden, results_and_grid
from rbf_jax.ops.gpu.mosaic.common import Lengths
from rbf_jax.ops.gpu.mosaic.config import BLOCK_Q, BackwardTiles

# No reduction goes across warps.
_PARAMETERS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)


class _Memory(NamedTuple):
    """What `keys` does not have."""

    dlogits: Any  # (consumers of queries, consumers of keys, block_k, block_q)
    dquery: Any  # float32 (consumers, block_q, H)
    dlogits_written: Any
    dlogits_read: Any


def gradients(
    inputs: list[jax.Array],
    rows: list[jax.Array],
    *,
    rules: Rules,
    true_lengths: Lengths,
    tiles: BackwardTiles,
) -> tuple[jax.Array, ...]:
    """Runs the kernel.

    Args:
      inputs: the arrays of `forward.forward`.
      rows: as `backward_keys.keys` takes them.
      rules: as in the forward pass.
      true_lengths: T and S of the call.
      tiles: sizes.

    Returns:
      Σ_j dS_ij k_j, float32 (B, T, N, H), and what `backward_keys.keys` returns.
    """
    query, key = inputs[:2]
    memory = memory_of(key, tiles)
    first_own = 13 + len(KeyMemory._fields)

    def rbf_attention_gradients(*refs):
        own, shared = _Memory(*refs[first_own:]), KeyMemory(*refs[13:first_own])
        sizes = rules, true_lengths, tiles
        _Block(own, refs[9], refs[:9], refs[10:13], shared, *sizes).run()

    results, grid = results_and_grid(inputs, tiles)
    mesh = plgpu.Mesh(
        grid=grid,
        grid_names=("heads", "tiles", "batch"),
        num_threads=tiles.consumers + 1,
        thread_name="warpgroup",
    )

    def with_memory(*refs):
        body = functools.partial(rbf_attention_gradients, *refs)
        pl.run_scoped(body, *memory, collective_axes="warpgroup")

    call = pl.kernel(
        with_memory,
        out_type=results,
        mesh=mesh,
        compiler_params=_PARAMETERS,
        interpret=None,
        name=rbf_attention_gradients.__name__,
    )

    def run(refs):
        total, *others = refs
        for ref, value in zip(others, call(*inputs, *rows, total), strict=True):
            ref[...] = value

    total = jax.ShapeDtypeStruct(query.shape, jnp.float32)
    return pl.run_state(run)(tuple(jnp.zeros(x.shape, x.dtype) for x in (total, *results)))


def memory_of(key: jax.Array, tiles: BackwardTiles) -> list[Any]:
    """Returns the types of what a CTA has in shared memory, that of `backward_keys.keys` first."""
    consumers = tiles.consumers
    own = _Memory(
        dlogits=plgpu.SMEM(
            (consumers, consumers, tiles.block_k, BLOCK_Q),
            key.dtype,
            transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
        ),
        dquery=plgpu.SMEM(
            (consumers, BLOCK_Q, key.shape[-1]),
            jnp.float32,
            transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
        ),
        dlogits_written=plgpu.Barrier(num_arrivals=consumers, num_barriers=consumers),
        dlogits_read=plgpu.Barrier(num_barriers=consumers),
    )
    return [*backward_keys.memory_of(key, tiles), *own]


class _Block(KeyBlock):
    """A CTA, and what its warpgroups do.

    A warpgroup multiplies dSᵀ of its tile of a step one tile later, when the others have written
    theirs; the last one in the next step. So one is at its sums while another multiplies.
    """

    def __init__(self, own: _Memory, total, arrays, outputs, memory, rules, lengths, tiles):
        self.tiles_at_once = tiles.consumers
        self.own, self.total = own, total
        super().__init__(arrays, outputs, memory, rules, lengths, tiles)
        self.is_last = self.warpgroup == tiles.consumers - 1

    def step(self, count, step, head, state, whole):
        own, mine, consumers = self.own, self.warpgroup, self.tiles.consumers
        for i in range(consumers):

            def keep(dlogits, i=i):
                pl.when(count > 0)(lambda: plgpu.barrier_wait(own.dlogits_read.at[i]))
                own.dlogits[i, mine] = dlogits
                plgpu.commit_smem()
                plgpu.barrier_arrive(own.dlogits_written.at[i])

            slot = self._slot(count * consumers + i)
            state = self.add(slot, step * consumers + i, head, state, whole, keep)
            if i > 0:
                pl.when(mine == i - 1)(lambda: self._add_queries(step, head))
            else:
                pending = self.is_last & (step > self.steps.start)
                pl.when(pending)(lambda: self._add_queries(step - 1, head))
        return state

    def after_steps(self, head) -> None:
        pending = self.is_last & (self.num_steps > 0)
        pl.when(pending)(lambda: self._add_queries(self.steps.stop - 1, head))

    def _add_queries(self, step, head) -> None:
        """Adds Σ_j dS_ij k_j of the warpgroup's tile of a step, over the keys of the CTA."""
        own, size = self.own, BLOCK_Q
        [mine] = hidden(self.warpgroup)
        plgpu.barrier_wait(own.dlogits_written.at[mine])

        def multiply(acc):
            for i in range(self.tiles.consumers):
                [keys] = hidden(jnp.int32(i))
                dlogits = own.dlogits.at[mine, keys].transpose((1, 0))
                plgpu.wgmma(acc, dlogits, self.memory.key.at[keys])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return acc[...]

        sums = pl.run_scoped(multiply, plgpu.ACC((size, self.head_dim), jnp.float32))
        plgpu.barrier_arrive(own.dlogits_read.at[mine])
        own.dquery[mine] = sums
        plgpu.commit_smem()
        rows = pl.ds((step * self.tiles.consumers + mine) * size, size)
        total = self.total.at[self.batch, rows, head.number]
        plgpu.copy_smem_to_gmem(own.dquery.at[mine], total, reduction_op="add")

    def before_store(self) -> None:
        @pl.when(self.num_steps > 0)
        def _all_have_read_the_keys():
            for i in range(self.tiles.consumers):
                plgpu.barrier_wait(self.own.dlogits_read.at[i])

        plgpu.commit_smem()  # what the warpgroup has read of its keys is read

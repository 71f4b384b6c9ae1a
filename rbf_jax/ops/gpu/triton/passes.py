"""RBF attention by Triton kernels: how each kernel is called, forward and backward.

The kernels import Triton, so they are imported where they are called.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rbf_jax.ops.call import Inputs, Masking, Rules
from rbf_jax.ops.gpu import device
from rbf_jax.ops.gpu.program import (
    Rows,
    aligned,
    filled,
    numbers_per_head,
    passes,
)
from rbf_jax.ops.gpu.triton import launch
from rbf_jax.ops.gpu.triton.config import Pass, Tiles, choose, padded_head_dim, tiles_in_use
from rbf_jax.ops.vjp import Gradients

SUPPORTS = frozenset(
    {
        *("left", "right", "num_global_keys", "sink", "return_residual"),
        *("mask", "query_lengths", "key_lengths", "query_segments", "key_segments"),
        *("alibi_slopes", "query_offset"),
    }
)
# Programs that look for tiles which the gate must do again.
_GATE_PROGRAMS = 512


def unsupported(inputs: Inputs, rules: Rules) -> str | None:
    """Returns why this call cannot be done here, as the rest of a sentence, or None if it can."""
    del rules
    return launch.unsupported(inputs.query)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All static choices of a call; hashable, since compiled programs are kept by it."""

    rules: Rules
    tiles: tuple[tuple[Pass, Tiles], ...]
    target: device.Target


def _plan(rules: Rules) -> _Plan:
    return _Plan(rules, tiles_in_use(), device.target())


class _Call:
    """The operands and constants that all kernels of a call have in common."""

    def __init__(self, plan: _Plan, inputs: Inputs, masking: Masking):
        self.plan, self.rules, self.inputs, self.masking = plan, plan.rules, inputs, masking
        self.B, self.T, self.N, self.H = inputs.query.shape
        self.S, self.K = inputs.key.shape[1:3]
        self.norms = filled(inputs.squared_key_norms().swapaxes(1, 2))
        self.per_head = numbers_per_head(inputs, masking)

    def online(self, tiles: Tiles) -> bool:
        """Whether the forward pass takes online softmax from the start.

        float16 weights vanish below 2⁻²⁴ unless they are measured from the largest; float32 is not
        worth the accuracy lost in subtracting a bound; without λ > 0 there is no bound; and where
        a row sees a block of keys at most, there is nothing to rescale.
        """
        rules, visible = self.rules, self.S
        if rules.left is not None and rules.right is not None:
            visible = min(visible, rules.num_global_keys + rules.left + 1 + rules.right)
        no_bound = rules.static_key_norm_weight is not None
        bfloat16 = self.inputs.query.dtype == jnp.bfloat16
        return not bfloat16 or no_bound or visible <= tiles.block_k

    def tiles(self, name: Pass) -> Tiles:
        """The tiles of a pass."""
        return dict(self.plan.tiles).get(name) or choose(
            name,
            head_dim=self.H,
            dtype=self.inputs.query.dtype.name,
            causal=self.rules.causal,
            length=max(self.T, self.S),
            gpu=self.plan.target.name,
            compute_capability=self.plan.target.compute_capability,
        )

    def operands(self, bounds: jax.Array | None) -> list[jax.Array]:
        """The first array arguments of every kernel; one that has no use is any array."""
        inputs, masking = self.inputs, self.masking
        optional = (
            masking.query_lengths,
            masking.key_lengths,
            masking.query_segments,
            masking.key_segments,
            masking.query_offset,
            bounds,
            masking.mask,
        )
        arrays = [inputs.query, inputs.key, inputs.value, self.norms, self.per_head]
        return arrays + [inputs.query if x is None else x for x in optional]

    def bounds(self, tiles: Tiles) -> jax.Array | None:
        """Where the keys of each tile of queries are; global keys are visited besides."""
        query_segments, key_segments = self.masking.query_segments, self.masking.key_segments
        return _segment_bounds(query_segments, key_segments, tiles.block_q, tiles.block_k)

    def scalars(self) -> list[int]:
        """The integer arguments of every kernel: T, S and the strides of what may be shared."""
        strides = [0] * 4
        if self.masking.mask is not None:
            shape, step = self.masking.mask.shape, 1
            for axis in (3, 2, 1, 0):
                strides[axis] = step if shape[axis] > 1 else 0
                step *= shape[axis]
        per_head = self.per_head.shape[1] * self.N if self.per_head.shape[0] > 1 else 0
        return [self.T, self.S, per_head, *strides]

    def run(self, kernel, inputs, outputs, *, programs, tiles, grouped=True, aliases=None, **more):
        """Launches a kernel."""
        from rbf_jax.ops.gpu.triton.tile import Heads

        constants = {
            "RULES": self.rules,
            "HEADS": Heads(self.N, self.K, self.H),
            "BLOCK_Q": tiles.block_q,
            "BLOCK_K": tiles.block_k,
            "BLOCK_H": padded_head_dim(self.H),
            **({"HEADS_AT_ONCE": tiles.heads_at_once} if grouped else {}),
            **more,
        }
        return launch.run(
            kernel,
            inputs,
            outputs,
            programs=programs,
            constants=constants,
            tiles=tiles,
            aliases=aliases,
        )


def _forward_kernels(plan: _Plan, inputs: Inputs, masking: Masking) -> tuple[jax.Array, jax.Array]:
    """The output and the logsumexp."""
    from rbf_jax.ops.gpu.triton import forward

    call = _Call(plan, inputs, masking)
    tiles = call.tiles("forward")
    num_tiles = call.B * call.N * _cdiv(call.T, tiles.block_q)
    online = call.online(tiles)
    out_shapes = [
        jax.ShapeDtypeStruct(inputs.query.shape, inputs.query.dtype),
        jax.ShapeDtypeStruct((call.B, call.N, aligned(call.T)), jnp.float32),
    ]
    operands = call.operands(call.bounds(tiles))
    out, logsumexp, flags = call.run(
        forward.forward_kernel,
        [*operands, *call.scalars()],
        [*out_shapes, jax.ShapeDtypeStruct((1 if online else num_tiles,), jnp.int32)],
        programs=num_tiles,
        tiles=tiles,
        ONLINE=online,
    )
    if online:
        return out, logsumexp
    arrays = [*operands, flags, out, logsumexp]
    out, logsumexp = call.run(
        forward.gate_kernel,
        [*arrays, *call.scalars(), num_tiles],
        out_shapes,
        programs=min(num_tiles, _GATE_PROGRAMS),
        tiles=tiles,
        grouped=False,
        FLAGS_PER_PROGRAM=_power_of_two(_cdiv(num_tiles, _GATE_PROGRAMS)),
        aliases={len(arrays) - 2: 0, len(arrays) - 1: 1},
    )
    return out, logsumexp


def _backward_kernels(plan: _Plan, inputs: Inputs, masking: Masking, given: Rows) -> Gradients:
    """The gradients; the moments still have a batch axis."""
    call = _Call(plan, inputs, masking)
    dquery, delta, moments = _queries_pass(call, given)
    dkey, dvalue, column_sums = _keys_pass(call, given, delta)
    norms = jnp.repeat(call.norms[..., : call.S], call.N // call.K, axis=1)
    return Gradients(
        dquery, dkey, dvalue, jnp.sum(moments, axis=-1), jnp.sum(column_sums * norms, axis=-1)
    )


def _queries_pass(call: _Call, given: Rows) -> list[jax.Array]:
    """The gradient of the queries, δ as the next pass reads it, and q·dq."""
    from rbf_jax.ops.gpu.triton import backward

    query, tiles = call.inputs.query, call.tiles("queries")
    out, dout, logsumexp, dlogsumexp = given
    has_dlogsumexp = dlogsumexp is not None
    arrays = [out, dout, logsumexp, dlogsumexp if has_dlogsumexp else logsumexp]
    return call.run(
        backward.queries_kernel,
        [*call.operands(call.bounds(tiles)), *arrays, *call.scalars()],
        [
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(logsumexp.shape, jnp.float32),
            jax.ShapeDtypeStruct((call.B, call.N, call.T), jnp.float32),
        ],
        programs=call.B * call.N * _cdiv(call.T, tiles.block_q),
        tiles=tiles,
        HAS_DLOGSUMEXP=has_dlogsumexp,
    )


def _keys_pass(call: _Call, given: Rows, delta: jax.Array) -> list[jax.Array]:
    """The gradients of keys and values, and Σ_i dS_ij."""
    from rbf_jax.ops.gpu.triton import backward

    key, masking, tiles = call.inputs.key, call.masking, call.tiles("keys")
    bounds = _segment_bounds(
        masking.key_segments,
        masking.query_segments,
        tiles.block_k,
        tiles.block_q,
        call.rules.num_global_keys,
    )
    return call.run(
        backward.keys_kernel,
        [*call.operands(bounds), given.dout, given.logsumexp, delta, *call.scalars()],
        [
            jax.ShapeDtypeStruct(key.shape, key.dtype),
            jax.ShapeDtypeStruct(key.shape, key.dtype),
            jax.ShapeDtypeStruct((call.B, call.N, call.S), jnp.float32),
        ],
        programs=call.B * call.K * _cdiv(call.S, tiles.block_k),
        tiles=tiles,
    )


PASSES = passes(_plan, _forward_kernels, _backward_kernels)


def _segment_bounds(
    row_segments: jax.Array | None,
    column_segments: jax.Array | None,
    row_block: int,
    block: int,
    num_global_rows: int = 0,
) -> jax.Array | None:
    """From which to which column the segments of each block of rows may be found.

    Returns:
      int32 (B, blocks of rows, 2): start and stop, whole blocks of columns; None without segments.
      All columns between them are to be visited, some of which may be of other segments. Blocks
      that hold one of the first `num_global_rows` rows may find theirs anywhere.
    """
    if row_segments is None or column_segments is None:
        return None

    def least_and_most(segments, size):
        B, length = segments.shape
        blocks = jnp.pad(segments, [(0, 0), (0, -length % size)], mode="edge")
        blocks = blocks.reshape(B, -1, size)
        return blocks.min(-1), blocks.max(-1)

    least_row, most_row = least_and_most(row_segments, row_block)
    least, most = least_and_most(column_segments, block)
    meet = (least_row[:, :, None] <= most[:, None]) & (least[:, None] <= most_row[:, :, None])
    first = jnp.argmax(meet, axis=-1)
    last = meet.shape[-1] - jnp.argmax(meet[..., ::-1], axis=-1)
    last = jnp.where(meet.any(-1), last, first)
    anywhere = jnp.arange(meet.shape[1], dtype=jnp.int32) * row_block < num_global_rows
    first, last = jnp.where(anywhere, 0, first), jnp.where(anywhere, meet.shape[-1], last)
    return jnp.stack([first, last], axis=-1).astype(jnp.int32) * block


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()

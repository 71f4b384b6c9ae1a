"""RBF attention by Triton kernels: what surrounds the kernels, and how each is called.

The kernels import Triton, so they are imported where they are called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rbf_jax.ops.call import Inputs, Masking, Options
from rbf_jax.ops.gpu import device, program
from rbf_jax.ops.gpu.program import (
    Full,
    Rows,
    Shared,
    aligned,
    common_rules,
    filled,
    natural_logsumexp,
    needed,
    numbers_per_head,
    own_logsumexp,
    split,
)
from rbf_jax.ops.gpu.triton import launch
from rbf_jax.ops.gpu.triton.config import Pass, Tiles, choose, overridden, padded_head_dim
from rbf_jax.ops.vjp import Gradients, Passes, Residuals, with_custom_vjp

# Programs that look for tiles which the gate must do again.
_GATE_PROGRAMS = 512


def unsupported(inputs: Inputs, masking: Masking, options: Options) -> str | None:
    """Returns why this call cannot be done here, as the rest of a sentence, or None if it can."""
    del masking, options
    return launch.unsupported(inputs.query)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All static choices of a call; hashable, since compiled programs are kept by it."""

    options: Options
    overrides: tuple[tuple[Pass, Tiles], ...]
    target: device.Target


def _plan(options: Options) -> _Plan:
    return _Plan(needed(options), overridden(), device.target())


class _Call:
    """The operands and constants that all kernels of a call have in common."""

    def __init__(self, plan: _Plan, full: Full, shared: Shared):
        from rbf_jax.ops.gpu.triton.tile import Rules

        self.plan, self.full, self.shared = plan, full, shared
        self.B, self.T, self.N, self.H = full.query.shape
        self.S, self.K = full.key.shape[1:3]
        left, right = (-1, -1) if plan.options.window is None else plan.options.window
        self.rules = Rules(
            self.N,
            self.K,
            self.H,
            left=left,
            right=right,
            segments=full.query_segments is not None,
            mask=shared.mask is not None,
            **common_rules(plan.options, full, shared),
        )
        self.norms = filled(full.key_norms.swapaxes(1, 2))
        self.per_head = numbers_per_head(shared)

    def online(self, tiles: Tiles) -> bool:
        """Whether the forward pass takes online softmax from the start.

        float16 weights vanish below 2⁻²⁴ unless they are measured from the largest; float32 is not
        worth the accuracy lost in subtracting a bound; without λ > 0 there is no bound; and where
        a row sees a block of keys at most, there is nothing to rescale.
        """
        options, visible = self.plan.options, self.S
        if options.window is not None:
            left, right = options.window
            visible = min(visible, left + 1 + (0 if options.is_causal else right))
        no_bound = options.static_key_norm_weight is not None
        bfloat16 = self.full.query.dtype == jnp.bfloat16
        return not bfloat16 or no_bound or visible <= tiles.block_k

    def tiles(self, name: Pass) -> Tiles:
        """The tiles of a pass."""
        return dict(self.plan.overrides).get(name) or choose(
            name,
            head_dim=self.H,
            dtype=self.full.query.dtype.name,
            causal=self.rules.causal,
            length=max(self.T, self.S),
            gpu=self.plan.target.name,
            compute_capability=self.plan.target.compute_capability,
        )

    def operands(self, bounds: jax.Array | None) -> list[jax.Array]:
        """The first array arguments of every kernel; one that has no use is any array."""
        full = self.full
        none = full.query
        optional = (
            full.query_lengths,
            full.key_lengths,
            full.query_segments,
            full.key_segments,
            full.query_offset,
            bounds,
            self.shared.mask,
        )
        arrays = [full.query, full.key, full.value, self.norms, self.per_head]
        return arrays + [none if x is None else x for x in optional]

    def scalars(self) -> list[int]:
        """The integer arguments of every kernel: T, S and the strides of what may be shared."""
        strides = [0] * 4
        if self.shared.mask is not None:
            shape, step = self.shared.mask.shape, 1
            for axis in (3, 2, 1, 0):
                strides[axis] = step if shape[axis] > 1 else 0
                step *= shape[axis]
        per_head = 3 * self.N if self.per_head.shape[0] > 1 else 0
        return [self.T, self.S, per_head, *strides]

    def run(self, kernel, inputs, outputs, *, programs, tiles, grouped=True, aliases=None, **more):
        """Launches a kernel."""
        constants = {
            "RULES": self.rules,
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


def _forward_kernels(plan: _Plan, full: Full, shared: Shared) -> tuple[jax.Array, jax.Array]:
    return _forward_pass(_Call(plan, full, shared))


def _forward_pass(call: _Call) -> tuple[jax.Array, jax.Array]:
    """The output and the logsumexp."""
    from rbf_jax.ops.gpu.triton import forward

    full, tiles = call.full, call.tiles("forward")
    bounds = _segment_bounds(full.query_segments, full.key_segments, tiles.block_q, tiles.block_k)
    num_tiles = call.B * call.N * _cdiv(call.T, tiles.block_q)
    online = call.online(tiles)
    out_shapes = [
        jax.ShapeDtypeStruct(full.query.shape, full.query.dtype),
        jax.ShapeDtypeStruct((call.B, call.N, aligned(call.T)), jnp.float32),
    ]
    operands = call.operands(bounds)
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


def _backward_kernels(plan: _Plan, full: Full, given: Rows, shared: Shared) -> Gradients:
    """The gradients; the moments still have a batch axis."""
    call = _Call(plan, full, shared)
    dquery, delta, moments = _queries_pass(call, given)
    dkey, dvalue, column_sums = _keys_pass(call, given, delta)
    norms = jnp.repeat(call.norms[..., : call.S], call.N // call.K, axis=1)
    return Gradients(
        dquery, dkey, dvalue, jnp.sum(moments, axis=-1), jnp.sum(column_sums * norms, axis=-1)
    )


def _queries_pass(call: _Call, given: Rows) -> list[jax.Array]:
    """The gradient of the queries, δ as the next pass reads it, and q·dq."""
    from rbf_jax.ops.gpu.triton import backward

    full, tiles = call.full, call.tiles("queries")
    out, dout, logsumexp, dlogsumexp = given
    bounds = _segment_bounds(full.query_segments, full.key_segments, tiles.block_q, tiles.block_k)
    has_dlogsumexp = dlogsumexp is not None
    arrays = [out, dout, logsumexp, dlogsumexp if has_dlogsumexp else logsumexp]
    return call.run(
        backward.queries_kernel,
        [*call.operands(bounds), *arrays, *call.scalars()],
        [
            jax.ShapeDtypeStruct(full.query.shape, full.query.dtype),
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

    full, tiles = call.full, call.tiles("keys")
    bounds = _segment_bounds(full.key_segments, full.query_segments, tiles.block_k, tiles.block_q)
    return call.run(
        backward.keys_kernel,
        [*call.operands(bounds), given.dout, given.logsumexp, delta, *call.scalars()],
        [
            jax.ShapeDtypeStruct(full.key.shape, full.key.dtype),
            jax.ShapeDtypeStruct(full.key.shape, full.key.dtype),
            jax.ShapeDtypeStruct((call.B, call.N, call.S), jnp.float32),
        ],
        programs=call.B * call.K * _cdiv(call.S, tiles.block_k),
        tiles=tiles,
    )


def one_pass(
    name: Pass,
    inputs: Inputs,
    options: Options,
    out: jax.Array,
    dout: jax.Array,
    logsumexp: jax.Array,
    delta: jax.Array,
) -> Sequence[jax.Array]:
    """Runs the kernels of one pass alone, as `experiments.autotune` does; returns what they write.

    The forward pass reads nothing after the options, and "queries" no δ; out, logsumexp and δ are
    as the passes before return them.
    """
    call = _Call(_plan(options), *split(inputs, Masking()))
    if name == "forward":
        return _forward_pass(call)
    given = Rows(out, dout, logsumexp, None)
    return _queries_pass(call, given) if name == "queries" else _keys_pass(call, given, delta)


def _forward(inputs: Inputs, masking: Masking, options: Options):
    return program.forward(_forward_kernels, _plan(options), inputs, masking)


def _backward(residuals: Residuals, dout: jax.Array, dlogsumexp: jax.Array, options: Options):
    given = dlogsumexp if options.return_residual else None
    return program.backward(_backward_kernels, _plan(options), residuals, dout, given)


PASSES = Passes(_forward, _backward, natural_logsumexp, own_logsumexp)
attend = with_custom_vjp(PASSES)


def _segment_bounds(
    row_segments: jax.Array | None, column_segments: jax.Array | None, row_block: int, block: int
) -> jax.Array | None:
    """From which to which column the segments of each block of rows may be found.

    Returns:
      int32 (B, blocks of rows, 2): start and stop, whole blocks of columns; None without segments.
      All columns between them are to be visited, some of which may be of other segments.
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
    return jnp.stack([first, last], axis=-1).astype(jnp.int32) * block


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()

"""RBF attention by Triton kernels: what surrounds the kernels, and how each is called.

Key norms are made beforehand, once per key, by XLA, unless the caller has them. The kernels import
Triton, so they are imported where they are called.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.ops import nvidia
from rbf_jax.ops.partition import by_batch_and_heads
from rbf_jax.ops.triton import launch
from rbf_jax.ops.triton.tiles import Pass, Tiles, choose, overridden, padded_head_dim
from rbf_jax.ops.types import Inputs, Masking, Options, squared_norms
from rbf_jax.ops.vjp import Gradients, Passes, Residuals, with_custom_vjp
from rbf_jax.ops.vmap import folding_vmap

_LOG2E = 1.4426950408889634
_LN2 = 0.6931471805599453
# Rows of numbers, one per query or key, are multiples of this long (`common.ALIGNMENT`).
_ALIGNMENT = 16
# Programs that look for tiles which the gate must do again.
_GATE_PROGRAMS = 512


def unsupported(inputs: Inputs, masking: Masking, options: Options) -> str | None:
    """Returns why this call cannot be done here, as the rest of a sentence, or None if it can."""
    del masking, options
    return launch.unsupported(inputs.query)


class _Full(NamedTuple):
    """Arrays that have an entry for each element of the batch."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    key_norms: jax.Array | None  # (B, S, K)
    query_lengths: jax.Array | None
    key_lengths: jax.Array | None
    query_segments: jax.Array | None
    key_segments: jax.Array | None
    query_offset: jax.Array | None


class _Shared(NamedTuple):
    """Arrays whose batch axis may have size 1."""

    gamma: jax.Array  # (B or 1, N)
    key_norm_weight: jax.Array
    slopes: jax.Array | None
    mask: jax.Array | None


class Rows(NamedTuple):
    """What the backward pass knows of each query."""

    out: jax.Array  # (B, T, N, H)
    dout: jax.Array
    logsumexp: jax.Array  # (B, N, T'), as the kernel left it
    dlogsumexp: jax.Array | None  # (B, T, N)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All static choices of a call; hashable, since compiled programs are kept by it."""

    options: Options
    overrides: tuple[tuple[Pass, Tiles], ...]
    target: nvidia.Target


def _split(inputs: Inputs, masking: Masking) -> tuple[_Full, _Shared]:
    query_segments, key_segments = masking.query_segments, masking.key_segments
    if query_segments is not None and key_segments is not None:
        dtype = jnp.promote_types(query_segments.dtype, key_segments.dtype)
        query_segments, key_segments = query_segments.astype(dtype), key_segments.astype(dtype)
    full = _Full(
        *inputs[:3],
        inputs.key_norms,
        masking.query_lengths,
        masking.key_lengths,
        query_segments,
        key_segments,
        masking.query_offset,
    )
    slopes = None if masking.alibi_slopes is None else masking.alibi_slopes[None]
    return full, _Shared(inputs.gamma[None], inputs.key_norm_weight[None], slopes, masking.mask)


def _plan(options: Options) -> _Plan:
    weight = options.static_key_norm_weight
    needed = Options(
        options.is_causal,
        options.window,
        options.origin_sink,
        options.return_residual,
        static_key_norm_weight=0.0 if weight is not None and weight <= 0 else None,
    )
    return _Plan(needed, overridden(), nvidia.target())


class _Call:
    """The operands and constants that all kernels of a call have in common."""

    def __init__(self, plan: _Plan, full: _Full, shared: _Shared):
        from rbf_jax.ops.triton.common import Rules

        self.plan, self.full, self.shared = plan, full, shared
        self.B, self.T, self.N, self.H = full.query.shape
        self.S, self.K = full.key.shape[1:3]
        left, right = (-1, -1) if plan.options.window is None else plan.options.window
        self.rules = Rules(
            self.N,
            self.K,
            self.H,
            causal=plan.options.is_causal,
            left=left,
            right=right,
            sink=plan.options.origin_sink,
            slopes=shared.slopes is not None,
            query_lengths=full.query_lengths is not None,
            key_lengths=full.key_lengths is not None,
            offset=full.query_offset is not None,
            segments=full.query_segments is not None,
            mask=shared.mask is not None,
        )
        norms = squared_norms(full.key) if full.key_norms is None else full.key_norms
        norms = norms.swapaxes(1, 2)
        self.norms = jnp.pad(norms, [(0, 0), (0, 0), (0, _aligned(self.S) - self.S)])
        slopes = jnp.zeros_like(shared.gamma) if shared.slopes is None else shared.slopes
        numbers = (2 * shared.gamma, shared.gamma * shared.key_norm_weight, slopes)
        sets = [jnp.broadcast_to(x, (self._num_sets(), self.N)) for x in numbers]
        self.per_head = jnp.float32(_LOG2E) * jnp.stack(sets, axis=1)

    def _num_sets(self) -> int:
        """How many sets of numbers per head there are: 1, or one for each batch element."""
        sets = (self.shared.gamma, self.shared.key_norm_weight, self.shared.slopes)
        return max(x.shape[0] for x in sets if x is not None)

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


@functools.partial(jax.jit, static_argnames="plan")
def _forward_program(plan: _Plan, full: _Full, shared: _Shared):
    return folding_vmap(functools.partial(_forward_kernels, plan))(full, shared)


def _forward_kernels(plan: _Plan, full: _Full, shared: _Shared) -> tuple[jax.Array, jax.Array]:
    def kernels(full, shared):
        return _forward_pass(_Call(plan, full, shared))

    return _on_each_device(kernels, (full, shared), ("out", "logsumexp"))


# The axes of an array: b batch, n query heads, k key/value heads, and others.
_ROLES = {
    **dict.fromkeys(("query", "out", "dout"), "b.n."),
    **dict.fromkeys(("key", "value"), "b.k."),
    "key_norms": "b.k",
    **dict.fromkeys(("query_lengths", "key_lengths", "query_offset"), "b"),
    **dict.fromkeys(("query_segments", "key_segments"), "b."),
    **dict.fromkeys(("gamma", "key_norm_weight", "slopes"), "bn"),
    **dict.fromkeys(("query_moment", "norm_moment"), "bn"),
    "mask": "bn..",
    "logsumexp": "bn.",
    "dlogsumexp": "b.n",
}


def _on_each_device(kernels, arguments, results):
    """Calls kernels on named tuples of arrays, split by batch and heads where those are sharded."""
    given = [name for group in arguments for name, x in group._asdict().items() if x is not None]
    return by_batch_and_heads(
        kernels, arguments, [_ROLES[x] for x in given], [_ROLES[x] for x in results]
    )


def _forward_pass(call: _Call) -> tuple[jax.Array, jax.Array]:
    """The output and the logsumexp."""
    from rbf_jax.ops.triton import forward

    full, tiles = call.full, call.tiles("forward")
    bounds = _segment_bounds(full.query_segments, full.key_segments, tiles.block_q, tiles.block_k)
    num_tiles = call.B * call.N * _cdiv(call.T, tiles.block_q)
    online = call.online(tiles)
    out_shapes = [
        jax.ShapeDtypeStruct(full.query.shape, full.query.dtype),
        jax.ShapeDtypeStruct((call.B, call.N, _aligned(call.T)), jnp.float32),
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


def _backward_kernels(plan: _Plan, full: _Full, shared: _Shared, given: Rows) -> Gradients:
    """The gradients; the moments still have a batch axis."""

    def kernels(full, given, shared):
        call = _Call(plan, full, shared)
        dquery, delta, moments = _queries_pass(call, given)
        dkey, dvalue, column_sums = _keys_pass(call, given, delta)
        norms = jnp.repeat(call.norms[..., : call.S], call.N // call.K, axis=1)
        return Gradients(
            dquery, dkey, dvalue, jnp.sum(moments, axis=-1), jnp.sum(column_sums * norms, axis=-1)
        )

    return _on_each_device(kernels, (full, given, shared), Gradients._fields)


def _queries_pass(call: _Call, given: Rows) -> list[jax.Array]:
    """The gradient of the queries, δ as the next pass reads it, and q·dq."""
    from rbf_jax.ops.triton import backward

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
    from rbf_jax.ops.triton import backward

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
    call = _Call(_plan(options), *_split(inputs, Masking()))
    if name == "forward":
        return _forward_pass(call)
    given = Rows(out, dout, logsumexp, None)
    return _queries_pass(call, given) if name == "queries" else _keys_pass(call, given, delta)


@functools.partial(jax.jit, static_argnames="plan")
def _backward_program(plan: _Plan, full: _Full, shared: _Shared, rows: Rows) -> Gradients:
    def kernels(full, shared):
        full, rows = full
        return _backward_kernels(plan, full, shared, rows)

    return folding_vmap(kernels)((full, rows), shared)


def _forward(inputs: Inputs, masking: Masking, options: Options):
    return _forward_program(_plan(options), *_split(inputs, masking))


def _backward(residuals: Residuals, dout: jax.Array, dlogsumexp: jax.Array, options: Options):
    plan = _plan(options)
    full, shared = _split(residuals.inputs, residuals.masking)
    rows = Rows(
        residuals.out, dout, residuals.logsumexp, dlogsumexp if options.return_residual else None
    )
    gradients = _backward_program(plan, full, shared, rows)
    return gradients._replace(
        query_moment=gradients.query_moment.sum(0), norm_moment=gradients.norm_moment.sum(0)
    )


def _natural_logsumexp(logsumexp: jax.Array, inputs: Inputs) -> jax.Array:
    """From base 2, (B, N, T'), +∞ where a row may attend to nothing."""
    logsumexp = logsumexp[..., : inputs.query.shape[1]].swapaxes(1, 2)
    return jnp.where(jnp.isposinf(logsumexp), -jnp.inf, logsumexp * jnp.float32(_LN2))


def _own_logsumexp(logsumexp: jax.Array) -> jax.Array:
    """The inverse of `_natural_logsumexp`."""
    logsumexp = jnp.where(jnp.isneginf(logsumexp), jnp.inf, logsumexp / jnp.float32(_LN2))
    T = logsumexp.shape[1]
    return jnp.pad(logsumexp.swapaxes(1, 2), [(0, 0), (0, 0), (0, _aligned(T) - T)])


PASSES = Passes(_forward, _backward, _natural_logsumexp, _own_logsumexp)
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


def _aligned(length: int) -> int:
    return _cdiv(length, _ALIGNMENT) * _ALIGNMENT


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()

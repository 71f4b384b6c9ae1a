"""Ring attention: sequences split over devices, blocks of keys, values and norms passed round.

Every device keeps its queries, attends to the block of keys and values that it holds, and hands the
block to its neighbour, n times (Liu et al., arXiv:2310.01889). The parts of a row are merged by
their logsumexps. The key norms travel with their keys: they are less than a hundredth of a block,
and each device would have to read all keys once more to make them. The backward pass sends the
blocks round again, each with the gradients that it has gathered.

Under a causal rule contiguous parts would leave the first devices idle. The sequence is cut into 2n
chunks instead, and device i is given chunks i and 2n − 1 − i ("zig-zag"): then every device has the
same to do in each turn. With a causal window the parts stay contiguous, and blocks are passed on
only as far as the window reaches.

Runs inside shard_map. What is written here is one device's part.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbf_jax.ops.call import Inputs, Masking, Rules, accumulation_dtype, squared_norms
from rbf_jax.ops.vjp import Gradients, Passes, Residuals, with_custom_vjp


@dataclasses.dataclass(frozen=True)
class Ring:
    """How sequences are laid over the devices of a ring.

    Attributes:
      axis: name of the mesh axis.
      size: n, devices.
      chunks: of a device: 1, or 2 in zig-zag order.
      query_chunk: length.
      key_chunk: length.
      turns: blocks that each device sees, its own included.
    """

    axis: str
    size: int
    chunks: int
    query_chunk: int
    key_chunk: int
    turns: int

    @classmethod
    def plan(cls, axis: str, size: int, T: int, S: int, rules: Rules, behind: int = 0) -> Ring:
        """The layout for T queries and S keys, which are filled up to whole chunks.

        Args:
          axis: name of the mesh axis.
          size: n.
          T: queries; query i is at position i − `behind`.
          S: keys.
          rules: of the call.
          behind: how many queries come before the first key.
        """
        reach = None
        if rules.causal and rules.left is not None and S + behind == T:
            reach = rules.left + behind
        chunks = 2 if rules.causal and reach is None else 1
        query_chunk, key_chunk = (-(-length // (chunks * size)) for length in (T, S))
        if reach is not None:  # no query is ahead of the block of keys that its device holds
            key_chunk = query_chunk
        turns = size if reach is None else min(size, 1 - (-reach // key_chunk))
        return cls(axis, size, chunks, query_chunk, key_chunk, turns)

    @property
    def query_length(self) -> int:
        """Of all devices, filled up."""
        return self.size * self.chunks * self.query_chunk

    @property
    def key_length(self) -> int:
        """Of all devices, filled up."""
        return self.size * self.chunks * self.key_chunk

    def split(self, array: jax.Array, axis: int) -> jax.Array:
        """A device's contiguous part to its chunks along a new first axis."""
        length = array.shape[axis] // self.chunks
        shape = (*array.shape[:axis], self.chunks, length, *array.shape[axis + 1 :])
        array = jnp.moveaxis(array.reshape(shape), axis, 0)
        if self.chunks == 1:
            return array
        even, odd = (lax.ppermute(array[slot], self.axis, self._moves(slot)) for slot in (0, 1))
        first = lax.axis_index(self.axis) % 2 == 0  # Then the even chunk is the lower one.
        return jnp.stack([jnp.where(first, even, odd), jnp.where(first, odd, even)])

    def join(self, array: jax.Array, axis: int) -> jax.Array:
        """The inverse of `split`."""
        if self.chunks == 2:
            first = lax.axis_index(self.axis) % 2 == 0
            slots = (jnp.where(first, array[0], array[1]), jnp.where(first, array[1], array[0]))
            array = jnp.stack(
                [
                    lax.ppermute(x, self.axis, [(to, at) for at, to in self._moves(slot)])
                    for slot, x in enumerate(slots)
                ]
            )
        array = jnp.moveaxis(array, 0, axis)
        return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])

    def chunk(self, device, slot):
        """The index, in the whole sequence, of a device's chunk."""
        return jnp.where(slot == 0, device, 2 * self.size - 1 - device)

    def pass_on(self, tree, turns: int = 1):
        """Hands the block on to the device that comes `turns` places later."""
        moves = [(i, (i + turns) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, moves), tree)

    def _moves(self, slot: int) -> list[tuple[int, int]]:
        """From contiguous device to zig-zag device: the even (slot 0) or odd chunks."""
        chunks = [2 * device + slot for device in range(self.size)]
        return [(i, min(chunk, 2 * self.size - 1 - chunk)) for i, chunk in enumerate(chunks)]


class _Block(NamedTuple):
    """What is passed round, chunks first."""

    key: jax.Array  # (m, B, S', K, H)
    value: jax.Array
    norms: jax.Array  # (m, B, S', K), accumulation dtype
    segments: jax.Array | None  # (m, B, S')


class _Rows(NamedTuple):
    """What a device knows of its queries, chunks first."""

    query: jax.Array  # (m, B, T', N, H)
    segments: jax.Array | None  # (m, B, T')
    mask: jax.Array | None  # (m, B or 1, N or 1, T' or 1, S or 1)


class _Part:
    """One device's part of a call."""

    def __init__(self, ring: Ring, inputs: Inputs, masking: Masking, rules: Rules):
        self.ring, self.masking = ring, masking
        # The sink is no key of any block: it is there before the first.
        self.inputs = inputs._replace(sink_logits=None)
        self.rules = dataclasses.replace(rules, sink=False)
        self.device = lax.axis_index(ring.axis)
        mask = masking.mask
        if mask is not None:
            whole = mask.shape[2] == 1
            mask = jnp.stack([mask] * ring.chunks) if whole else ring.split(mask, 2)
        self.rows = _Rows(self.split(inputs.query), self.split(masking.query_segments), mask)
        key, value = self.split(inputs.key), self.split(inputs.value)
        self.block = _Block(key, value, squared_norms(key), self.split(masking.key_segments))

    def split(self, array: Any) -> Any:
        """(B, length, ...) to chunks, first; None stays None."""
        return None if array is None else self.ring.split(array, 1)

    def pair(self, block: _Block, turn, index) -> tuple[jax.Array, jax.Array, Inputs, Masking]:
        """The slots of a pair of chunks, and the call that one attends to the other by."""
        ring = self.ring
        row, column = index // ring.chunks, index % ring.chunks
        query_chunk = ring.chunk(self.device, row)
        key_chunk = ring.chunk((self.device - turn) % ring.size, column)
        query, query_segments, mask = jax.tree.map(lambda x: x[row], self.rows)
        key, value, norms, key_segments = jax.tree.map(lambda x: x[column], block)
        first_query, first_key = query_chunk * ring.query_chunk, key_chunk * ring.key_chunk
        if mask is not None and mask.shape[3] > 1:
            mask = lax.dynamic_slice_in_dim(mask, first_key, ring.key_chunk, 3)
        masking = self.masking

        def rest(lengths, first, chunk):
            return None if lengths is None else jnp.clip(lengths - first, 0, chunk)

        offset = None
        reaches = self.rules.left, self.rules.right
        if reaches != (None, None) or masking.alibi_slopes is not None:
            offset = jnp.full(query.shape[0], first_query - first_key, jnp.int32)
            offset += 0 if masking.query_offset is None else masking.query_offset
        return (
            row,
            column,
            self.inputs._replace(query=query, key=key, value=value, key_norms=norms),
            Masking(
                mask,
                rest(masking.query_lengths, first_query, ring.query_chunk),
                rest(masking.key_lengths, first_key, ring.key_chunk),
                query_segments,
                key_segments,
                masking.alibi_slopes,
                offset,
            ),
        )

    def turns(self, body, state, block):
        """Runs `body(turn, state, block) -> (state, block)` as the block goes round.

        What the block's last bearer made of it is returned; the next block is on its way while one
        is worked on, where `body` leaves it as it is.
        """

        def step(carry, turn):
            state, block = carry
            state, block = body(turn, state, block)
            return (state, self.ring.pass_on(block)), None

        last = self.ring.turns - 1
        (state, block), _ = lax.scan(step, (state, block), jnp.arange(last, dtype=jnp.int32))
        return body(jnp.int32(last), state, block)


def _forward(
    ring: Ring, passes: Passes, inputs: Inputs, masking: Masking, rules: Rules
) -> tuple[jax.Array, jax.Array]:
    part = _Part(ring, inputs, masking, rules)
    dtype = accumulation_dtype(inputs.query.dtype)

    def attend_to(turn, state, block):
        def add(index, state):
            outs, logsumexps = state
            row, _, pair_inputs, pair_masking = part.pair(block, turn, index)
            out, logsumexp = passes.forward(pair_inputs, pair_masking, part.rules)
            logsumexp = passes.natural_logsumexp(logsumexp, pair_inputs)
            total = jnp.logaddexp(logsumexps[row], logsumexp)
            finite = jnp.where(jnp.isneginf(total), 0, total)
            old, new = (jnp.exp(x - finite)[..., None] for x in (logsumexps[row], logsumexp))
            merged = outs[row] * old + out.astype(dtype) * new
            return outs.at[row].set(merged), logsumexps.at[row].set(total)

        return lax.fori_loop(0, ring.chunks**2, add, state), block

    query = part.rows.query
    nothing = jnp.where(query == query, 0, 0).astype(dtype)  # varies as the query does
    sink = -jnp.inf if inputs.sink_logits is None else inputs.sink_logits
    state = nothing, nothing[..., 0] + sink
    (out, logsumexp), _ = part.turns(attend_to, state, part.block)
    return ring.join(out, 1).astype(inputs.query.dtype), ring.join(logsumexp, 1)


def _backward(
    ring: Ring,
    passes: Passes,
    residuals: Residuals,
    dout: jax.Array,
    dlogsumexp: jax.Array,
    rules: Rules,
) -> Gradients:
    inputs = residuals.inputs
    part = _Part(ring, inputs, residuals.masking, rules)
    out, logsumexp, dout, dlogsumexp = map(
        part.split, (residuals.out, residuals.logsumexp, dout, dlogsumexp)
    )
    dtype = accumulation_dtype(inputs.query.dtype)

    def zeros(x):
        return jnp.zeros_like(x, dtype)

    def add_gradients(turn, state, block):
        block, *gathered = block

        def add(index, state):
            dquery, moments, dkey, dvalue = state
            row, column, pair_inputs, pair_masking = part.pair(block, turn, index)
            own_logsumexp = passes.own_logsumexp(logsumexp[row])
            given = Residuals(pair_inputs, pair_masking, out[row], own_logsumexp)
            found = passes.backward(given, dout[row], dlogsumexp[row], part.rules)
            moments = moments[0] + found.query_moment, moments[1] + found.norm_moment
            return (
                dquery.at[row].add(found.query.astype(dtype)),
                moments,
                dkey.at[column].add(found.key.astype(dtype)),
                dvalue.at[column].add(found.value.astype(dtype)),
            )

        dquery, moments = state
        state = dquery, moments, *gathered
        dquery, moments, *gathered = lax.fori_loop(0, ring.chunks**2, add, state)
        return (dquery, moments), (block, *gathered)

    block = part.block
    state = zeros(part.rows.query), (zeros(inputs.gamma), zeros(inputs.gamma))
    traveller = block, zeros(block.key), zeros(block.value)
    (dquery, moments), (_, dkey, dvalue) = part.turns(add_gradients, state, traveller)
    dkey, dvalue = ring.pass_on((dkey, dvalue), 1 - ring.turns)
    return Gradients(ring.join(dquery, 1), ring.join(dkey, 1), ring.join(dvalue, 1), *moments)


def ring_attention(ring: Ring, passes: Passes):
    """Returns ``attend(inputs, masking, rules) -> (out, logsumexp)`` of one device's part.

    Args:
      ring: the layout. Inputs are the device's contiguous part of sequences of
        `ring.query_length` and `ring.key_length`; lengths are those of whole sequences, and the
        mask has the device's rows and all columns.
      passes: of the implementation that attends to a block.
    """
    return with_custom_vjp(
        Passes(
            functools.partial(_forward, ring, passes), functools.partial(_backward, ring, passes)
        )
    )

"""The operation on many devices: each does its part of the batch, the heads and the sequence.

Inside ``jax.set_mesh(mesh)`` the mesh axes with these names say what is split:

    "data", "fsdp"  the batch
    "tensor"        the heads
    "seq"           queries and keys, by ring attention; queries alone where keys are few

An axis that does not divide what it splits is left out, and every device along it does the same.
So it is along axes of other names where "seq" splits; where it does not, such a mesh is left to the
compiler, which splits batch and heads where the arrays are.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rbf_jax.ops.call import AXES, Inputs, Masking, Rules
from rbf_jax.ops.logits import merge
from rbf_jax.ops.parallel.ring import Ring, ring_attention
from rbf_jax.ops.vjp import Passes, with_custom_vjp

BATCH_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"
SEQUENCE_AXIS = "seq"
NAMES = (*BATCH_AXES, HEAD_AXIS, SEQUENCE_AXIS)


class Split(NamedTuple):
    """Mesh axes that split a call; `ring` is how "seq" splits keys too, if it does.

    Attributes:
      batch: axes that split the batch.
      heads: the axis that splits the heads, if any.
      queries: the axis that splits the queries, if any.
      query_length: T, filled up so that it can be split.
      ring: how that axis splits the keys, if it does.
    """

    batch: tuple[str, ...]
    heads: str | None
    queries: str | None
    query_length: int
    ring: Ring | None


def split_of(inputs: Inputs, rules: Rules, behind: int = 0) -> Split | None:
    """How the mesh that is set splits a call, or None if it does not.

    Axes of explicit type, and those of a shard_map that the call is in, are left to the caller.
    `behind` queries come before the first key.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = {name for name in NAMES if mesh.shape.get(name, 1) > 1}
    if not names or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    B, T, N, _ = inputs.query.shape
    S, K = inputs.key.shape[1:3]
    batch: tuple[str, ...] = ()
    shares = 1
    for name in BATCH_AXES:
        if name in names and B % (shares * mesh.shape[name]) == 0:
            batch, shares = (*batch, name), shares * mesh.shape[name]
    heads = None
    if HEAD_AXIS in names and N % mesh.shape[HEAD_AXIS] == 0 == K % mesh.shape[HEAD_AXIS]:
        heads = HEAD_AXIS
    queries, query_length, ring = None, T, None
    if SEQUENCE_AXIS in names and 2 * (size := mesh.shape[SEQUENCE_AXIS]) <= T:
        queries, query_length = SEQUENCE_AXIS, -(-T // size) * size
        if 2 * size <= S:
            ring = Ring.plan(SEQUENCE_AXIS, size, T, S, rules, behind)
            query_length = ring.query_length
    # Kernels cannot be in a shard_map over some of the axes (`custom_partitioning.unsupported`).
    if queries is None and any(size > 1 for name, size in mesh.shape.items() if name not in NAMES):
        return None
    return Split(batch, heads, queries, query_length, ring)


def lengths_at_once(inputs: Inputs, rules: Rules) -> tuple[int, int]:
    """How many queries and keys a device attends with at once, as the mesh splits the call."""
    T, S = inputs.query.shape[1], inputs.key.shape[1]
    split = split_of(inputs, rules)
    if split is None or split.queries is None:
        return T, S
    if split.ring is not None:
        return split.ring.query_chunk, split.ring.key_chunk
    return split.query_length // jax.sharding.get_abstract_mesh().shape[split.queries], S


def attend(passes: Passes, split: Split, inputs: Inputs, masking: Masking, rules: Rules):
    """``attend`` of an implementation, each device doing its part.

    Args:
      passes: of the implementation.
      split: of `split_of`.
      inputs: of the whole call.
      masking: of the whole call.
      rules: of the call.

    Returns:
      The output and the logsumexp, of the whole call.
    """
    if split.ring is not None and rules.num_global_keys:
        return _global_keys_apart(passes, inputs, masking, rules)
    T = inputs.query.shape[1]
    inputs, masking = _fill_up(split, inputs, masking)
    if split.ring is not None:
        local = ring_attention(split.ring, passes)
    elif split.queries is not None:
        local = _own_queries(split.queries, with_custom_vjp(passes))
    else:
        local = with_custom_vjp(passes)
    axes = {"b": split.batch or None, "t": split.queries, ".": None}
    axes |= {"n": split.heads, "k": split.heads}
    axes["s"] = split.queries if split.ring is not None else None
    vectors = P(axes["b"], axes["t"], axes["n"])

    def spec(name, array):
        """An axis of size 1 is not split, nor are the mask's columns: a ring wants them all."""
        letters = AXES[name].replace("s", ".") if name == "mask" else AXES[name]
        return P(*(axes[x] if n > 1 else None for x, n in zip(letters, array.shape)))

    def specs(named_tuple):
        """Of the arrays that are there."""
        given = {name: x for name, x in named_tuple._asdict().items() if x is not None}
        return named_tuple._replace(**{name: spec(name, x) for name, x in given.items()})

    out, logsumexp = jax.shard_map(
        lambda inputs, masking: local(inputs, masking, rules),
        in_specs=(specs(inputs), specs(masking)),
        out_specs=(vectors, vectors),
        check_vma=False,
    )(inputs, masking)
    return out[:, :T], logsumexp[:, :T]


def _global_keys_apart(passes: Passes, inputs: Inputs, masking: Masking, rules: Rules):
    """Attention to the global keys, which every device needs, merged with that to the others."""
    R, B = rules.num_global_keys, inputs.query.shape[0]

    def part(keys: slice, inputs, masking, rules, behind=0):
        def cut(array, axis):
            whole = array is None or array.shape[axis] == 1
            return array if whole else array[(slice(None),) * axis + (keys,)]

        inputs = inputs._replace(
            key=cut(inputs.key, 1), value=cut(inputs.value, 1), key_norms=cut(inputs.key_norms, 1)
        )
        masking = masking._replace(
            mask=cut(masking.mask, 3), key_segments=cut(masking.key_segments, 1)
        )
        rules = dataclasses.replace(rules, num_global_keys=0, return_residual=True)
        split = cast(Split, split_of(inputs, rules, behind))  # its queries are, as in the whole
        return attend(passes, split, inputs, masking, rules)

    lengths, offset = masking.key_lengths, masking.query_offset
    offset = jnp.zeros(B, jnp.int32) if offset is None else offset
    has_others = inputs.key.shape[1] > R
    to_global = part(
        slice(0, R),
        inputs._replace(sink_logits=None) if has_others else inputs,
        masking._replace(
            key_lengths=None if lengths is None else jnp.minimum(lengths, R),
            query_segments=None,
            key_segments=None,
            alibi_slopes=None,
        ),
        dataclasses.replace(
            rules,
            left=None,
            right=0 if rules.causal else None,
            sink=rules.sink and not has_others,
        ),
    )
    if not has_others:
        return to_global
    to_others = part(
        slice(R, None),
        inputs,
        masking._replace(
            key_lengths=None if lengths is None else jnp.maximum(lengths - R, 0),
            query_offset=offset - R,
        ),
        rules,
        behind=R,
    )
    return merge(to_global, to_others)


def _own_queries(axis: str, attend):
    """``attend`` for a device that has a run of the queries, and all keys."""

    def local(inputs: Inputs, masking: Masking, rules: Rules):
        B, T = inputs.query.shape[:2]
        start = jax.lax.axis_index(axis) * T
        if rules.left is not None or rules.right is not None or masking.alibi_slopes is not None:
            offset = 0 if masking.query_offset is None else masking.query_offset
            offset = jnp.broadcast_to(start + offset, B).astype(jnp.int32)
            masking = masking._replace(query_offset=offset)
        if masking.query_lengths is not None:
            lengths = jnp.clip(masking.query_lengths - start, 0, T)
            masking = masking._replace(query_lengths=lengths)
        return attend(inputs, masking, rules)

    return local


def _fill_up(split: Split, inputs: Inputs, masking: Masking) -> tuple[Inputs, Masking]:
    """Sequences that can be split evenly; keys that are not there are beyond the length."""
    B, S = inputs.key.shape[:2]
    query_length = split.query_length
    key_length = S if split.ring is None else split.ring.key_length

    def pad(array, axis, length):
        if array is None or array.shape[axis] in (1, length):
            return array
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, length - array.shape[axis])
        return jnp.pad(array, widths)

    key_lengths = masking.key_lengths
    if key_length > S and key_lengths is None:
        key_lengths = jnp.full(B, S, jnp.int32)
    return inputs._replace(
        query=pad(inputs.query, 1, query_length),
        key=pad(inputs.key, 1, key_length),
        value=pad(inputs.value, 1, key_length),
    ), masking._replace(
        mask=pad(pad(masking.mask, 2, query_length), 3, key_length),
        key_lengths=key_lengths,
        query_segments=pad(masking.query_segments, 1, query_length),
        key_segments=pad(masking.key_segments, 1, key_length),
    )

"""What the kernels of Triton and Mosaic are tested on alike, by their interpreters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax.ops import reference
from rbf_jax.ops.call import Inputs, Masking, Rules
from rbf_jax.ops.parallel.ring import Ring, ring_attention
from tests.harness import cases


def _results(attend, rules, masking, arrays):
    """Output, logsumexp and the gradients of everything that has one."""
    *inputs, dout, dlogsumexp = arrays

    def call(*inputs):
        return attend(Inputs(*inputs), masking, rules)

    (out, logsumexp), vjp = jax.vjp(call, *inputs)
    return out, logsumexp, *vjp((dout, dlogsumexp.astype(logsumexp.dtype)))


def _arrays(dtype, rules, **shapes):
    """The inputs, the sinks' logits among them if there are any, and the cotangents."""
    case = cases.case("kernels", per_head=True, **shapes)
    *inputs, dout, dlogsumexp = (jnp.asarray(x) for x in case.arrays(jnp.dtype(dtype)))
    sinks = [jnp.linspace(-3.0, 2.0, case.N)] if rules.sink else []
    return [*inputs, *sinks, dout, dlogsumexp]


def _assert_close(got, want, tolerance):
    for mine, other in zip(got, want, strict=True):
        mine, other = (np.asarray(x, np.float32) for x in (mine, other))
        scale = np.abs(other[np.isfinite(other)]).max(initial=0)
        if other.ndim > 1:  # γ and λ have sums over all queries and keys, whose terms cancel
            scale = min(1, scale)
        np.testing.assert_allclose(mine, other, rtol=tolerance, atol=tolerance * scale)


def check_offset(attend, rules: Rules, starts, dtype, tolerance, *, slopes=True, **shapes):
    """Positions of queries that are not indices, as in "reference"; lengths go by index."""
    arrays = _arrays(dtype, rules, B=len(starts), **shapes)
    masking = Masking(
        alibi_slopes=jnp.linspace(0.02, 0.1, arrays[0].shape[2]) if slopes else None,
        query_offset=jnp.array(starts, jnp.int32),
        query_lengths=jnp.full(len(starts), arrays[0].shape[1] - 3, jnp.int32),
        key_lengths=jnp.full(len(starts), arrays[1].shape[1] - 2, jnp.int32),
    )
    got = jax.jit(functools.partial(_results, attend, rules, masking))(arrays)
    want = jax.jit(functools.partial(_results, reference.attend, rules, masking))(arrays)
    _assert_close(got, want, tolerance)


def check_ring(passes, rules: Rules, dtype, tolerance, *, segments=False, **shapes):
    """Two devices, which an axis of vmap stands for: callbacks that wait for another hang."""
    arrays = _arrays(dtype, rules, **shapes)
    B, length = arrays[0].shape[:2]
    ids = jnp.arange(B * length).reshape(B, length) * 3 // (B * length) if segments else None
    ring = Ring.plan("seq", 2, length, length, rules)

    def everything(attend, ids, arrays):
        return _results(attend, rules, Masking(query_segments=ids, key_segments=ids), arrays)

    def split(x):
        return x.reshape(B, 2, -1, *x.shape[2:]).swapaxes(0, 1)

    query, key, value, *numbers, dout, dlogsumexp = arrays
    part = [split(x) for x in (query, key, value, dout, dlogsumexp)]

    def one(ids, query, key, value, dout, dlogsumexp):
        given = query, key, value, *numbers, dout, dlogsumexp
        return everything(ring_attention(ring, passes), ids, given)

    ids_of_parts = split(ids) if segments else None
    axes = (0 if segments else None, *[0] * 5)
    got = jax.jit(jax.vmap(one, axes, axis_name="seq"))(ids_of_parts, *part)
    rows, of_heads = got[:5], got[5:]
    want = jax.jit(functools.partial(everything, reference.attend))(ids, arrays)
    whole = [x.swapaxes(0, 1).reshape(B, length, *x.shape[3:]) for x in rows]
    _assert_close([*whole, *(x.sum(0) for x in of_heads)], want, tolerance)

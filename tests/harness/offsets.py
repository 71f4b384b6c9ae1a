"""Queries that are not at the position of their index, against a sequence that holds them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.ops import reference
from rbf_jax.ops.call import Inputs, Masking, Rules

T, S = 21, 37
OPTIONS = {
    "causal": {"right": 0},
    "window": {"left": 6, "right": 3},
    "causal_window": {"left": 9, "right": 0},
    "alibi": {"alibi": True},
    "causal_alibi_sink": {"right": 0, "alibi": True, "sink": True},
}
# Of two batch elements: before all keys, within, beyond, far beyond.
OFFSETS = [(0, 5), (-30, -7), (16, 33), (60, -4)]
parametrize = pytest.mark.parametrize(
    ("name", "starts"), [(name, starts) for name in OPTIONS for starts in OFFSETS]
)


BEFORE = max(-start for starts in OFFSETS for start in starts)
LENGTH = BEFORE + S + T + max(start for starts in OFFSETS for start in starts)


def check(attend, name, starts, dtype, tolerance):
    """Output, logsumexp and gradients of `attend` with an offset."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(2, T, 4, 16), (2, S, 2, 16), (2, S, 2, 16), (2, T, 4, 16), (2, T, 4)]
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]
    starts = jnp.array(starts, jnp.int32)

    def close(a, b):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        a, b = (np.where(np.isneginf(x), 0, x) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).mean()))

    got = _program(_with_offset, attend, name)(starts, *arrays)
    jax.tree.map(close, got, _program(_embedded, reference.attend, name)(starts, *arrays))


@functools.cache
def _program(form, attend, name):
    """Compiles output, logsumexp and gradients once for all starts."""
    given = dict(OPTIONS[name])
    slopes = jnp.array([0.1, 0.02, 0.3, 0.05]) if given.pop("alibi", False) else None
    call = functools.partial(form, attend, slopes, Rules(return_residual=True, **given))

    @jax.jit
    def everything(starts, q, k, v, dout, dlogsumexp):
        sinks = [jnp.array([0.0, -2.0, 3.0, 1.0])] if given.get("sink") else []
        numbers = jnp.full(4, 0.3), jnp.ones(4), *sinks
        results, vjp = jax.vjp(functools.partial(call, starts), q, k, v, *numbers)
        return results, vjp((dout, dlogsumexp.astype(results[1].dtype)))

    return everything


def _with_offset(attend, slopes, rules, starts, q, k, v, *numbers):
    masking = Masking(alibi_slopes=slopes, query_offset=starts)
    return attend(Inputs(q, k, v, *numbers), masking, rules)


def _embedded(attend, slopes, rules, starts, q, k, v, *numbers):
    """Places queries and keys in one long sequence, in which the first key is at BEFORE."""

    @jax.vmap
    def place(x, at):
        return jax.lax.dynamic_update_slice_in_dim(
            jnp.zeros((LENGTH, *x.shape[1:]), x.dtype), x, at, axis=0
        )

    @jax.vmap
    def cut(x, at):
        return jax.lax.dynamic_slice_in_dim(x, at, T, axis=0)

    first = jnp.full(2, BEFORE)
    mask = np.zeros((1, 1, 1, LENGTH), bool)
    mask[..., BEFORE : BEFORE + S] = True
    masking = Masking(mask=jnp.array(mask), alibi_slopes=slopes)
    inputs = place(q, first + starts), place(k, first), place(v, first), *numbers
    out, logsumexp = attend(Inputs(*inputs), masking, rules)
    return cut(out, first + starts), cut(logsumexp, first + starts)

"""Queries that are not at the position of their index, against a sequence that holds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.ops import reference
from rbf_jax.ops.types import Inputs, Masking, Options

T, S = 21, 37
OPTIONS = {
    "causal": {"is_causal": True},
    "window": {"window": (6, 3)},
    "causal_window": {"is_causal": True, "window": (9, 9)},
    "alibi": {"alibi": True},
    "causal_alibi_sink": {"is_causal": True, "alibi": True, "origin_sink": True},
}
# Of two batch elements: before all keys, within, beyond, far beyond.
OFFSETS = [(0, 5), (-30, -7), (16, 33), (60, -4)]
parametrize = pytest.mark.parametrize(
    ("name", "starts"), [(name, starts) for name in OPTIONS for starts in OFFSETS]
)


def check(attend, name, starts, dtype, tolerance):
    """Output, logsumexp and gradients of `attend` with an offset."""
    given = dict(OPTIONS[name])
    slopes = jnp.array([0.1, 0.02, 0.3, 0.05]) if given.pop("alibi", False) else None
    options = Options(return_residual=True, **given)
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(2, T, 4, 16), (2, S, 2, 16), (2, S, 2, 16), (2, T, 4, 16), (2, T, 4)]
    q, k, v, dout, dlogsumexp = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)
    )
    numbers = jnp.full(4, 0.3), jnp.ones(4)

    def offset(q, k, v, gamma, weight):
        masking = Masking(alibi_slopes=slopes, query_offset=jnp.array(starts, jnp.int32))
        return attend(Inputs(q, k, v, gamma, weight), masking, options)

    def embedded(q, k, v, gamma, weight):
        """Each in a sequence that begins `before` the first key."""
        results = []
        for row, start in enumerate(starts):
            before = max(0, -start)
            first, length = before + start, before + S + T + max(0, start)
            long_q, long_k, long_v = (
                jnp.zeros((1, length, *x.shape[2:]), x.dtype)
                .at[:, at : at + x.shape[1]]
                .set(x[row])
                for x, at in ((q, first), (k, before), (v, before))
            )
            mask = np.zeros((1, 1, 1, length), bool)
            mask[..., before : before + S] = True
            masking = Masking(mask=jnp.array(mask), alibi_slopes=slopes)
            inputs = Inputs(long_q, long_k, long_v, gamma, weight)
            out, logsumexp = reference.attend(inputs, masking, options)
            results.append((out[:, first : first + T], logsumexp[:, first : first + T]))
        return jax.tree.map(lambda *x: jnp.concatenate(x), *results)

    def everything(f):
        results, vjp = jax.vjp(f, q, k, v, *numbers)
        return results, vjp((dout, dlogsumexp.astype(results[1].dtype)))

    def close(a, b):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        a, b = (np.where(np.isneginf(x), 0, x) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).mean()))

    jax.tree.map(close, everything(offset), everything(embedded))

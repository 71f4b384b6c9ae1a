import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.nn.inspection import largest_logit
from tests.harness.models import normal

B, R, T, N, K, H = 2, 2, 7, 4, 2, 4
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 0, 0, 0]], np.int32)


def _expected(query, key, gamma, weight, segments, window, slopes):
    """One number after another."""
    query, key = np.asarray(query, np.float64), np.repeat(np.asarray(key, np.float64), N // K, 2)
    largest = -np.inf
    for b, n, i, j in np.ndindex(B, N, T, R + T):
        if segments is not None and segments[b, i] == 0:
            continue
        token = j - R  # below 0 it is a register
        behind = i - token if token >= 0 else 0
        if behind < 0 or (window is not None and behind > window):
            continue
        if token >= 0 and segments is not None and segments[b, i] != segments[b, token]:
            continue
        q, k = query[b, i, n], key[b, j, n]
        logit = 2 * gamma[n] * q @ k - weight[n] * gamma[n] * k @ k
        largest = max(largest, logit - (0 if slopes is None else slopes[n] * behind))
    return largest


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("rules", ["none", "segments", "segments, window, alibi"])
def test_largest_logit(rules, chunk):
    query, key = np.array(normal(0, B, T, N, H)) / 10, np.array(normal(1, B, R + T, K, H)) / 10
    # Each pair would have the largest logit, were it seen whatever the rules say.
    query[0, 1] = key[0, R + 2] = -5  # the future
    query[1, 5] = key[1, R + 4] = 4  # padding
    query[1, 1] = key[1, R + 0] = -3  # another segment
    query[0, 2] = key[0, R + 0] = 2  # outside the window
    query[1, 3] = key[1, R + 2] = 1.5  # its edge
    gamma, weight = np.linspace(0.5, 1, N), np.linspace(0, 1, N)
    rest = (
        SEGMENTS if "segments" in rules else None,
        1 if "window" in rules else None,
        np.array([0.5, 0.25, 0.1, 0.05]) if "alibi" in rules else None,
    )
    expected = _expected(query, key, gamma, weight, *rest)
    names = ("segment_ids", "window", "alibi_slopes")
    options = dict(zip(names, rest), gamma=gamma, key_norm_weight=weight, chunk=chunk)
    if rest[0] is not None:
        options["segment_ids"] = jnp.asarray(rest[0])
    run = jax.jit(functools.partial(largest_logit, num_registers=R, **options))
    np.testing.assert_allclose(run(query, key), expected, rtol=1e-5)


def test_without_text_there_is_no_largest_logit():
    query, key = normal(0, 1, 3, 1, H), normal(1, 1, 3, 1, H)
    nothing = jnp.zeros((1, 3), jnp.int32)
    options = {"segment_ids": nothing, "window": None, "alibi_slopes": None}
    options |= {"num_registers": 0, "gamma": 1, "key_norm_weight": 1}
    assert jax.jit(functools.partial(largest_logit, **options))(query, key) == -np.inf

"""Exclusive self attention after every implementation: values and all gradients against float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.nn.attention import exclude_own_value
from tests.harness import cases, contract
from tests.harness.oracle import oracle

CASE = cases.case("exclusive", N=4, K=2, is_causal=True)


def _exclusive(subject):
    """The subject with each token's own value taken out of what it returns."""

    def attend(query, key, value, **options):
        if not subject.logsumexp:
            return exclude_own_value(subject.attend(query, key, value, **options), value)
        out, logsumexp = subject.attend(query, key, value, **options)
        return exclude_own_value(out, value), logsumexp

    return dataclasses.replace(subject, attend=attend)


def _expected(subject, dtype):
    """The oracle's results, with z = y − (y·u) u and u = v / ‖v‖ by hand."""
    *arrays, cotangent, dlogsumexp = CASE.arrays(dtype)
    value, cotangent = (np.asarray(x, np.float64) for x in (arrays[2], cotangent))
    (B, T, K, H), N = value.shape, CASE.N
    lengths = np.linalg.norm(value, axis=-1, keepdims=True).repeat(N // K, axis=2)
    u = value.repeat(N // K, axis=2) / lengths

    def across(x):
        return x - (x * u).sum(-1, keepdims=True) * u

    dlogsumexp = dlogsumexp if subject.logsumexp else 0 * dlogsumexp
    if subject.key_norm_weight is not None:
        arrays[4] = subject.key_norm_weight
    options = CASE.resolved_options()
    results, *_ = oracle(*arrays, across(cotangent), dlogsumexp, **options)
    y = results.out
    du = -y * (cotangent * u).sum(-1, keepdims=True) - cotangent * (y * u).sum(-1, keepdims=True)
    own = (across(du) / lengths).reshape(B, T, K, N // K, H).sum(3)
    return results._replace(out=across(y), value=results.value + own)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (subject.name, dtype)
        for subject in contract.SUBJECTS.values()
        for dtype in subject.dtypes
        if dtype != "float64"
    ],
)
def test_values_and_gradients(name, dtype):
    subject, dtype = contract.SUBJECTS[name], jnp.dtype(dtype)
    got = contract.run(_exclusive(subject), CASE, dtype)
    want = _expected(subject, dtype)
    for field in set(want._fields) - {"sink_logits"}:
        if subject.lacks(field):
            continue
        ours, expected = getattr(got, field), getattr(want, field)
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert error < max(16 * jnp.finfo(dtype).eps, 1e-5), field

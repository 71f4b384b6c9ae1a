import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax import rbf_attention
from rbf_jax.nn.registers import Registers, attend
from rbf_jax.ops.logits import merge
from tests.harness.models import normal

B, R, T, N, K, H = 2, 3, 6, 4, 2, 8


def _inputs():
    return normal(0, B, R + T, N, H), normal(1, B, R + T, K, H), normal(2, B, R + T, K, H)


@pytest.mark.parametrize("kind", [{"origin_sink": True}, {"normalize": False}])
def test_two_calls_merged_equal_one(kind):
    """A window over all of the text and segments of one value are rules that forbid nothing."""
    gamma = np.float32([0.2, 0.5, 1.0, 0.1])
    options = {**kind, "gamma": gamma, "key_norm_weight": 0.8}
    rules = {"segment_ids": jnp.ones((B, T), jnp.int32), "window": T}
    cotangent = normal(4, B, R + T, N, H)

    @jax.jit
    def both(*inputs):
        one, one_pullback = jax.vjp(lambda *x: attend(*x, R, **options), *inputs)
        two, two_pullback = jax.vjp(lambda *x: attend(*x, R, **options, **rules), *inputs)
        return (one, *one_pullback(cotangent)), (two, *two_pullback(cotangent))

    one, two = both(*_inputs())
    for a, b in zip(one, two):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_every_token_sees_all_registers_and_registers_see_no_text():
    segments = jnp.asarray([[1, 1, 2, 2, 3, 0]] * B, jnp.int32)
    query, key, value = _inputs()

    # Values that are 1 in dimension 0 for registers, in dimension 1 for text: the output's first
    # dimensions are then the mass on either.
    marks = np.zeros_like(value)
    marks[:, :R, :, 0] = 1
    marks[:, R:, :, 1] = 1

    @jax.jit
    def masses(query, key):
        slopes = np.full(N, 50.0)
        rules = {"segment_ids": segments, "window": 0, "alibi_slopes": slopes}
        return attend(query, key, marks, R, **rules)

    out = masses(query, key)
    np.testing.assert_allclose(out[..., :2].sum(-1), 1, rtol=1e-5)
    assert np.all(out[:, R:, :, :2] > 0)
    np.testing.assert_array_equal(out[:, :R, :, 1], 0)


def test_alibi_counts_between_tokens_only():
    """Register keys and a token's own key have no penalty; with steep slopes no other is left."""
    query, key, value = _inputs()
    i = R + T - 1
    own = np.asarray([0, 1, 2, i])

    @jax.jit
    def run(query, key, value):
        out = attend(query, key, value, R, alibi_slopes=np.full(N, 1e4))
        return out[:, i:], rbf_attention(query[:, i:], key[:, own], value[:, own])

    out, expected = run(query, key, value)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_no_registers_is_one_call():
    query, key, value = _inputs()
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2]] * B, jnp.int32)

    @jax.jit
    def run(query, key, value):
        return attend(query, key, value, 0, segment_ids=segments, window=1), rbf_attention(
            query,
            key,
            value,
            is_causal=True,
            local_window_size=(1, 0),
            query_segment_ids=segments,
            key_value_segment_ids=segments,
        )

    np.testing.assert_array_equal(*run(query, key, value))


def test_a_register_at_zero_is_the_origin_sink():
    """Under RBF attention a key at the origin with value 0 is what the sink is."""
    query, key, value = map(np.array, _inputs())
    key[:, :1] = value[:, :1] = 0

    @jax.jit
    def run(query, key, value):
        text = query[:, 1:], key[:, 1:], value[:, 1:]
        sink = rbf_attention(*text, is_causal=True, origin_sink=True)
        return attend(query, key, value, 1)[:, 1:], sink

    out, sink = run(query, key, value)
    np.testing.assert_allclose(out, sink, atol=1e-6)


def test_merge_is_attention_over_both_sets():

    @jax.jit
    def run(query, key, value):
        a = rbf_attention(query, key[:, :4], value[:, :4], return_residual=True)
        b = rbf_attention(query, key[:, 4:], value[:, 4:], return_residual=True)
        one = rbf_attention(query, key, value, return_residual=True)
        return merge(a, b), one

    for ours, expected in zip(*run(*_inputs())):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_merge_is_safe_where_a_set_is_empty():
    a = jnp.full((4, 2), 3.0), jnp.asarray([0.5, -jnp.inf, -jnp.inf, 300.0])
    b = jnp.full((4, 2), 5.0), jnp.asarray([-jnp.inf, 2.0, -jnp.inf, -300.0])

    @jax.jit
    def run(*inputs):
        out, pullback = jax.vjp(merge, *inputs)
        return out, pullback(jax.tree.map(jnp.ones_like, out))

    (out, logsumexp), gradients = run(a, b)
    np.testing.assert_array_equal(out[:, 0], [3, 5, 0, 3])
    np.testing.assert_array_equal(logsumexp, [0.5, 2.0, -jnp.inf, 300.0])
    for gradient in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(gradient))


def test_registers_are_put_in_front_and_start_as_asked():
    x = normal(0, B, T, 64).astype(jnp.bfloat16)
    for initial, deviation in (("zero", 0.0), ("normal", 0.02)):
        module = Registers(R, 64, initial)
        out, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
        embedding = variables["params"]["embedding"]
        np.testing.assert_allclose(np.std(embedding), deviation, rtol=0.2)
        assert embedding.dtype == jnp.float32
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out[:, R:], x)
        np.testing.assert_array_equal(out[1, :R], embedding.astype(jnp.bfloat16))

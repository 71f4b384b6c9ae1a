import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.nn import losses
from tests.harness.models import normal, primitives

B, T, D, V = 3, 7, 5, 11


def _plain(hidden, head, targets):
    log_p = jax.nn.log_softmax(losses.logits(hidden, head))
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def _inputs(dtype=jnp.float32):
    targets = np.random.default_rng(2).integers(0, V, (B, T))
    return normal(0, B, T, D).astype(dtype), normal(1, V, D), jnp.asarray(targets, jnp.int32)


def _value_and_gradients(function, hidden, head, targets):
    weights = normal(3, *targets.shape)
    nll, pullback = jax.vjp(lambda *inputs: function(*inputs, targets), hidden, head)
    return nll, *pullback(weights)


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_chunks_change_nothing(chunk):
    inputs = _inputs()
    ours = _value_and_gradients(lambda *inputs: losses.token_losses(*inputs, chunk=chunk), *inputs)
    for a, b in zip(ours, _value_and_gradients(_plain, *inputs)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_hidden_states_give_float32_losses_and_head_gradients():
    inputs = _inputs(jnp.bfloat16)
    nll, d_hidden, d_head = _value_and_gradients(
        lambda *inputs: losses.token_losses(*inputs, chunk=2), *inputs
    )
    exact = _value_and_gradients(_plain, inputs[0].astype(jnp.float32), *inputs[1:])
    assert (nll.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(nll, exact[0], rtol=0.02, atol=0.02)
    # Logits' gradients are rounded once, sums of them are not.
    np.testing.assert_allclose(d_head, exact[2], rtol=0.005, atol=0.02)


def test_bfloat16_logits_are_rounded_and_the_rest_is_not():
    inputs = _inputs(jnp.bfloat16)
    weights = normal(3, B, T)

    def both(dtype):
        def loss(hidden, head):
            return losses.token_losses(hidden, head, inputs[2], chunk=4, dtype=dtype)

        nll, pullback = jax.vjp(loss, *inputs[:2])
        return nll, *pullback(weights)

    exact, rounded = both("float32"), both("bfloat16")
    z = losses.logits(*inputs[:2])
    step = float(jnp.finfo(jnp.bfloat16).eps) / 2
    assert 0 < jnp.abs(rounded[0] - exact[0]).max() <= 2 * step * jnp.abs(z).max()
    assert [x.dtype for x in rounded] == [x.dtype for x in exact]
    for a, b in zip(rounded[1:], exact[1:]):
        np.testing.assert_allclose(a, b, atol=0.06)


def _largest_array(function, hidden, head, targets) -> int:
    jaxpr = jax.make_jaxpr(lambda *a: _value_and_gradients(function, *a))(hidden, head, targets)
    outputs = [x.aval.size for e in primitives(jaxpr.jaxpr) for x in e.outvars]
    return max(outputs)


def test_logits_of_the_whole_vocabulary_never_exist_forward_or_backward():
    inputs = _inputs()
    assert _largest_array(_plain, *inputs) == B * T * V
    largest = _largest_array(lambda *i: losses.token_losses(*i, chunk=4), *inputs)
    assert largest < B * T * V
    assert largest == max(B * T * 4, B * T * D)


def test_wide_parts_are_of_whole_tiles_and_within_the_chunk():
    hidden, targets = normal(0, 1, 3, D), jnp.array([[0, 399, 1000]], jnp.int32)
    head = normal(1, 1001, D)
    calls = {chunk: lambda *i, c=chunk: losses.token_losses(*i, chunk=c) for chunk in (200, 1001)}
    widths = {c: _largest_array(f, hidden, head, targets) for c, f in calls.items()}
    assert widths[200] == 8 * 128 * D  # parts of 128, padded, and not of 200 or 143
    assert widths[1001] == 1001 * D
    several, one = (f(hidden, head, targets) for f in calls.values())
    np.testing.assert_allclose(several, one, rtol=1e-5)


def test_vmap_over_seeds_is_a_loop_over_seeds():
    hidden, heads = normal(0, 2, B, T, D), normal(1, 2, V, D)
    targets = _inputs()[2]

    def both(hidden, head):
        return _value_and_gradients(
            lambda *i: losses.token_losses(*i, chunk=4), hidden, head, targets
        )

    together = jax.vmap(both)(hidden, heads)
    for i in range(2):
        for a, b in zip(together, both(hidden[i], heads[i])):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)

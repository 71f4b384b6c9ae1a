import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.nn import losses
from tests.nn.models import normal, primitives

B, T, D, V = 3, 7, 5, 11


def _plain(hidden, head, targets):
    log_p = jax.nn.log_softmax(losses.logits(hidden, head))
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def _inputs(dtype=jnp.float32):
    targets = np.random.default_rng(2).integers(0, V, (B, T))
    return normal(0, B, T, D).astype(dtype), normal(1, V, D), jnp.asarray(targets, jnp.int32)


def _value_and_gradients(function, hidden, head, targets):
    weights = normal(3, B, T)
    nll, pullback = jax.vjp(lambda *inputs: function(*inputs, targets), hidden, head)
    return nll, *pullback(weights)


@pytest.mark.parametrize("chunk", [4, 100])
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
    # Added up over chunks in float32: bfloat16 sums of 11 chunks would be off by more.
    np.testing.assert_allclose(d_head, exact[2], atol=0.02)


def _largest_array(function, hidden, head, targets) -> int:
    jaxpr = jax.make_jaxpr(lambda *a: _value_and_gradients(function, *a))(hidden, head, targets)
    outputs = [x.aval.size for e in primitives(jaxpr.jaxpr) for x in e.outvars]
    return max(outputs)


def test_logits_of_all_tokens_never_exist_forward_or_backward():
    inputs = _inputs()
    assert _largest_array(_plain, *inputs) == B * T * V
    largest = _largest_array(lambda *i: losses.token_losses(*i, chunk=6), *inputs)
    assert largest < B * T * V
    assert largest == max(6 * V, 24 * D)  # 4 chunks of 6 tokens: 24 hidden states

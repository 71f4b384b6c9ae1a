import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.nn.layers import REGISTER_EPSILON, TOKEN_EPSILON, Norm
from tests.harness.models import normal


@pytest.mark.parametrize("heads", [(), (3,)])
def test_norm_is_the_root_mean_square(heads):
    x = normal(0, 2, 5, *heads, 8)
    scale = normal(1, 8)
    y = Norm("float32", 2).apply({"params": {"scale": scale}}, x)
    epsilon = np.full((5, *(1 for _ in heads), 1), TOKEN_EPSILON)
    epsilon[:2] = REGISTER_EPSILON
    expected = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + epsilon) * scale
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_layer_norm_is_the_published_formula():
    """Lei Ba et al., arXiv:1607.06450, with an ε of its own for registers."""
    x, scale, bias = normal(0, 2, 5, 8), normal(1, 8), normal(2, 8)
    y = Norm("float32", 2, "layer").apply({"params": {"scale": scale, "bias": bias}}, x)
    epsilon = np.full((5, 1), TOKEN_EPSILON)
    epsilon[:2] = REGISTER_EPSILON
    mean, variance = np.mean(x, -1, keepdims=True), np.var(x, -1, keepdims=True)
    expected = (x - mean) / np.sqrt(variance + epsilon) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_norm_computes_in_float32_and_returns_its_dtype():
    x = (1e3 * normal(0, 1, 3, 64)).astype(jnp.bfloat16)
    variables = {"params": {"scale": jnp.ones(64)}}
    y = Norm("bfloat16").apply(variables, x)
    exact = Norm("float32").apply(variables, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_a_zero_register_has_the_gradient_of_a_normal_vector():
    """Not 1/√1e-5 = 316: a gradient grows by a multiple of this in every layer."""
    norm = Norm("float32", 1)
    variables = {"params": {"scale": jnp.ones(8)}}
    direction = jnp.broadcast_to(normal(0, 8), (1, 2, 8))
    run = jax.jit(lambda x: jax.jvp(lambda x: norm.apply(variables, x), (x,), (direction,))[1])
    np.testing.assert_allclose(run(jnp.zeros((1, 2, 8)))[0, 0], 10 * direction[0, 0], rtol=1e-5)

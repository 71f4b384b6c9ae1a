import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rbf_jax import rbf_attention
from rbf_jax.nn import rbf_attention_fn
from tests.harness.models import normal, random_variables

B, T, N, H, D = 2, 5, 2, 4, 8
LENGTHS = np.asarray([5, 3])
PADDING = np.arange(T)[None] < LENGTHS[:, None]
OPTIONS = {"gamma": 0.3, "key_norm_weight": 0.5}


def _expected(kernels, x, **options):
    """The layer by hand: projections and the operation."""
    query, key, value = (
        jnp.einsum("...td,dnh->...tnh", x, kernels[name]) for name in ("query", "key", "value")
    )
    out = rbf_attention(query, key, value, **options)
    return jnp.einsum("...tnh,nhd->...td", out, kernels["out"])


def _mask():
    """As Flax makes it: float32, causal and padded keys."""
    padding = nn.make_attention_mask(jnp.ones((B, T)), PADDING.astype(np.float32))
    return nn.combine_masks(nn.make_causal_mask(jnp.ones((B, T))), padding)


@pytest.mark.parametrize("normalize", [True, False])
def test_linen_layer_with_masks_jit_and_gradients(normalize):
    options = {**OPTIONS, "normalize": normalize}
    attention_fn = functools.partial(rbf_attention_fn, implementation="xla", **options)
    layer = nn.MultiHeadDotProductAttention(N, use_bias=False, attention_fn=attention_fn)
    x, cotangent = normal(0, B, T, D), normal(1, B, T, D)
    variables = random_variables(layer, x)

    @jax.jit
    def run(variables):
        kernels = {name: value["kernel"] for name, value in variables["params"].items()}
        out, pullback = jax.vjp(lambda v: layer.apply(v, x, mask=_mask()), variables)
        expected, expected_pullback = jax.vjp(
            lambda k: _expected(k, x, is_causal=True, key_value_seq_lengths=LENGTHS, **options),
            kernels,
        )
        gradients = {n: g["kernel"] for n, g in pullback(cotangent)[0]["params"].items()}
        return (out, gradients), (expected, expected_pullback(cotangent)[0])

    ours, expected = run(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_nnx_layer_with_mask_and_is_causal(normalize):
    options = {**OPTIONS, "normalize": normalize}
    attention_fn = functools.partial(rbf_attention_fn, **options)
    layer = nnx.MultiHeadAttention(
        4,
        D,
        num_kv_heads=2,
        qkv_features=16,
        use_bias=False,
        decode=False,
        attention_fn=attention_fn,
        rngs=nnx.Rngs(0),
    )
    x = normal(0, B, T, D)
    mask = PADDING[:, None, None, :]
    kernels = {n: getattr(layer, n).kernel[...] for n in ("query", "key", "value", "out")}

    @nnx.jit
    def run(layer, x):
        return layer(x, mask=mask, is_causal=True)

    expected = jax.jit(
        lambda k: _expected(k, x, is_causal=True, key_value_seq_lengths=LENGTHS, **options)
    )
    np.testing.assert_allclose(run(layer, x), expected(kernels), atol=1e-6)


@pytest.mark.parametrize("mask_shape", [(3, 2, N, T, T), (2, 1, 1, T), (T, T)])
def test_any_batch_axes_and_masks_that_broadcast(mask_shape):
    query, key, value = (normal(i, 3, 2, T, N, H) for i in range(3))
    mask = np.random.default_rng(3).random(mask_shape) < 0.7
    out = jax.jit(rbf_attention_fn)(query, key, value, mask=mask)
    full = np.broadcast_to(mask, (3, 2, N, T, T))
    each = jax.jit(jax.vmap(jax.vmap(lambda q, k, v, m: rbf_attention(q, k, v, m))))
    np.testing.assert_allclose(out, each(query, key, value, full), atol=1e-6)


def test_no_batch_axis():
    query, key, value = (normal(i, T, N, H) for i in range(3))
    run = jax.jit(
        lambda *x: (rbf_attention_fn(*x, is_causal=True), rbf_attention(*x, is_causal=True))
    )
    np.testing.assert_allclose(*run(query, key, value), atol=1e-6)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtype_is_that_of_the_computation(dtype):
    inputs = [normal(i, B, T, N, H) for i in range(3)]
    out = jax.eval_shape(functools.partial(rbf_attention_fn, dtype=dtype), *inputs)
    assert out.dtype == (dtype or jnp.float32)


@pytest.mark.parametrize(
    "option", [{"origin_sink": True}, {"sink_logits": np.float32([1, -2])}, {"normalize": False}]
)
def test_linen_sows_the_weights_that_were_used(option):
    gamma = np.asarray([0.3, 0.2], np.float32)
    attention_fn = functools.partial(rbf_attention_fn, **{**OPTIONS, "gamma": gamma, **option})
    layer = nn.MultiHeadDotProductAttention(N, use_bias=False, attention_fn=attention_fn)
    x = normal(0, 1, B, T, D)
    variables = random_variables(layer, x)

    @jax.jit
    def run(variables):
        return layer.apply(variables, x, mask=_mask(), sow_weights=True, mutable=["intermediates"])

    out, sown = run(variables)
    (weights,) = sown["intermediates"]["attention_weights"]
    assert weights.shape == (1, B, N, T, T)
    kernels = {name: value["kernel"] for name, value in variables["params"].items()}
    value = np.einsum("...td,dnh->...tnh", x, kernels["value"])
    attended = np.einsum("...nts,...snh->...tnh", weights, value)
    expected = np.einsum("...tnh,nhd->...td", attended, kernels["out"])
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_nnx_sows_the_weights_that_were_used():
    layer = nnx.MultiHeadAttention(
        N, D, decode=False, attention_fn=rbf_attention_fn, rngs=nnx.Rngs(0)
    )

    @nnx.capture(nnx.Intermediate)
    def run(layer, x):
        return layer(x, is_causal=True, sow_weights=True)

    _, sown = run(layer, normal(0, B, T, D))
    (weights,) = sown["attention_weights"].get_value()
    assert weights.shape == (B, N, T, T)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.triu(weights, 1), 0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"bias": np.zeros((1, N, T, T), np.float32)}, "bias is not supported .* is a ndarray"),
        ({"dropout_rate": 0.1}, "dropout_rate=0.1 with deterministic=False is not supported"),
        ({"precision": "highest"}, "precision='highest' is not supported"),
        ({"einsum_dot_general": jax.lax.dot_general}, "einsum_dot_general is not supported"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "qk_attn_weights_einsum is not supported"),
        ({"attn_weights_value_einsum": jnp.einsum}, "attn_weights_value_einsum is not supported"),
    ],
)
def test_what_cannot_be_done_raises(option, message):
    inputs = [normal(i, B, T, N, H) for i in range(3)]
    with pytest.raises(NotImplementedError, match=message):
        rbf_attention_fn(*inputs, **option)


def test_a_sink_without_a_denominator_raises():
    inputs = [normal(i, B, T, N, H) for i in range(3)]
    with pytest.raises(ValueError, match="origin_sink=True has no effect with normalize=False"):
        rbf_attention_fn(*inputs, normalize=False, origin_sink=True)
    with pytest.raises(ValueError, match="sink_logits has no effect with normalize=False"):
        rbf_attention_fn(*inputs, normalize=False, sink_logits=1.0)


def test_wrong_mask_raises():
    inputs = [normal(i, B, T, N, H) for i in range(3)]
    with pytest.raises(ValueError, match=r"mask has shape \(3, 5, 5\), .* \(2, 2, 5, 5\)"):
        rbf_attention_fn(*inputs, mask=np.ones((3, T, T)))


def test_layers_that_ask_for_dropout_raise_and_deterministic_ones_run():
    x = normal(0, B, T, D)
    linen = nn.MultiHeadDotProductAttention(N, dropout_rate=0.1, attention_fn=rbf_attention_fn)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.1 with"):
        jax.eval_shape(lambda: linen.init(rngs, x, deterministic=False))
    jax.eval_shape(lambda: linen.init(rngs, x, deterministic=True))
    layer = nnx.MultiHeadAttention(
        N, D, dropout_rate=0.1, decode=False, attention_fn=rbf_attention_fn, rngs=nnx.Rngs(0)
    )
    with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.1 with"):
        layer(x, deterministic=False)
    assert layer(x, deterministic=True).shape == x.shape


def test_the_operation_itself_as_attention_fn_refuses_dropout():
    """linen drops arguments that a signature does not name; nnx passes more than it names."""
    x = normal(0, B, T, D)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}

    def run(rate, **options):
        layer = nn.MultiHeadDotProductAttention(N, dropout_rate=rate, attention_fn=rbf_attention)
        return jax.eval_shape(lambda: layer.init_with_output(rngs, x, **options)[0])

    with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.1 with .*rbf_attention_fn"):
        run(0.1, deterministic=False)
    for options in ((0.1, {"deterministic": True}), (0.0, {"deterministic": False}), (0.0, {})):
        assert run(options[0], **options[1]).shape == x.shape
    layer = nnx.MultiHeadAttention(
        N, D, dropout_rate=0.1, decode=False, attention_fn=rbf_attention, rngs=nnx.Rngs(0)
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropout_rng'"):
        layer(x, deterministic=False)
    inputs = [normal(i, B, T, N, H) for i in range(3)]
    with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.5 with deterministic=False"):
        rbf_attention(*inputs, dropout_rate=0.5)

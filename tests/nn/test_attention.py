import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.nn.attention import Attention, exclude_own_value
from rbf_jax.nn.positions import sinusoids
from tests.harness.models import normal, primitives, random_variables, small_config

B, R, T, D, H = 2, 2, 6, 16, 4
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 0]], jnp.int32)


def _layer(attention=None, **changes):
    layer = Attention(small_config(attention, **changes))
    x = normal(0, B, layer.config.num_registers + T, D)
    angles = None
    if layer.config.positions in ("susie", "rope"):
        angles = sinusoids(jnp.arange(T, dtype=jnp.int32)[None], H)
    return layer, x, angles


def _heads(kernel, x):
    return np.einsum("btd,dnh->btnh", x, kernel)


CASES = {
    "registers, one call": ({}, {}, False),
    "registers, segments": ({}, {"positions": "rope"}, True),
    "learned sink, segments": ({"sink": "learned", "learn_gamma": True}, {}, True),
    "dot, learned sink": ({"kind": "dot", "sink": "learned"}, {"num_registers": None}, False),
    "sink, one call": ({"sink": "origin", "learn_key_norm_weight": True}, {}, False),
    "alibi, window": ({"window": 2}, {"positions": "alibi"}, True),
    "dot, no registers": (
        {"kind": "dot", "qk_norm": True, "sink": "none"},
        {"num_kv_heads": None},
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_sown_weights_times_values_are_the_output(case):
    attention, changes, use_segments = CASES[case]
    layer, x, angles = _layer(attention, **changes)
    registers = layer.config.num_registers
    segments = SEGMENTS if use_segments else None
    variables = random_variables(layer, x, angles, segments)

    @jax.jit
    def apply(variables, x):
        return layer.apply(variables, x, angles, segments, mutable=["intermediates"])

    out, sown = apply(variables, x)
    (weights,) = sown["intermediates"]["attention_weights"]
    assert weights.shape == (B, 4, T, registers + T)
    assert weights.dtype == jnp.float32
    if layer.config.attention.has_virtual_sink:
        assert weights.sum(-1).min() < 0.99
        assert weights.sum(-1).max() < 1 + 1e-5
    else:
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    parameters = variables["params"]
    value = _heads(parameters["value"]["kernel"], x)
    value = np.repeat(value, 4 // value.shape[2], axis=2)
    attended = np.einsum("bnts,bsnh->btnh", weights, value)
    expected = np.einsum("btnh,nhd->btd", attended, parameters["out"]["kernel"])
    np.testing.assert_allclose(out[:, registers:], expected, atol=3e-5)


def test_sown_norms_and_maximum():
    layer, x, _ = _layer(
        {"learn_gamma": True, "learn_key_norm_weight": True}, positions="none", num_kv_heads=None
    )
    variables = random_variables(layer, x)
    apply = jax.jit(lambda v: layer.apply(v, x, mutable=["intermediates"]))
    _, sown = apply(variables)
    sown = {name: value for name, (value,) in sown["intermediates"].items()}
    parameters = variables["params"]
    gamma = 0.5 * np.exp(parameters["log_gamma"])  # 1/√H at the start
    np.testing.assert_allclose(sown["gamma"], gamma, rtol=1e-6)
    np.testing.assert_array_equal(sown["key_norm_weight"], parameters["key_norm_weight"])
    query, key = (_heads(parameters[name]["kernel"], x) for name in ("query", "key"))
    norms = np.linalg.norm(key, axis=-1)
    np.testing.assert_allclose(sown["key_norms"], norms, rtol=1e-4)
    products = 2 * gamma * np.einsum("btnh,bsnh->btsn", query[:, R:], key)
    logits = products - gamma * parameters["key_norm_weight"] * norms[:, None] ** 2
    seen = np.tril(np.ones((T, R + T), bool), R)
    np.testing.assert_allclose(sown["logit_max"], logits[:, seen].max(), rtol=1e-4)


def test_what_is_not_asked_for_is_not_computed():
    layer, x, angles = _layer({"implementation": "xla"})
    variables = random_variables(layer, x, angles)

    def count(mutable):
        jaxpr = jax.make_jaxpr(lambda v: layer.apply(v, x, angles, mutable=mutable))(variables)
        return sum(e.primitive.name == "dot_general" for e in primitives(jaxpr.jaxpr))

    # Four projections, q·k and weights·v; q·k once more for the largest logit, and once more where
    # the weights are asked for.
    assert [count(asked) for asked in (False, ["statistics"], ["intermediates"])] == [6, 7, 8]


def test_dot_is_dot_product_attention():
    dot = {"kind": "dot", "sink": "none"}
    standard, x, _ = _layer(dot, positions="none")
    rbf_scale, _, _ = _layer({**dot, "dot_scale": "rbf"}, positions="none")
    variables = random_variables(standard, x)
    kernels = {name: value["kernel"] for name, value in variables["params"].items()}
    heads = [jnp.asarray(_heads(kernels[name], x)) for name in ("query", "key", "value")]

    @jax.jit
    def run(variables, heads):
        attend = functools.partial(jax.nn.dot_product_attention, *heads, is_causal=True)
        return (
            (standard.apply(variables, x), attend(scale=1 / math.sqrt(H))),
            (rbf_scale.apply(variables, x), attend(scale=2 / math.sqrt(H))),
        )

    for out, attended in run(variables, heads):
        expected = np.einsum("btnh,nhd->btd", attended, kernels["out"])
        np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["rbf", "dot"])
def test_sinks_are_one_another_at_the_origin(kind):
    """A learned sink starts as the origin sink, which a register is whose key and value are 0."""
    layers = {
        sink: _layer({"kind": kind, "sink": sink}, positions="none", num_registers=None)[0]
        for sink in ("none", "origin", "learned", "register")
    }
    x, cotangent = normal(0, B, T, D), normal(1, B, T, D)
    zero = jnp.zeros((B, 1, D))
    variables = jax.tree.map(
        lambda p: 20 * p if p.ndim > 1 else p, layers["learned"].init(jax.random.key(0), x)
    )
    logits = variables["params"].pop("sink_logits")
    np.testing.assert_array_equal(logits, np.zeros(4, np.float32))

    @jax.jit
    def run(variables):
        def learned(logits):
            params = {**variables["params"], "sink_logits": logits}
            return layers["learned"].apply({"params": params}, x)

        out, pullback = jax.vjp(learned, logits)
        found = {
            "learned": out,
            "origin": layers["origin"].apply(variables, x),
            "register": layers["register"].apply(variables, jnp.concatenate([zero, x], axis=1))[
                :, 1:
            ],
        }
        far = learned(logits - 1e4), layers["none"].apply(variables, x)
        return found, pullback(cotangent)[0], far

    found, gradient, far = run(variables)
    for sink in ("origin", "register"):
        np.testing.assert_allclose(found["learned"], found[sink], atol=1e-6, err_msg=sink)
    assert np.all(np.abs(gradient) > 1e-4)
    np.testing.assert_allclose(*far, atol=1e-6)
    assert np.abs(found["origin"] - far[1]).max() > 1e-2


def test_gamma_and_lambda_start_as_configured_and_learn():
    options = {"gamma": 0.7, "key_norm_weight": 0.3}
    learn = {"learn_gamma": True, "learn_key_norm_weight": True}
    fixed, x, _ = _layer(options, positions="none")
    layer, _, _ = _layer({**options, **learn}, positions="none")
    cotangent = normal(1, *x.shape)

    @jax.jit
    def run(key):
        variables = layer.init(key, x)
        variables = jax.tree.map(lambda p: 20 * p if p.ndim > 1 else p, variables)
        gradients = jax.grad(lambda v: jnp.vdot(layer.apply(v, x), cotangent))(variables)
        out, sown = layer.apply(variables, x, mutable=["intermediates"])
        return gradients, out, fixed.apply(variables, x), sown

    gradients, out, expected, sown = run(jax.random.key(0))
    np.testing.assert_array_equal(sown["intermediates"]["gamma"][0], np.full(4, 0.7, np.float32))
    np.testing.assert_array_equal(
        sown["intermediates"]["key_norm_weight"][0], np.full(4, 0.3, np.float32)
    )
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for name in ("log_gamma", "key_norm_weight"):
        assert np.all(np.abs(gradients["params"][name]) > 1e-4)


def test_qk_norm_normalises_keys_per_head():
    layer, x, _ = _layer({"qk_norm": True, "sink": "none"}, positions="none")
    variables = random_variables(layer, x)
    variables["params"]["key_norm"] = {"scale": np.full(H, 3, np.float32)}
    apply = jax.jit(lambda v: layer.apply(v, 5 * x, mutable=["intermediates"]))
    _, sown = apply(variables)
    np.testing.assert_allclose(sown["intermediates"]["key_norms"][0], 3 * np.sqrt(H), rtol=1e-3)


@pytest.mark.parametrize("positions", ["none", "susie"])
def test_zero_registers_start_at_the_origin(positions):
    """x = 0 stays 0 through norm and projections; SuSiE adds its small offset to the key."""
    layer, _, angles = _layer(positions=positions)
    x = jnp.zeros((B, R + T, D))

    @jax.jit
    def run(key):
        variables = layer.init(key, x, angles)
        return variables, *layer.apply(variables, x, angles, mutable=["intermediates"])

    variables, out, sown = run(jax.random.key(0))
    norms = sown["intermediates"]["key_norms"][0][:, :R]
    if positions == "none":
        np.testing.assert_array_equal(norms, 0)
    else:
        offsets = variables["params"]["susie"]["registers"]
        np.testing.assert_allclose(norms[0], np.linalg.norm(offsets, axis=-1), rtol=1e-5)
        assert norms.max() < 0.1
    np.testing.assert_array_equal(out[:, :R], 0)  # their values are 0, and so is what they see


def test_exclusive_output_is_orthogonal_to_the_own_value():
    out, value = normal(0, B, T, 4, H), normal(1, B, T, 2, H)
    value = np.array(value)
    value[0, 0, 0] = 0
    value[0, 1] *= 1e-25  # whose square is 0 in float32

    @jax.jit
    def run(out, value):
        gradient = jax.grad(lambda v: jnp.vdot(exclude_own_value(out, v), out))(value)
        return exclude_own_value(out, value), gradient

    exclusive, gradient = run(out, value)
    own = np.repeat(value, 2, axis=2)
    own = own / np.maximum(np.linalg.norm(own.astype(float), axis=-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(np.sum(exclusive * own, -1), 0, atol=1e-5)
    np.testing.assert_array_equal(exclusive[0, 0, :2], out[0, 0, :2])  # v = 0: as it was
    # What is taken away lies along v, and nothing else is.
    removed = out - exclusive
    along = np.sum(removed * own, -1, keepdims=True) * own
    np.testing.assert_allclose(removed, along, atol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_exclusive_gradients_are_those_of_the_formula():
    out, value, cotangent = normal(0, B, T, 4, H), normal(1, B, T, 2, H), normal(2, B, T, 4, H)

    def formula(out, value):
        unit = jnp.repeat(value / jnp.linalg.norm(value, axis=-1, keepdims=True), 2, axis=2)
        return out - jnp.sum(out * unit, axis=-1, keepdims=True) * unit

    @jax.jit
    def run(out, value):
        return [jax.vjp(f, out, value)[1](cotangent) for f in (exclude_own_value, formula)]

    for ours, expected in zip(*run(out, value)):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("positions", ["rope", "alibi"])  # one call of the operation, and two
def test_a_layer_that_does_not_normalise_sums_kernels(positions):
    layer, x, angles = _layer({"normalize": False, "gamma": 0.1}, positions=positions)
    variables = random_variables(layer, x, angles)
    _, sown = jax.jit(lambda v: layer.apply(v, x, angles, mutable=["intermediates"]))(variables)
    normalised = Attention(small_config({"gamma": 0.1}, positions=positions))

    @jax.jit
    def run(variables):
        # An output projection that keeps the heads apart shows what went into it.
        out = jnp.eye(D).reshape(4, H, D)
        variables = {"params": {**variables["params"], "out": {"kernel": out}}}
        return layer.apply(variables, x, angles), normalised.apply(variables, x, angles)

    sums, means = (y[:, R:].reshape(B, T, 4, H) for y in run(variables))
    bound_less_total = sown["intermediates"]["bound_gap"][0].swapaxes(1, 2)  # γ‖q‖² − logsumexp
    expected = means * np.exp(-bound_less_total)[..., None]
    np.testing.assert_allclose(sums, expected, atol=2e-5 * np.abs(expected).max())
    assert np.abs(sums - means).max() > 0.1


def test_exclusive_layer_projects_before_the_output_projection():
    layer, x, angles = _layer({"exclusive": True})
    plain, _, _ = _layer()
    variables = random_variables(layer, x, angles)
    # An output projection that keeps the heads apart shows what went into it.
    variables["params"]["out"]["kernel"] = np.eye(D, dtype=np.float32).reshape(4, H, D)
    value = jnp.asarray(_heads(variables["params"]["value"]["kernel"], x))

    @jax.jit
    def run(variables):
        out, attended = (
            module.apply(variables, x, angles).reshape(B, R + T, 4, H) for module in (layer, plain)
        )
        return out, attended, exclude_own_value(attended, value)

    out, attended, expected = run(variables)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert np.abs(out - attended).max() > 0.01

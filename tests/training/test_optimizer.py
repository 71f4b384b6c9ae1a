import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from rbf_jax.nn import AttentionConfig, CausalLM, TransformerConfig
from rbf_jax.training.optimizer import decay_mask, make_optimizer, make_schedule


@pytest.fixture
def config():
    return base.get_config().optimizer


def test_schedule(config):
    config.learning_rate, config.final_learning_rate, config.warmup_steps = 1.0, 0.1, 4
    rates = [float(make_schedule(config, 10)(step - 1)) for step in (1, 2, 4, 7, 10)]
    # Half a cosine from step 4 to step 10 has its middle at step 7.
    assert rates == pytest.approx([0.25, 0.5, 1.0, 0.55, 0.1])


def test_schedule_without_warmup(config):
    config.learning_rate, config.final_learning_rate, config.warmup_steps = 1.0, 0.1, 0
    rates = [float(make_schedule(config, 10)(step - 1)) for step in (1, 10)]
    assert rates == pytest.approx([0.1 + 0.9 * (1 + np.cos(np.pi / 10)) / 2, 0.1])


def test_what_decays():
    attention = AttentionConfig(
        learn_gamma=True, learn_key_norm_weight=True, qk_norm=True, sink="learned"
    )
    model_config = TransformerConfig(
        *(32, 16),
        norm="layer",
        use_bias=True,
        num_layers=1,
        d_model=16,
        num_heads=2,
        num_registers=2,
        tie_embeddings=False,
        attention=attention,
    )
    model = CausalLM(model_config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(shapes["params"]))
    decays = {"/".join(key.key for key in path): value for path, value in mask}
    layer, attention = "block_0", "block_0/attention"
    assert {name for name, value in decays.items() if value} == {
        *("embedding/embedding", "head", f"{layer}/mlp/in/kernel", f"{layer}/mlp/out/kernel"),
        *(f"{attention}/{name}/kernel" for name in ("query", "key", "value", "out")),
    }
    assert {name for name, value in decays.items() if not value} == {
        *("final_norm/scale", f"{layer}/attention_norm/scale", f"{layer}/mlp_norm/scale"),
        *(f"{attention}/query_norm/scale", f"{attention}/key_norm/scale"),
        *(f"{attention}/log_gamma", f"{attention}/key_norm_weight", f"{attention}/sink_logits"),
        *("registers/embedding", f"{attention}/susie/weight", f"{attention}/susie/registers"),
        *(f"{attention}/{name}/bias" for name in ("query", "key", "value", "out")),
        *(f"{layer}/attention_norm/bias", f"{layer}/mlp_norm/bias", "final_norm/bias"),
        *(f"{layer}/mlp/in/bias", f"{layer}/mlp/out/bias"),
    }


def test_the_dial_goes_to_one_in_a_straight_line_and_the_rest_learns(config):
    config.clip_norm, config.anneal_steps, config.warmup_steps = 1.0, 4, 0
    start = {"kernel": jnp.ones((2, 2)), "key_norm_weight": jnp.array([0.0, 0.5])}
    # Were it counted in the norm, the dial's gradient would leave nothing of the other's.
    grads = {"kernel": jnp.full((2, 2), 0.5), "key_norm_weight": jnp.array([1e6, -1e6])}
    annealing = make_optimizer(config, 10)
    params, state, weights = start, annealing.init(start), []
    for _ in range(6):
        update, state = annealing.update(grads, state, params)
        params = optax.apply_updates(params, update)
        weights.append(params["key_norm_weight"])
    expected = [[0.25, 0.625], [0.5, 0.75], [0.75, 0.875], [1, 1], [1, 1], [1, 1]]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_array_equal(weights[3:], 1.0)

    config.anneal_steps = 0
    alone = make_optimizer(config, 10)
    params_alone = {"kernel": start["kernel"]}
    state = alone.init(params_alone)
    for _ in range(6):
        update, state = alone.update({"kernel": grads["kernel"]}, state, params_alone)
        params_alone = optax.apply_updates(params_alone, update)
    np.testing.assert_array_equal(params["kernel"], params_alone["kernel"])


def updates(config, grads, params):
    optimizer = make_optimizer(config, 10)
    return optimizer.update(grads, optimizer.init(params), params)[0]


def test_decay_and_clipping(config):
    config.learning_rate = config.final_learning_rate = 0.5
    config.warmup_steps, config.weight_decay, config.clip_norm = 0, 0.1, 1.0
    params = {"kernel": jnp.full((2, 2), 3.0), "scale": jnp.full((2,), 3.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    result = updates(config, zero, params)
    np.testing.assert_allclose(result["kernel"], -0.5 * 0.1 * 3, rtol=1e-6)
    np.testing.assert_array_equal(result["scale"], 0)


@pytest.mark.parametrize(("clip_norm", "factor"), [(1.0, 0.1), (None, 1.0)])
def test_clipping_is_by_the_global_norm(clip_norm, factor, config):
    config.clip_norm = clip_norm
    optimizer = make_optimizer(config, 200)
    params = {"kernel": jnp.zeros((2, 2)), "scale": jnp.zeros((2,))}
    grads = {"kernel": jnp.full((2, 2), 4.0), "scale": jnp.full((2,), 18.0**0.5)}  # norm 10
    state = optimizer.update(grads, optimizer.init(params), params)[1]
    mean = optax.tree.get(state, "mu")  # Adam's first moment: (1 - b1) times the gradient it saw
    np.testing.assert_allclose(mean["kernel"], (1 - config.b1) * factor * 4, rtol=1e-5)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.nn import CausalLM
from tests.harness.models import LENGTH, VOCAB, normal, primitives, small_config, small_model

HALF = LENGTH // 2
TOKENS = np.random.default_rng(5).permutation(VOCAB)[:LENGTH].astype(np.int32)  # all distinct
PACKED = {
    "positions": np.tile(np.arange(HALF, dtype=np.int32), 2)[None],
    "segment_ids": np.repeat(np.int32([1, 2]), HALF)[None],
}


def _reach(model, variables, tokens, t, **rules):
    """Logits, and which tokens' embeddings have an effect on those at (last row, t)."""

    @jax.jit
    def run(variables):
        logits, pullback = jax.vjp(lambda v: model.apply(v, tokens, **rules), variables)
        cotangent = jnp.zeros_like(logits).at[-1, t].set(normal(6, VOCAB))
        return logits, pullback(cotangent)[0]

    logits, gradients = run(variables)
    rows = gradients["params"]["embedding"]["embedding"][tokens.reshape(-1)]
    return logits, np.any(rows != 0, axis=-1)


CASES = {
    "susie": {},
    "rope": {"window": 4, "sink": "none"},
    "alibi": {"window": 4, "sink": "learned"},
    "learned": {"qk_norm": True, "sink": "origin"},
    "none": {"exclusive": True, "kind": "dot", "sink": "none"},
}
OTHERS = [
    ("alibi", {"kind": "dot", "sink": "learned"}),
    ("susie", {"normalize": False, "gamma": 0.05}),
]


@pytest.mark.parametrize(("positions", "attention"), [*CASES.items(), *OTHERS])
def test_no_token_sees_later_ones_or_other_documents(positions, attention):
    """By gradients; and packed documents have the logits that they have each in a row."""
    model, variables = small_model(attention, positions=positions)
    packed, seen = _reach(model, variables, TOKENS[None], HALF + 3, **PACKED)
    np.testing.assert_array_equal(np.flatnonzero(seen), np.arange(HALF, HALF + 4))
    apart = jax.jit(lambda v: model.apply(v, TOKENS.reshape(2, HALF)))(variables)
    assert packed.shape == (1, LENGTH, VOCAB)
    np.testing.assert_allclose(packed.reshape(2, HALF, VOCAB), apart, atol=2e-4)


@pytest.mark.parametrize("positions", ["susie", "rope"])
def test_without_rules_all_earlier_tokens_are_seen(positions):
    model, variables = small_model(positions=positions)
    _, seen = _reach(model, variables, TOKENS[None], 7)
    np.testing.assert_array_equal(np.flatnonzero(seen), np.arange(8))


def test_window_reaches_back_once_per_layer():
    model, variables = small_model({"window": 1})
    _, seen = _reach(model, variables, TOKENS[None], 7)
    np.testing.assert_array_equal(np.flatnonzero(seen), [5, 6, 7])


def test_registers_act_through_attention_only():
    """With values of 0 nothing of them is left: none of their rows is among the outputs."""
    model, variables = small_model(positions="none")

    @jax.jit
    def register_gradient(variables):
        logits, pullback = jax.vjp(lambda v: model.apply(v, TOKENS[None]), variables)
        gradients = pullback(jnp.ones_like(logits))[0]
        return gradients["params"]["registers"]["embedding"]

    assert np.all(register_gradient(variables) != 0)
    for name in ("block_0", "block_1"):
        value = variables["params"][name]["attention"]["value"]
        value["kernel"] = np.zeros_like(value["kernel"])
    assert np.all(register_gradient(variables) == 0)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_token_losses_are_the_cross_entropy_of_the_logits(tie_embeddings):
    model, variables = small_model(tie_embeddings=tie_embeddings, loss_chunk=5)
    targets = np.roll(TOKENS, -1)[None]

    @jax.jit
    def run(variables):
        logits = model.apply(variables, TOKENS[None], **PACKED)
        nll = model.apply(variables, TOKENS[None], targets, **PACKED, method="token_losses")
        return logits, nll

    logits, nll = run(variables)
    log_p = np.asarray(jax.nn.log_softmax(logits))[0, np.arange(LENGTH), targets[0]]
    assert nll.shape == (1, LENGTH)
    np.testing.assert_allclose(nll[0], -log_p, rtol=1e-4, atol=1e-5)
    assert ("head" in variables["params"]) != tie_embeddings


def test_positions_left_out_count_along_the_row():
    model, variables = small_model()
    count = np.arange(LENGTH, dtype=np.int32)[None]
    run = jax.jit(
        lambda v: [
            model.apply(v, TOKENS[None], positions) for positions in (None, count, count + 1)
        ]
    )
    left_out, given, shifted = run(variables)
    np.testing.assert_allclose(left_out, given, atol=1e-5)
    # Distances between tokens are the same, but SuSiE adds p_t to the queries' and keys' content.
    assert np.abs(shifted - given).max() > 1e-3


def test_bfloat16_is_for_activations_only():
    exact, variables = small_model()
    model, same_shapes = small_model(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(same_shapes)} == {jnp.dtype(jnp.float32)}
    small = jax.tree.map(lambda x: x / 2, variables)
    run = jax.jit(lambda v: (exact.apply(v, TOKENS[None]), model.apply(v, TOKENS[None])))
    logits, rounded = run(small)
    assert logits.dtype == rounded.dtype == jnp.float32
    assert 0 < np.abs(rounded - logits).max() < 0.05 * np.abs(logits).max()
    jaxpr = jax.make_jaxpr(lambda v: model.apply(v, TOKENS[None]))(variables)
    products = [e for e in primitives(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert {x.aval.dtype for e in products for x in e.invars} == {jnp.dtype(jnp.bfloat16)}
    for name in ("rsqrt", "exp", "log", "sin"):
        dtypes = {
            e.invars[0].aval.dtype for e in primitives(jaxpr.jaxpr) if e.primitive.name == name
        }
        assert dtypes == {jnp.dtype(jnp.float32)}, name


def test_remat_recomputes_blocks_but_not_attention():
    plain, variables = small_model({"implementation": "xla"}, positions="none")
    remat, _ = small_model({"implementation": "xla"}, positions="none", remat=True)
    cotangent = normal(6, 1, LENGTH, VOCAB)

    def run(model, variables):
        logits, pullback = jax.vjp(lambda v: model.apply(v, TOKENS[None]), variables)
        return logits, pullback(cotangent)

    def count(model, name):
        jaxpr = jax.make_jaxpr(lambda v: run(model, v))(variables).jaxpr
        return sum(e.primitive.name == name for e in primitives(jaxpr))

    # GELU's tanh once per block, and once more in the backward pass; attention's log only once.
    assert (count(plain, "tanh"), count(remat, "tanh")) == (2, 4)
    assert count(plain, "log") == count(remat, "log") == 2
    a, b = jax.jit(lambda v: (run(plain, v), run(remat, v)))(variables)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1, np.abs(x).max()))


@pytest.mark.parametrize("remat", [False, True])
def test_what_is_sown_lies_under_its_layer(remat):
    model, variables = small_model(
        {"learn_gamma": True, "learn_key_norm_weight": True}, remat=remat
    )
    tokens = jnp.zeros((3, LENGTH), jnp.int32)

    def shapes(collection):
        apply = lambda v: model.apply(v, tokens, mutable=[collection])  # noqa: E731
        _, sown = jax.eval_shape(apply, variables)
        return jax.tree.map(lambda x: (x.shape, x.dtype.name), sown)

    layer = {
        "key_norms": (((3, 2 + LENGTH, 2), "float32"),),
        "logit_max": (((), "float32"),),
        "gamma": (((4,), "float32"),),
        "key_norm_weight": (((4,), "float32"),),
    }
    weights = {
        "attention_weights": (((3, 4, LENGTH, 2 + LENGTH), "float32"),),
        "value_norms": (((3, 2 + LENGTH, 2), "float32"),),
        "bound": (((3, 4, LENGTH), "float32"),),
        "bound_gap": (((3, 4, LENGTH), "float32"),),
    }
    for collection, expected in (("statistics", layer), ("intermediates", layer | weights)):
        assert shapes(collection) == {
            collection: {
                "block_0": {"attention": expected},
                "block_1": {"attention": expected},
                "register_norm": (((), "float32"),),
            }
        }
    assert set(jax.eval_shape(model.init, jax.random.key(0), tokens)) == {"params"}


def test_initialisation_and_the_gradient_of_zero_registers():
    """Zero registers must not take the whole of a clipped gradient; see nn/layers.py."""
    model = CausalLM(small_config(d_model=64, num_layers=3, num_heads=2, tie_embeddings=True))
    targets = np.roll(TOKENS, -1)[None]

    @jax.jit
    def run(key):
        variables = model.init(key, TOKENS[None])

        def loss(variables):
            return model.apply(variables, TOKENS[None], targets, method="token_losses").mean()

        return variables["params"], jax.grad(loss)(variables)["params"]

    parameters, gradients = run(jax.random.key(0))
    deviations = {
        "embedding": np.std(parameters["embedding"]["embedding"]),
        "query": np.std(parameters["block_2"]["attention"]["query"]["kernel"]),
        "attention out": np.std(parameters["block_2"]["attention"]["out"]["kernel"]),
        "mlp out": np.std(parameters["block_0"]["mlp"]["out"]["kernel"]),
    }
    expected = {
        "embedding": 0.02,
        "query": 0.02,
        "attention out": 0.02 / np.sqrt(6),
        "mlp out": 0.02 / np.sqrt(6),
    }
    for name, deviation in deviations.items():
        np.testing.assert_allclose(deviation, expected[name], rtol=0.1, err_msg=name)
    np.testing.assert_array_equal(parameters["registers"]["embedding"], 0)
    norms = {
        name: np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients[name])))
        for name in gradients
    }
    assert 0 < norms["registers"] < 0.1 * norms["embedding"]


def test_biases_are_where_gpt2_has_them_and_nowhere_by_default():
    def biases(**changes):
        model = CausalLM(small_config(**changes))
        shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS[None])["params"]
        paths = (jax.tree_util.keystr(p, simple=True, separator="/") for p in _paths(shapes))
        return {path for path in paths if path.endswith("bias") and "block_1" not in path}

    assert biases() == set()
    norms = {"block_0/attention_norm/bias", "block_0/mlp_norm/bias", "final_norm/bias"}
    assert biases(norm="layer") == norms
    attention = {f"block_0/attention/{name}/bias" for name in ("query", "key", "value", "out")}
    assert biases(use_bias=True) == attention | {"block_0/mlp/in/bias", "block_0/mlp/out/bias"}


def _paths(tree):
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_wrong_input_is_an_error():
    model, variables = small_model(positions="learned")
    tokens = jnp.zeros((2, LENGTH), jnp.int32)

    def check(message, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda v: model.apply(v, *args, **kwargs), variables)

    check("has length 13, but positions='learned' has context_length=12", jnp.zeros((2, 13), int))
    check(r"tokens has shape \(12,\), but must be \(B, T\)", tokens[0])
    check("tokens has shape .* and dtype float32, but must be integers", tokens.astype(jnp.float32))
    check(r"positions has shape \(12,\) .* integers of shape \(2, 12\)", tokens, tokens[0])
    check(r"segment_ids has shape \(2, 1\)", tokens, segment_ids=tokens[:, :1])
    check(r"targets has shape \(2, 3\)", tokens, tokens[:, :3], method="token_losses")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.analysis import diagnostics
from rbf_jax.analysis.diagnostics import QUANTILES, diagnose, look_inside, natural
from tests.harness.models import LENGTH, VOCAB, small_model

B, N, K, R, L = 2, 4, 2, 2, 2


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    segment_ids = np.ones((B, LENGTH), np.int32)
    segment_ids[1, 8:] = 0
    return {
        "tokens": rng.integers(0, VOCAB, (B, LENGTH), np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (B, 1)),
        "segment_ids": segment_ids,
    }


@pytest.fixture(scope="module")
def seen(batch):
    return look_inside(*small_model(), **batch)


def test_attention_weights_are_those_of_a_causal_model(seen):
    weights = seen.attention_weights
    assert weights.shape == (L, B, N, LENGTH, R + LENGTH)
    assert weights.dtype == np.float32
    assert seen.num_registers == R
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(seen.sink_weights, 0.0, atol=1e-5)
    later = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    assert not weights[..., R:][..., later].any()
    assert (weights[..., :R] > 0).all()
    assert (weights[0] != weights[1]).any()
    other_segment = weights[:, 1, :, 8:, R : R + 8]
    assert not other_segment.any()
    assert weights[:, 0, :, 8:, R : R + 8].any()


def test_key_norms(seen):
    assert seen.key_norms.shape == (L, B, R + LENGTH, K)
    np.testing.assert_array_equal(seen.register_key_norms, seen.key_norms[:, :, :R])
    np.testing.assert_array_equal(seen.text_key_norms, seen.key_norms[:, :, R:])
    # Registers see nothing but each other.
    np.testing.assert_allclose(*seen.register_key_norms.swapaxes(0, 1), rtol=1e-5)
    assert seen.text_key_norms.std() > 0.01


BARE = {"num_registers": 0, "num_layers": 1}


def test_a_sink_takes_what_is_missing(batch):
    model, variables = small_model({"sink": "origin"}, **BARE)
    seen = look_inside(model, variables, **batch)
    total = seen.attention_weights.sum(-1)
    assert seen.num_registers == 0
    assert (total < 1).all()
    assert (total > 0).all()
    np.testing.assert_allclose(seen.sink_weights, 1 - total)


def test_start_of_a_row_does_not_depend_on_what_follows(seen, batch):
    tokens = batch["tokens"].copy()
    tokens[1, 5:] += 1
    start = seen.start(1, 5)
    assert start.attention_weights.shape == (L, 1, N, 5, R + 5)
    np.testing.assert_array_equal(
        start.attention_weights[:, 0], seen.attention_weights[:, 1, :, :5, : R + 5]
    )
    other = look_inside(*small_model(), **(batch | {"tokens": tokens % VOCAB})).start(1, 5)
    np.testing.assert_allclose(start.attention_weights, other.attention_weights, atol=1e-6)
    np.testing.assert_allclose(start.key_norms, other.key_norms, rtol=1e-6)


def test_a_model_that_sows_nothing_is_refused():
    class Other(nn.Module):
        @nn.compact
        def __call__(self, tokens, positions=None, segment_ids=None):
            self.sow("intermediates", "tokens", tokens)

    with pytest.raises(ValueError, match=r"model=Other must sow attention_weights"):
        look_inside(Other(), {}, jnp.zeros((1, 2), jnp.int32))


def test_layers_are_in_the_order_of_their_numbers():
    names = ["block_10/a", "block_2/a", "block_2/b", "a_1"]
    assert sorted(names, key=natural) == ["a_1", "block_2/a", "block_2/b", "block_10/a"]


# Compiled once a model.
compiled = jax.jit(diagnose, static_argnums=0)


def diagnosed(model, params, batch):
    return compiled(model, params, {**batch, "inputs": batch["tokens"]})


@pytest.fixture(scope="module")
def numbers(batch):
    model, variables = small_model()
    return diagnosed(model, variables["params"], batch)


def test_diagnoses_are_those_of_what_is_seen(numbers, seen, batch):
    weights, is_text = seen.attention_weights, batch["segment_ids"] > 0

    def mean(values):  # (L, B, N, T)
        rows = values.swapaxes(1, 2)[:, :, is_text]
        return rows.mean(-1)

    entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1)
    np.testing.assert_allclose(numbers["entropy"], mean(entropy), rtol=1e-4)
    np.testing.assert_allclose(numbers["register_mass"], mean(weights[..., :R].sum(-1)), rtol=1e-4)
    np.testing.assert_allclose(numbers["first_token_mass"], mean(weights[..., R]), rtol=1e-4)
    np.testing.assert_allclose(numbers["sink_mass"], 0, atol=1e-5)
    apart = np.abs(np.arange(LENGTH)[:, None] - np.arange(LENGTH))
    text = weights[..., R:]
    distance = mean((text * apart).sum(-1)) / mean(text.sum(-1))
    np.testing.assert_allclose(numbers["distance"], distance, rtol=1e-4)
    norms = seen.text_key_norms[:, is_text].reshape(L, -1)
    np.testing.assert_allclose(
        numbers["key_norm_quantiles"], np.quantile(norms, QUANTILES, axis=1).T, rtol=1e-4
    )
    np.testing.assert_allclose(
        numbers["register_key_norm"], seen.register_key_norms[:, 0].mean(-1), rtol=1e-5
    )
    np.testing.assert_allclose(
        numbers["first_token_key_norm"], seen.text_key_norms[:, :, 0].mean((1, 2)), rtol=1e-5
    )
    M = min(LENGTH, 48)
    np.testing.assert_allclose(
        numbers["attention_map"], weights[:, 0, :, :M, : R + M], rtol=1e-4, atol=1e-6
    )
    assert numbers["gated"].shape == (L,)
    assert not numbers["gated"].any()
    assert (numbers["sink_value_norm"] > 0).all()


def test_norms_of_values(numbers, batch):
    model, variables = small_model()
    intermediates = diagnostics._intermediates(model, variables, **batch)
    for layer in range(L):
        sown = intermediates[f"block_{layer}"]["attention"]["value_norms"][0]
        registers, text = sown[0, :R].mean(-1), sown[:, R:]
        np.testing.assert_allclose(numbers["register_value_norm"][layer], registers, rtol=1e-4)
        known = text[batch["segment_ids"] > 0].ravel()
        np.testing.assert_allclose(
            numbers["value_norm_quantiles"][layer], np.quantile(known, QUANTILES), rtol=1e-4
        )
        np.testing.assert_allclose(
            numbers["first_token_value_norm"][layer], text[:, 0].mean(), rtol=1e-4
        )
        np.testing.assert_allclose(
            numbers["sink_value_norm"][layer], registers.mean() / known.mean(), rtol=1e-4
        )


def test_far_keys_are_gated(batch):
    model, variables = small_model()
    params = jax.tree.map(lambda x: x, variables["params"])
    query = params["block_1"]["attention"]["query"]["kernel"]
    # Of two heads ‖q‖² grows by 10⁴, logits by 10².
    params["block_1"]["attention"]["query"]["kernel"] = query.at[:, :2].multiply(100)
    found = diagnosed(model, params, batch)
    by_head = found["gated_by_head"]
    assert not by_head[0].any()
    assert (by_head[1, :2] > 0.5).all()
    assert not by_head[1, 2:].any()
    np.testing.assert_allclose(found["gated"], by_head.mean(-1), rtol=1e-6)


def test_a_sink_saves_rows_from_the_gate(batch):
    """Its logit 0 is in the kernel's sums: a row far from all keys is not far from the sink."""
    model, variables = small_model({"sink": "origin", "gamma": 1.0}, **BARE)
    params = jax.tree.map(lambda x: x, variables["params"])
    attention = params["block_0"]["attention"]
    # ‖q‖² of some tens, ‖k‖² of hundreds.
    attention["query"]["kernel"] = 3 * attention["query"]["kernel"]
    attention["key"]["kernel"] = 30 * attention["key"]["kernel"]
    with_sink = diagnosed(model, params, batch)["gated"][0]
    model, _ = small_model({"gamma": 1.0, "sink": "none"}, **BARE)
    without = diagnosed(model, params, batch)["gated"][0]
    assert without > 0.5
    assert with_sink < 0.1


def test_a_learned_sink_is_seen_with_its_own_logit(batch):
    """At 0 it is the origin sink; far below, rows need the gate; far above, the bound is unsafe."""
    model, variables = small_model({"sink": "learned", "gamma": 1.0}, **BARE)
    attention = variables["params"]["block_0"]["attention"]
    attention["query"]["kernel"] *= 3
    attention["key"]["kernel"] *= 30

    def found(logit):
        attention["sink_logits"] = jnp.full(N, logit)
        return diagnosed(model, variables["params"], batch)

    at_zero, below, above = map(found, (0.0, -1e4, 1e4))
    origin, _ = small_model({"sink": "origin", "gamma": 1.0}, **BARE)
    del attention["sink_logits"]
    expected = diagnosed(origin, variables["params"], batch)
    assert at_zero.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(at_zero[name], values, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(above["sink_logits"], np.full((1, N), 1e4, np.float32))
    assert at_zero["gated"][0] < 0.1
    assert below["gated"][0] > 0.5
    assert (below["sink_mass"] < 1e-6).all()
    assert (above["gated_by_head"] == 1).all()
    assert (above["sink_mass"] > 1 - 1e-6).all()


def test_without_registers_and_with_a_sink(batch):
    model, variables = small_model({"sink": "origin", "gamma": 1.0}, **BARE)
    found = diagnosed(model, variables["params"], batch)
    assert (found["sink_mass"] > 0).all()
    assert (found["register_mass"] == 0).all()
    assert found["register_key_norm"].shape == (1, 0)
    assert np.isfinite(found["sink_value_norm"]).all()


@pytest.mark.parametrize("window", [None, 3])
def test_even_shares_are_those_of_weights_that_are_all_alike(batch, window):
    attention = {"gamma": 1e-7, "sink": "origin", "window": window}
    model, variables = small_model(attention, num_layers=1)
    # Two documents in the second row, of 8 tokens and the rest.
    segments, positions = np.ones_like(batch["segment_ids"]), batch["positions"].copy()
    segments[1, 8:] = 2
    positions[1, 8:] -= 8
    rows = {**batch, "positions": positions, "segment_ids": segments}
    found = diagnosed(model, variables["params"], rows)
    np.testing.assert_allclose(found["sink_mass"], found["even_share"], rtol=1e-3)
    np.testing.assert_allclose(found["register_mass"], R * found["even_share"], rtol=1e-3)
    if window is None:
        np.testing.assert_allclose(found["first_token_mass"], found["even_share"], rtol=1e-3)

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.analysis.diagnostics import look_inside, natural
from tests.nn.models import LENGTH, VOCAB, small_model

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


def test_a_sink_takes_what_is_missing(batch):
    model, variables = small_model({"origin_sink": True}, num_registers=0, num_layers=1)
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

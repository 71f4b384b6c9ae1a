import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.inference import Sampling
from rbf_jax.inference.sampling import sample

P = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
DRAWS = 4000


def _shares(sampling, p=P):
    """How often each token is drawn."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (DRAWS, len(p)))
    keys = jax.random.split(jax.random.key(0), DRAWS)
    tokens = jax.jit(lambda x, keys: sample(x, keys, sampling))(logits, keys)
    assert tokens.dtype == jnp.int32
    return np.bincount(tokens, minlength=len(p)) / DRAWS


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), P),
        (Sampling(temperature=0.5), P**2 / (P**2).sum()),
        (Sampling(top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (Sampling(top_p=0.8), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        (Sampling(top_p=0.1), [0, 1, 0, 0, 0]),
        (Sampling(top_p=1.0), P),
        # top_p is of what top_k leaves: 0.4 of 0.65 is less than 0.62, of all it would be two.
        (Sampling(top_k=2, top_p=0.61), [0, 1, 0, 0, 0]),
        (Sampling(temperature=0), [0, 1, 0, 0, 0]),
        # Numbers that float32 has only just, and has not.
        (Sampling(temperature=1e-39), [0, 1, 0, 0, 0]),
        (Sampling(temperature=1e-300, top_p=0.9), [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_shares_are_the_probabilities(sampling, expected):
    np.testing.assert_allclose(_shares(sampling), expected, atol=0.03)
    np.testing.assert_array_equal(_shares(sampling) == 0, np.equal(expected, 0))


def test_of_equal_tokens_too_exactly_k_are_left():
    assert (_shares(Sampling(top_k=3), np.full(6, 1 / 6)) > 0).sum() == 3
    assert (_shares(Sampling(top_p=0.5), np.full(6, 1 / 6)) > 0).sum() == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be a number, at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0 must be None or an int, at least 1"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": True}, "top_k=True"),
        ({"top_p": 0.0}, "top_p=0.0 must be None or a number greater than 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"temperature": 0, "top_k": 3}, "top_k=3 has no effect with temperature=0"),
        ({"temperature": 0.0, "top_p": 0.5}, "top_p=0.5 has no effect with temperature=0"),
    ],
)
def test_wrong_values_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


def test_more_than_the_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="top_k=6 must be at most the vocabulary's size 5"):
        _shares(Sampling(top_k=6))

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rbf_jax.training.sharding import batch_sharding, make_mesh
from rbf_jax.training.state import TrainState, digest, fingerprint


@pytest.fixture
def state():
    params = {"a": jnp.linspace(-1, 1, 12).reshape(3, 4), "b": jnp.arange(4.0)}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, {"mu": jnp.ones((2, 3))}, zero)


def test_fingerprint_knows_every_value(state):
    seen = {tuple(map(int, fingerprint(state)))}
    leaves, structure = jax.tree.flatten(state)
    for position, leaf in enumerate(leaves):
        for index in range(leaf.size):
            bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
            other = jax.lax.bitcast_convert_type(bits.at[index].add(1), leaf.dtype)
            changed = list(leaves)
            changed[position] = other.reshape(leaf.shape)
            seen.add(tuple(map(int, fingerprint(jax.tree.unflatten(structure, changed)))))
    assert len(seen) == 1 + sum(leaf.size for leaf in leaves)


def test_fingerprint_knows_order(state):
    swapped = dataclasses.replace(state, params={**state.params, "b": state.params["b"][::-1]})
    assert int(fingerprint(swapped).params) != int(fingerprint(state).params)
    assert int(fingerprint(swapped).rest) == int(fingerprint(state).rest)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_fingerprint_knows_what_is_not_finite(value, state):
    assert bool(fingerprint(state).finite)
    bad = state.params["a"].at[1, 2].set(value)
    assert not fingerprint(dataclasses.replace(state, params={"a": bad})).finite


def test_digest_does_not_depend_on_the_sharding():
    values = jax.random.normal(jax.random.key(0), (4, 5))
    spread = jax.device_put(values, batch_sharding(make_mesh()))
    assert len(spread.sharding.device_set) == 2
    assert int(jax.jit(digest)(spread)) == int(digest(values))

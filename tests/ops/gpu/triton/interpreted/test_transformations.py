"""vmap over any of the arguments, remat, and what is not asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax import rbf_attention
from rbf_jax.ops.call import Inputs, Masking, Rules, squared_norms
from rbf_jax.ops.gpu.triton import passes as attention
from rbf_jax.ops.gpu.triton.config import Tiles, use_tiles
from rbf_jax.ops.vjp import LOGSUMEXP_NAME, OUTPUT_NAME
from tests.harness import kernels
from tests.harness.selected import by_default

TILES = Tiles(16, 16, 1, 1)
V, B, T, S, N, K, H = 2, 2, 17, 20, 2, 1, 8  # V elements of the axis that vmap adds
triton = functools.partial(rbf_attention, implementation="triton")


@pytest.fixture(autouse=True)
def _small_tiles():
    with use_tiles(forward=TILES, queries=TILES, keys=TILES):
        yield


def arguments(random, batch=(B,)):
    """One value of every argument that may be batched, γ and λ per head."""
    normal = lambda *shape: random.standard_normal((*batch, *shape)).astype(np.float32)  # noqa: E731
    return {
        "query": normal(T, N, H),
        "key": normal(S, K, H),
        "value": normal(S, K, H),
        "gamma": random.uniform(0.1, 0.5, N).astype(np.float32),
        "key_norm_weight": random.uniform(-0.2, 1, N).astype(np.float32),
        "mask": random.random((*batch, 1, T, S)) < 0.8,
        "key_value_seq_lengths": random.integers(0, S + 1, batch),
        "query_seq_lengths": random.integers(0, T + 1, batch),
        "query_segment_ids": random.integers(0, 2, (*batch, T)),
        "key_value_segment_ids": random.integers(0, 2, (*batch, S)),
        "alibi_slopes": random.random(N).astype(np.float32),
    }


DIFFERENTIABLE = ("query", "key", "value", "gamma", "key_norm_weight")
NAMES = tuple(arguments(np.random.default_rng(0)))
ALL = {*NAMES}
# By default each argument beside others that are not batched.
SOME = [
    {"query", "gamma", "mask", "key_value_segment_ids"},
    {"key", "key_norm_weight", "query_seq_lengths"},
    {"value", "key_value_seq_lengths", "query_segment_ids", "alibi_slopes"},
]
# Each argument alone; all but one.
BATCHED = [
    *({name} for name in NAMES),
    *(ALL - {name} for name in ("query", "key", "gamma", "mask")),
]


def everything(given, dout, dlogsumexp):
    """Values and gradients, with the cotangents given."""
    rest = {name: x for name, x in given.items() if name not in DIFFERENTIABLE}

    def f(differentiable):
        return triton(**differentiable, **rest, return_residual=True, is_causal=False)

    (out, logsumexp), vjp = jax.vjp(f, {name: given[name] for name in DIFFERENTIABLE})
    dlogsumexp = jnp.where(jnp.isneginf(logsumexp), 0, dlogsumexp)
    return out, jnp.maximum(logsumexp, -1e9), vjp((dout, dlogsumexp))


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, want)


@functools.partial(jax.jit, static_argnums=0)
def looped(batched, given, dout, dlogsumexp):
    def element(i):
        own = {name: x[i] if name in batched else x for name, x in given.items()}
        return everything(own, dout, dlogsumexp)

    return jax.lax.map(element, jnp.arange(V))


@pytest.mark.parametrize(
    "batched",
    by_default([ALL, *SOME], [ALL, *SOME, *BATCHED]),
    ids=lambda b: "+".join(n for n in NAMES if n in b),
)
def test_vmap_equals_a_loop(batched):
    random = np.random.default_rng(len(batched))
    draws = [arguments(random) for _ in range(V)]
    given = {n: np.stack([d[n] for d in draws]) if n in batched else draws[0][n] for n in NAMES}
    given = jax.tree.map(jnp.asarray, given)
    cotangents = random.standard_normal((B, T, N, H)), random.standard_normal((B, T, N))
    cotangents = [jnp.asarray(x, jnp.float32) for x in cotangents]
    axes = {name: 0 if name in batched else None for name in NAMES}
    mapped = jax.jit(jax.vmap(everything, in_axes=(axes, None, None)))
    assert_close(mapped(given, *cotangents), looped(frozenset(batched), given, *cotangents))


def test_vmap_twice_and_out_axes():
    """Over the heads' axis of unbatched arrays and over another, in other places."""
    random = np.random.default_rng(5)
    q = jnp.asarray(random.standard_normal((2, T, 3, N, H)), jnp.float32)
    k = jnp.asarray(random.standard_normal((3, S, K, H)), jnp.float32)
    gammas = jnp.asarray([0.2, 0.4], jnp.float32)

    def f(q, k, gamma):
        return triton(q, k, k, gamma=gamma, is_causal=True)

    inner = jax.vmap(f, in_axes=(1, 0, None), out_axes=1)
    got = jax.vmap(inner, in_axes=(0, None, 0))(q, k, gammas)
    want = [[f(q[i, :, j], k[j], gammas[i]) for j in range(3)] for i in range(2)]
    assert_close(got, jnp.stack([jnp.stack(row, axis=1) for row in want]))


def test_remat_keeps_the_named_residuals():
    """With the policy that keeps both names, the backward pass runs no forward kernel again."""
    random = np.random.default_rng(6)
    arrays = [jnp.asarray(random.standard_normal((B, T, N, H)), jnp.bfloat16) for _ in range(4)]

    def forward_passes(policy):
        f = jax.checkpoint(lambda q, k, v: triton(2 * q, k, v), policy=policy)

        @jax.jit
        def both(q, k, v, dout):
            out, vjp = jax.vjp(f, q, k, v)
            return out, vjp(dout)

        count = str(both.trace(*arrays).jaxpr).count("name=compiled") - 1  # of the backward pass
        return count, jax.device_get(both(*arrays)[1])

    policies = jax.checkpoint_policies
    kept, gradients = forward_passes(policies.save_only_these_names(OUTPUT_NAME, LOGSUMEXP_NAME))
    again, recomputed = forward_passes(policies.nothing_saveable)
    assert (kept, again) == (1, 2)
    plain = jax.vjp(lambda q, k, v: triton(2 * q, k, v), *arrays[:3])[1](arrays[3])
    jax.tree.map(np.testing.assert_array_equal, gradients, plain)
    jax.tree.map(np.testing.assert_array_equal, recomputed, plain)


def test_no_cotangent_of_the_logsumexp():
    """Gradients of the output alone are those with a logsumexp whose cotangent is 0."""
    random = np.random.default_rng(7)
    q, k, v, dout = (
        jnp.asarray(random.standard_normal((B, T, N, H)), jnp.float32) for _ in range(4)
    )
    got = jax.vjp(lambda q, k, v: triton(q, k, v), q, k, v)[1](dout)
    f = functools.partial(triton, return_residual=True)
    want = jax.vjp(f, q, k, v)[1]((dout, jnp.zeros((B, T, N), jnp.float32)))
    assert_close(got, want)


def test_unbatched():
    random = np.random.default_rng(8)
    given = arguments(random, ())
    batched = {
        name: x if name in ("gamma", "key_norm_weight", "alibi_slopes") else x[None]
        for name, x in given.items()
    }
    assert_close(triton(**given), triton(**batched)[0])


def test_strict_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        given = arguments(np.random.default_rng(9))
        ones = jnp.ones((B, T, N, H), jnp.float32), jnp.ones((B, T, N), jnp.float32)
        assert jnp.isfinite(everything(given, *ones)[0]).all()


def test_norms_that_are_given_are_not_made_again():
    """As blocks of a ring bring them: here twice what they are, as if λ were."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(x, (B, n, h, H)) for x, n, h in zip(keys, (T, S, S), (N, K, K)))
    gamma, weight = jnp.array([0.2, 0.3]), jnp.array([0.5, 0.9])
    given = Inputs(q, k, v, gamma, weight, key_norms=2 * squared_norms(k))
    doubled = Inputs(q, k, v, gamma, 2 * weight)
    results = [attention.PASSES.forward(x, Masking(), Rules()) for x in (given, doubled)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *results)


RINGS = {
    "causal": Rules(right=0, sink=True, return_residual=True),
    "window": Rules(left=13, right=4, return_residual=True),
    "segments": Rules(right=0, return_residual=True),
}


@pytest.mark.parametrize("name", by_default(["causal"], RINGS))
def test_ring(name):
    shapes = {"T": 40, "S": 40, "B": 1, "N": 2, "K": 1}
    kernels.check_ring(
        attention.PASSES, RINGS[name], "float32", 2e-4, segments=name == "segments", **shapes
    )

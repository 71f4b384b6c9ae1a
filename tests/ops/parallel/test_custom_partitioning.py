"""Kernels, which XLA cannot look into, are split by batch and heads where their arrays are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rbf_jax import rbf_attention
from rbf_jax.ops.call import Inputs, Masking, Rules
from rbf_jax.ops.decode import api as decode
from rbf_jax.ops.decode.cache import KeysValues
from rbf_jax.ops.dispatch import ATTENTION
from rbf_jax.ops.gpu import device
from rbf_jax.ops.gpu.triton import launch
from rbf_jax.ops.parallel.custom_partitioning import by_batch_and_heads
from tests.harness.collectives import collectives, mesh_of

SPECS = [P("x"), P("x", None, "y"), P(None, None, "y"), P(("x", "y"))]
B, T, S, H = 8, 12, 20, 16


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(x=2, y=4)


def place(mesh, spec, N, K):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]

    def put(x):
        heads = len(spec) < 3 or x.shape[2] % 4 == 0
        return jax.device_put(x, NamedSharding(mesh, spec if heads else P(*spec[:2])))

    return [put(x) for x in arrays]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("N", "K"), [(4, 4), (8, 4), (4, 2), (4, 1)])
def test_the_parts_make_the_whole(mesh, spec, N, K):
    """With a function of JAX's in place of the kernels, γ that differs from head to head."""
    seen = []

    def function(query, key, value, lengths, gamma):
        seen.append((query.shape, key.shape))
        inputs = Inputs(query, key, value, gamma[0], jnp.ones_like(gamma[0]))
        out, logsumexp = ATTENTION["xla"].attend(inputs, Masking(key_lengths=lengths), Rules())
        return out, logsumexp.swapaxes(1, 2), value.sum((1, 3))

    roles = ["b.n.", "b.k.", "b.k.", "b", "bn"], ["b.n.", "bn.", "bk"]

    def attend(q, k, v, lengths, gamma):
        return by_batch_and_heads(function, *roles, q, k, v, lengths, gamma)

    q, k, v, _ = place(mesh, spec, N, K)
    rest = jnp.arange(B, dtype=jnp.int32) + 3, jnp.linspace(0.1, 0.6, N)[None]
    want = function(*jax.device_put((q, k, v), jax.devices()[0]), *rest)
    compiled = jax.jit(attend).lower(q, k, v, *rest).compile()
    got = compiled(q, k, v, *rest)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)
    by_heads = len(spec) == 3 and K % 4 == 0
    shares = {"x": 2, ("x", "y"): 8, None: 1}[spec[0]]
    parts = (4 if by_heads else 1) if len(spec) == 3 else 1
    assert seen[-1] == ((B // shares, T, N // parts, H), (B // shares, S, K // parts, H))
    if by_heads or len(spec) < 3:
        assert not collectives(compiled)


def _pretend(monkeypatch) -> list[tuple[int, ...]]:
    """Launches something in place of kernels; returns where the shapes of first inputs will be."""
    queries = []

    def run(kernel, inputs, outputs, **_):
        queries.append(inputs[0].shape)
        return [jnp.full(x.shape, 0, x.dtype) + inputs[0].sum().astype(x.dtype) for x in outputs]

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "unavailable", lambda: None)
    target = device.Target("NVIDIA H100 80GB HBM3", 90)
    monkeypatch.setattr(device, "target", lambda: target)
    return queries


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("N", "K"), [(4, 4), (8, 4)])
def test_triton_gathers_nothing(mesh, spec, N, K, monkeypatch):
    """All kernels of both passes, launched as something that XLA cannot split either."""
    queries = _pretend(monkeypatch)

    def both(q, k, v, dout):
        attend = functools.partial(rbf_attention, implementation="triton", is_causal=True)
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(dout)

    sharded = place(mesh, spec, N, K)
    compiled = jax.jit(both).lower(*sharded).compile()
    assert not collectives(compiled)
    part = NamedSharding(mesh, spec).shard_shape((B, T, N, H))
    assert queries.count(part) >= 3
    out, (dq, dk, dv) = compiled(*sharded)
    assert {x.sharding.spec for x in (out, dq, dk, dv)} == {spec}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_attention_to_a_cache_gathers_nothing(mesh, spec, monkeypatch):
    """Batch and heads of query and cache are where they are; all else is small."""
    queries = _pretend(monkeypatch)
    query = jax.device_put(jnp.ones((B, 1, 8, H)), NamedSharding(mesh, spec))
    batch, heads = spec[0], spec[2] if len(spec) == 3 else None
    of_cache = NamedSharding(mesh, P(batch, heads))
    cache = jax.device_put(
        KeysValues(jnp.ones((B, 4, S, H)), jnp.ones((B, 4, S, H)), jnp.ones((B, 4, S))), of_cache
    )
    lengths = jax.device_put(jnp.full(B, S, jnp.int32), NamedSharding(mesh, P(batch)))
    attend = functools.partial(decode.attend, implementation="triton", gamma=jnp.ones(8))
    compiled = jax.jit(attend).lower(query, cache, lengths - 1, lengths).compile()
    assert not collectives(compiled)
    assert NamedSharding(mesh, spec).shard_shape(query.shape) in queries
    out, _ = compiled(query, cache, lengths - 1, lengths)
    assert out.sharding.spec == spec

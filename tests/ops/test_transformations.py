"""jit, vmap, remat, forward mode, second derivatives, export and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rbf_jax import rbf_attention
from rbf_jax.ops.vjp import LOGSUMEXP_NAME, OUTPUT_NAME

xla = functools.partial(rbf_attention, implementation="xla")
reference = functools.partial(rbf_attention, implementation="reference")


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (4, 20, 2, 8)) for key in keys]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("rbf_jax.ops.xla._MAX_BLOCKS", (8, 8))


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_unbatched_equals_batch_of_one(arrays):
    q, k, v, _ = (x[:1] for x in arrays)
    lengths = jnp.array([13])
    options = {"is_causal": True, "return_residual": True}
    batched = xla(q, k, v, key_value_seq_lengths=lengths, **options)
    single = xla(q[0], k[0], v[0], key_value_seq_lengths=lengths[0], **options)
    assert_close(single, tuple(x[0] for x in batched))


@pytest.mark.parametrize("attend", [reference, xla])
def test_vmap_equals_a_loop(arrays, small_blocks, attend):
    q, k, v, dout = arrays
    lengths = jnp.array([5, 20, 0, 9])

    def gradients(q, k, v, dout, length, gamma):
        def f(q, k, v, gamma):
            return attend(q, k, v, gamma=gamma, key_value_seq_lengths=length, is_causal=True)

        out, vjp = jax.vjp(f, q, k, v, gamma)
        return out, vjp(dout)

    gammas = jnp.linspace(0.1, 0.5, 4)
    got = jax.jit(jax.vmap(gradients))(q, k, v, dout, lengths, gammas)
    single = jax.jit(gradients)
    want = [single(*x) for x in zip(q, k, v, dout, lengths, gammas, strict=True)]
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want))


def test_remat_keeps_the_named_residuals(arrays):
    """With the policy that keeps both names, the backward pass runs no forward loop again."""
    q, k, v, dout = arrays

    def loops(policy):
        f = jax.checkpoint(lambda q, k, v: xla(2 * q, k, v), policy=policy)

        @jax.jit
        def both(q, k, v, dout):
            out, vjp = jax.vjp(f, q, k, v)
            return out, vjp(dout)

        text = both.lower(q, k, v, dout).as_text()
        return text.count("stablehlo.while"), both(q, k, v, dout)[1]

    policies = jax.checkpoint_policies
    kept, kept_gradients = loops(policies.save_only_these_names(OUTPUT_NAME, LOGSUMEXP_NAME))
    recomputed, gradients = loops(policies.nothing_saveable)
    plain = jax.vjp(lambda q, k, v: xla(2 * q, k, v), q, k, v)[1](dout)
    assert recomputed > kept
    assert_close(kept_gradients, plain)
    assert_close(gradients, plain)


def test_forward_mode_on_the_reference(arrays):
    q, k, v, dq = (x[:1] for x in arrays)

    def attend(q):
        return reference(q, k, v)

    _, tangent = jax.jvp(attend, (q,), (dq,))
    step = 1e-2
    difference = (attend(q + step * dq) - attend(q - step * dq)) / (2 * step)
    np.testing.assert_allclose(tangent, difference, rtol=2e-2, atol=1e-3)


def test_forward_mode_on_xla_is_refused_by_jax(arrays):
    q, k, v, dq = (x[:1] for x in arrays)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda q: xla(q, k, v), (q,), (dq,))


def test_hessian_vector_product(arrays, small_blocks):
    """Forward over reverse works on both: the backward pass is plain JAX."""
    q, k, v, direction = (x[:1] for x in arrays)

    def product(attend):
        def loss(q):
            return jnp.sum(jnp.sin(3 * attend(q, k, v, is_causal=True)))

        return jax.jit(lambda q: jax.jvp(jax.grad(loss), (q,), (direction,))[1])(q)

    assert_close(product(xla), product(reference))


def test_export_and_back(arrays):
    q, k, v, _ = arrays
    f = jax.jit(lambda q, k, v: jax.grad(lambda q: xla(q, k, v, is_causal=True).mean())(q))
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    restored = jax.export.deserialize(jax.export.export(f)(*specs).serialize())
    assert_close(restored.call(q, k, v), f(q, k, v))


def test_traces_for_cuda_without_a_gpu(arrays, monkeypatch):
    """A machine without a GPU can export the default implementation for one that has one."""
    monkeypatch.setattr("rbf_jax.ops.cudnn._has_nvidia_gpu", lambda: False)
    q, k, v, _ = arrays
    f = jax.jit(lambda q, k, v: rbf_attention(q, k, v, is_causal=True))
    specs = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (q, k, v)]
    exported = jax.export.export(f, platforms=["cuda"])(*specs)
    assert exported.platforms == ("cuda",)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices("cpu")[:2]), ("devices",))  # conftest makes two


@pytest.mark.parametrize("spec", [P("devices"), P(None, None, "devices")], ids=["batch", "heads"])
def test_sharded_inputs(arrays, mesh, spec):
    q, k, v, dout = arrays

    def f(q, k, v, dout):
        out, vjp = jax.vjp(lambda q, k, v: xla(q, k, v, is_causal=True), q, k, v)
        return out, vjp(dout)

    q, k, v, dout = (jax.device_put(x, mesh.devices[0]) for x in (q, k, v, dout))
    want = jax.jit(f)(q, k, v, dout)
    sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v, dout)]
    assert_close(jax.jit(f)(*sharded), want)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    assert_close(jax.jit(mapped)(*sharded), want)


def test_memory_is_linear_in_length():
    """Temporary memory of forward and backward, and no array of T × S in the program."""

    def program(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)

        def f(q, k, v, dout):
            return jax.vjp(lambda q, k, v: xla(q, k, v, is_causal=True), q, k, v)[1](dout)

        lowered = jax.jit(f).lower(x, x, x, x)
        return lowered.as_text(), lowered.compile().memory_analysis().temp_size_in_bytes

    _, short = program(2048)
    text, long = program(4096)
    assert long <= 2.2 * short
    assert "4096x4096" not in text

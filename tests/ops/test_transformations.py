"""jit, vmap, remat, forward mode, second derivatives, export and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rbf_jax import rbf_attention
from rbf_jax.ops.call import Inputs, Masking, Rules, squared_norms
from rbf_jax.ops.vjp import LOGSUMEXP_NAME, OUTPUT_NAME, Residuals
from rbf_jax.ops.xla import PASSES as xla_passes

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


def test_norms_that_are_given_are_not_made_again(arrays, small_blocks):
    """As blocks of a ring bring them: here twice what they are, as if λ were."""
    q, k, v, dout = arrays
    gamma, weight = jnp.array([0.2, 0.3]), jnp.array([0.5, 0.9])
    inputs = Inputs(q, k, v, gamma, weight, key_norms=2 * squared_norms(k))
    given = xla_passes.forward(inputs, Masking(), Rules())
    doubled = Inputs(q, k, v, gamma, 2 * weight)
    assert_close(given, xla_passes.forward(doubled, Masking(), Rules()))
    residuals = Residuals(inputs, Masking(), *given)
    gradients = xla_passes.backward(residuals, dout, jnp.zeros(given[1].shape), Rules())
    residuals = Residuals(doubled, Masking(), *given)
    want = xla_passes.backward(residuals, dout, jnp.zeros(given[1].shape), Rules())
    assert_close(gradients.query, want.query)
    assert_close(gradients.norm_moment, 2 * want.norm_moment)


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


def test_forward_mode_on_xla_is_refused(arrays):
    """Op by op the error names who has it; inside a jit JAX finds out later and says less."""
    q, k, v, dq = (x[:1] for x in arrays)

    def tangent(q, dq):
        return jax.jvp(lambda q: xla(q, k, v), (q,), (dq,))

    with pytest.raises(TypeError, match=r'no forward-mode derivatives.*="reference" has them'):
        tangent(q, dq)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jit(tangent)(q, dq)


def test_reverse_mode_twice_on_xla_is_refused_by_jax(arrays):
    q, k, v, _ = (x[:1] for x in arrays)

    def norm_of_gradient(attend):
        gradient = jax.grad(lambda q: jnp.sum(jnp.sin(attend(q, k, v))))
        return jax.grad(lambda q: jnp.sum(gradient(q) ** 2))(q)

    assert jnp.isfinite(norm_of_gradient(reference)).all()
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        norm_of_gradient(xla)


@pytest.mark.parametrize("attend", [reference, xla])
def test_gradient_of_the_logsumexp_of_masked_rows(arrays, attend):
    """A z-loss over the rows that attend to something: what the others give is not NaN but 0."""
    q, k, v, _ = (x[:1] for x in arrays)
    lengths = jnp.array([15])

    def z_loss(q, k):
        options = {"query_seq_lengths": lengths, "return_residual": True}
        _, logsumexp = attend(q, k, v, **options)
        return jnp.sum(jnp.where(jnp.isneginf(logsumexp), 0, logsumexp**2))

    dq, dk = jax.grad(z_loss, (0, 1))(q, k)
    assert jnp.isfinite(dk).all()
    np.testing.assert_array_equal(dq[:, 15:], jnp.zeros_like(dq[:, 15:]))
    assert (dq[:, :15] != 0).any()


def test_eager_calls_compile_once(arrays):
    q, k, v, dout = arrays

    def both(gamma):
        return jax.vjp(lambda q: xla(q, k, v, gamma=gamma), q)[1](dout)

    both(0.3)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr("logging.Logger.warning", lambda self, *args: compiled.append(args))
        both(0.4)
    loops = [args for args in compiled if "in_blocks" in str(args)]
    assert not loops


@pytest.mark.parametrize("attend", [reference, xla])
def test_strict_rank_promotion(arrays, attend):
    q, k, v, _ = arrays
    with jax.numpy_rank_promotion("raise"):
        out = attend(
            q,
            k,
            v,
            is_causal=True,
            local_window_size=3,
            mask=jnp.ones((20, 20), bool),
            query_seq_lengths=jnp.array([3, 4, 5, 20]),
            key_value_seq_lengths=jnp.array([3, 4, 5, 20]),
            query_segment_ids=jnp.ones((4, 20), int),
            key_value_segment_ids=jnp.ones((4, 20), int),
            alibi_slopes=jnp.ones(2),
            sink_logits=jnp.array([-1.0, 2.0]),
            num_global_keys=2,
        )
    assert jnp.isfinite(out).all()


@pytest.mark.parametrize("level", [0, 3])
def test_hessian_vector_product(arrays, small_blocks, level):
    """Forward over reverse works on both: the backward pass is plain JAX."""
    q, k, v, direction = (x[:1] for x in arrays)

    def product(attend):
        def loss(q):
            return jnp.sum(jnp.sin(3 * attend(q, k, v, is_causal=True)))

        options = {"xla_backend_optimization_level": level}
        hessian = lambda q: jax.jvp(jax.grad(loss), (q,), (direction,))[1]  # noqa: E731
        return jax.jit(hessian, compiler_options=options)(q)

    assert_close(product(xla), product(reference))


def test_forward_mode_compares_no_logits(arrays):
    """The derivative of a maximum does; it is 0/0 where two fusions round a logit differently."""
    q, k, v, direction = arrays
    gamma, weight = jnp.array([0.2, 0.3]), jnp.array([0.5, 0.9])

    def forward(q):
        return xla_passes.forward(Inputs(q, k, v, gamma, weight), Masking(), Rules())

    def comparisons(f):
        return str(jax.make_jaxpr(f)(q)).count(" = eq ")

    assert comparisons(lambda q: jax.jvp(forward, (q,), (direction,))) == comparisons(forward)


def test_export_and_back(arrays):
    q, k, v, _ = arrays
    f = jax.jit(lambda q, k, v: jax.grad(lambda q: xla(q, k, v, is_causal=True).mean())(q))
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    restored = jax.export.deserialize(jax.export.export(f)(*specs).serialize())
    assert_close(restored.call(q, k, v), f(q, k, v))


def test_traces_for_cuda_without_a_gpu(arrays, monkeypatch):
    """A machine without a GPU can export the default implementation for one that has one."""
    monkeypatch.setattr("rbf_jax.ops.gpu.device.unavailable", lambda: "needs an NVIDIA GPU")
    q, k, v, _ = arrays
    f = jax.jit(lambda q, k, v: rbf_attention(q, k, v, is_causal=True))
    specs = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (q, k, v)]
    exported = jax.export.export(f, platforms=["cuda"])(*specs)
    assert exported.platforms == ("cuda",)


@pytest.fixture(scope="module")
def mesh():
    # conftest makes eight devices, and jax.devices lists two.
    return Mesh(np.array(jax.devices("cpu")[:2]), ("devices",))


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


def test_shard_map_with_replicated_parameters(arrays, mesh):
    """γ is the same on all devices: its gradient is summed over them, by shard_map's own rules."""
    q, k, v, dout = (jax.device_put(x, mesh.devices[0]) for x in arrays)
    gamma, lengths = jnp.array([0.2, 0.4]), jnp.array([20, 3, 0, 11])

    def loss(q, k, v, gamma, dout, lengths):
        return jnp.sum(xla(q, k, v, gamma=gamma, key_value_seq_lengths=lengths) * dout)

    def summed(*arrays):
        return jax.lax.psum(loss(*arrays), "devices")

    batch = P("devices")
    specs = batch, batch, batch, P(), batch, batch
    mapped = jax.shard_map(summed, mesh=mesh, in_specs=specs, out_specs=P())
    arguments = q, k, v, gamma, dout, lengths
    sharded = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arguments, specs, strict=True)
    ]
    arguments = [jax.device_put(x, mesh.devices[0]) for x in arguments]
    got = jax.jit(jax.grad(mapped, (0, 1, 2, 3)))(*sharded)
    assert_close(got, jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arguments))


def test_explicit_sharding_of_the_batch(arrays):
    spec = P("devices")
    mesh = jax.make_mesh(
        (2,), ("devices",), (jax.sharding.AxisType.Explicit,), devices=jax.devices("cpu")[:2]
    )
    q, k, v, dout = (jax.device_put(x, mesh.devices[0]) for x in arrays)

    def f(q, k, v, dout):
        out, vjp = jax.vjp(lambda q, k, v: xla(q, k, v, is_causal=True), q, k, v)
        return out, vjp(dout)

    want = jax.jit(f)(q, k, v, dout)
    with jax.set_mesh(mesh):
        got = jax.jit(f)(*(jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays))
    assert jax.typeof(got[0]).sharding.spec[0] == spec[0]
    assert_close(jax.device_get(got), jax.device_get(want))


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

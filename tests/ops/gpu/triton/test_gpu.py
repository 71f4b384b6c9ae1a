"""The Triton kernels on an NVIDIA GPU: `make test-gpu`.

The contract suite (test_contract.py) runs on them there too, with outputs that start as NaN.
"""

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from rbf_jax import rbf_attention
from rbf_jax.ops.gpu.mosaic.config import ForwardTiles, use_tiles
from rbf_jax.ops.gpu.triton import launch
from rbf_jax.ops.vjp import LOGSUMEXP_NAME, OUTPUT_NAME
from tests.harness import adversarial, cases, contract, random_cases

if jax.default_backend() != "gpu":
    pytest.skip("needs an NVIDIA GPU: make test-gpu", allow_module_level=True)

triton = functools.partial(rbf_attention, implementation="triton")
xla = functools.partial(rbf_attention, implementation="xla")
MANY_BLOCKS = cases.case("many_blocks", T=1500, S=1700, N=4, K=2, H=64, is_causal=True)
LENGTHS = {
    "query_seq_lengths": lambda B, N, T, S: np.array([T - 300, T]),
    "key_value_seq_lengths": lambda B, N, T, S: np.array([S, S - 700]),
}
DETERMINISTIC = {
    "causal": (MANY_BLOCKS, "bfloat16"),
    "float32": (MANY_BLOCKS, "float32"),
    "lengths": (cases.case("lengths", T=700, S=900, H=128, **LENGTHS), "float16"),
    "far_keys": (cases.case("far_keys", T=600, S=600, offset=60.0), "bfloat16"),
}


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (4, 300, 2, 64), jnp.bfloat16) for key in keys]


def everything_of(case, dtype):
    """A function that computes all results of a case."""
    options = case.resolved_options()

    @jax.jit
    def everything(q, k, v, gamma, key_norm_weight, dout, dlogsumexp):
        f = functools.partial(triton, return_residual=True, **options)

        def attend(q, k, v, gamma, key_norm_weight):
            return f(q, k, v, gamma=gamma, key_norm_weight=key_norm_weight)

        out, vjp = jax.vjp(attend, q, k, v, gamma, key_norm_weight)
        return out, vjp((dout, dlogsumexp))

    return functools.partial(everything, *case.arrays(jnp.dtype(dtype)))


def digest(name) -> str:
    leaves = jax.tree.leaves(everything_of(*DETERMINISTIC[name])())
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


def assert_close(got, want, tolerance=2e-2):
    def close(a, b):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance
        )

    jax.tree.map(close, got, want)


@pytest.mark.parametrize("case", adversarial.CASES, ids=lambda case: case.name)
def test_adversarial_inputs(case):
    assert not contract.violations(contract.TRITON, case, "bfloat16")


def test_poison_shows_what_is_not_written(monkeypatch):
    """Half of the programs leave half of the output as it was found: as NaN."""
    run = launch.run

    def half(*arguments, programs, **rest):
        return run(*arguments, programs=programs // 2, **rest)

    monkeypatch.setattr(launch, "run", half)
    case = cases.case("half", T=515, S=515, B=2, N=8, K=8, H=64)
    jax.clear_caches()
    found = contract.violations(contract.TRITON, case, "bfloat16")
    jax.clear_caches()
    assert any("not finite" in line for line in found), found


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_same_bits_from_run_to_run(name):
    compute = everything_of(*DETERMINISTIC[name])
    first = compute()
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(first[1]))
    for _ in range(5):
        contract.poison()
        assert_same(compute(), first)


def digests(flag: str) -> list[str]:
    """By a process of its own, since XLA reads its flags once.

    Nothing is autotuned, as under the deterministic flag: else XLA may sum norms in another order.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0 {flag}"
    code = "from tests.ops.gpu.triton import test_gpu as t; print(*map(t.digest, t.DETERMINISTIC))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[4],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout.split()


def test_the_same_bits_under_the_deterministic_flag():
    assert digests("--xla_gpu_deterministic_ops=true") == digests("")


def test_the_default():
    query = jnp.ones((2, 300, 2, 80), jnp.bfloat16)
    text = jax.jit(rbf_attention).lower(query, query, query).as_text()
    assert "triton_kernel_call" in text
    assert_same(rbf_attention(query, query, query), triton(query, query, query))


on_hopper = pytest.mark.skipif(
    jax.devices()[0].compute_capability != "9.0", reason="Mosaic needs compute capability 9.0"
)


@on_hopper
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_per_cta_change_no_bit(causal):
    """A CTA computes each of its tiles of queries as if it were the only one."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 1000, 4, 64), jnp.bfloat16)
    attend = functools.partial(rbf_attention, is_causal=causal, return_residual=True)
    found = []
    for tiles_per_cta in (1, 3, 8):
        with use_tiles(ForwardTiles(tiles_per_cta=tiles_per_cta)):
            found.append(jax.jit(functools.partial(attend, implementation="mosaic"))(q, k, v))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@on_hopper
@pytest.mark.parametrize(
    "seed", [seed for seed in random_cases.failed_seeds() if random_cases.takes("mosaic", seed)]
)
def test_random_cases_that_failed_once(seed):
    assert not random_cases.violations(seed, implementation="mosaic")


@on_hopper
def test_the_default_on_hopper():
    query = jax.random.normal(jax.random.key(0), (1, 4096, 2, 64), jnp.bfloat16)
    default = functools.partial(rbf_attention, is_causal=True)
    mosaic = functools.partial(default, implementation="mosaic")
    arrays = (query, query, query)
    assert "mosaic_gpu" in jax.jit(default).lower(*arrays).as_text()
    # Op by op, XLA may sum the norms in another order.
    assert_same(jax.jit(default)(*arrays), jax.jit(mosaic)(*arrays))


def both(attend, **options):
    """Output and gradients."""

    def f(q, k, v, dout):
        out, vjp = jax.vjp(functools.partial(attend, is_causal=True, **options), q, k, v)
        return out, vjp(dout)

    return f


def test_export_and_back(arrays):
    f = jax.jit(both(triton))
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    checks = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call")]
    exported = jax.export.export(f, platforms=["cuda"], disabled_checks=checks)(*specs)
    restored = jax.export.deserialize(exported.serialize())
    assert_same(restored.call(*arrays), f(*arrays))


def test_vmap_equals_a_loop(arrays):
    lengths, gammas = jnp.array([5, 300, 0, 129]), jnp.linspace(0.1, 0.5, 4)

    def gradients(q, k, v, dout, length, gamma):
        options = {"key_value_seq_lengths": length, "gamma": gamma}
        return both(triton, **options)(q, k, v, dout)

    got = jax.jit(jax.vmap(gradients))(*arrays, lengths, gammas)
    single = jax.jit(gradients)
    want = [single(*x) for x in zip(*arrays, lengths, gammas, strict=True)]
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want))


def test_remat(arrays):
    policies = jax.checkpoint_policies
    kept = policies.save_only_these_names(OUTPUT_NAME, LOGSUMEXP_NAME)
    want = jax.jit(both(triton))(*arrays)
    for policy in (kept, policies.nothing_saveable):
        attend = jax.checkpoint(functools.partial(triton, is_causal=True), policy=policy)

        def f(q, k, v, dout, attend=attend):
            out, vjp = jax.vjp(attend, q, k, v)
            return out, vjp(dout)

        assert_same(jax.jit(f)(*arrays), want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_on_one_device(arrays, check_vma):
    mesh = Mesh(np.array(jax.devices()[:1]), ("devices",))
    spec = P("devices")
    f = both(triton)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    assert_same(jax.jit(mapped)(*arrays), jax.jit(f)(*arrays))


def test_equals_xla_where_sequences_are_long(arrays):
    q, k, v, dout = (jnp.tile(x[:1], (1, 30, 1, 1)) for x in arrays)  # T = 9,000
    assert_close(jax.jit(both(triton))(q, k, v, dout), jax.jit(both(xla))(q, k, v, dout), 4e-2)

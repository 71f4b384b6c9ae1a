"""The Triton kernels in programs for CUDA, made on a machine that need not have a GPU.

Lowering runs Triton's front end and code generator for compute capability 9.0; what the kernels
compute is tested by the interpreter (interpreted/) and on a GPU (make test-gpu).
"""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rbf_jax import rbf_attention
from rbf_jax.ops import dispatch
from rbf_jax.ops.gpu import device
from rbf_jax.ops.gpu.triton import launch
from rbf_jax.ops.gpu.triton.config import Tiles, use_tiles
from rbf_jax.ops.vjp import LOGSUMEXP_NAME, OUTPUT_NAME
from tests.harness.selected import by_default

pytestmark = pytest.mark.usefixtures("h100")

T, S = 4099, 5003  # primes: no other axis of a program is as long
B, N, K, H = 2, 4, 2, 64
CALL = "triton_kernel_call"


def _shapes(dtype=jnp.bfloat16, batch=(B,)):
    query = jax.ShapeDtypeStruct((*batch, T, N, H), dtype)
    key = jax.ShapeDtypeStruct((*batch, S, K, H), dtype)
    return query, key, key


def _attend(q, k, v, **options):
    return rbf_attention(q, k, v, is_causal=True, implementation="triton", **options)


def _loss(q, k, v, **options):
    out, logsumexp = _attend(q, k, v, return_residual=True, **options)
    return out.astype(jnp.float32).sum() + logsumexp.sum()


def _gradients(**options):
    return jax.grad(functools.partial(_loss, **options), argnums=(0, 1, 2))


def _program(function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_forward_and_backward():
    assert _program(_attend, *_shapes()).count(f"@{CALL}") == 2  # and the gate
    assert _program(_gradients(), *_shapes()).count(f"@{CALL}") == 4  # and two backward


def test_float16_needs_no_gate():
    assert _program(_attend, *_shapes(jnp.float16)).count(f"@{CALL}") == 1


def test_dot_products_need_no_gate():
    """Without key norms there is no bound to measure from."""
    program = _program(functools.partial(_attend, key_norm_weight=0.0), *_shapes())
    assert program.count(f"@{CALL}") == 1


def test_vmap_folds_the_axis_into_the_batch():
    program = _program(jax.vmap(_gradients()), *_shapes(batch=(3, B)))
    assert program.count(f"@{CALL}") == 4
    assert f"tensor<{3 * B}x{T}x{N}x{H}xbf16>" in program


@pytest.mark.parametrize("batched", ["query", "gamma", "mask", "lengths"])
def test_vmap_of_one_argument(batched):
    query, key, value = _shapes()
    options = {
        "gamma": jnp.full((3, N), 0.1),
        "mask": jnp.ones((3, 1, 1, 1, S), bool),
        "lengths": jnp.full((3, B), 7),
    }

    def attend(q, k, v, x):
        name = {"lengths": "key_value_seq_lengths"}.get(batched, batched)
        return _attend(q, k, v, **({} if batched == "query" else {name: x}))

    axes = (0 if batched == "query" else None, None, None, None if batched == "query" else 0)
    if batched == "query":
        query = jax.ShapeDtypeStruct((3, *query.shape), query.dtype)
    program = _program(jax.vmap(attend, axes), query, key, value, options.get(batched))
    assert program.count(f"@{CALL}") == 2


@pytest.mark.parametrize(("names", "calls"), [((), 6), ((OUTPUT_NAME, LOGSUMEXP_NAME), 4)])
def test_remat_keeps_what_its_policy_names(names, calls):
    """All is made again, or the forward kernels run once."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    checkpointed = jax.checkpoint(_loss, policy=policy)
    program = _program(jax.value_and_grad(checkpointed, argnums=(0, 1, 2)), *_shapes())
    assert program.count(f"@{CALL}") == calls


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    devices = jax.devices("cpu")[:2]  # conftest makes eight devices, and jax.devices lists two
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    sharded = jax.shard_map(
        _attend, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
    )

    def loss(*inputs):
        return sharded(*inputs).astype(jnp.float32).sum()

    program = _program(jax.grad(loss, argnums=(0, 1, 2)), *_shapes())
    assert program.count(f"@{CALL}") == 4
    assert "all_gather" not in program


def test_export_takes_the_kernels_when_told_to():
    """JAX promises nothing of foreign custom calls, so they must be allowed by name."""
    allowed = [jax.export.DisabledSafetyCheck.custom_call(CALL)]
    exported = jax.export.export(jax.jit(_attend), platforms=["cuda"], disabled_checks=allowed)
    assert exported(*_shapes()).mlir_module().count(CALL) >= 2
    with pytest.raises(ValueError, match=CALL):
        jax.export.export(jax.jit(_attend), platforms=["cuda"])(*_shapes())


OPTIONS = {
    "causal": {},
    "segments": {
        "query_segment_ids": jnp.zeros((B, T), jnp.int32),
        "key_value_segment_ids": jnp.zeros((B, S), jnp.int32),
    },
    "lengths": {"key_value_seq_lengths": jnp.array([5, 9])},
    "alibi": {
        "alibi_slopes": jnp.ones(N),
        "sink_logits": jnp.ones(N),
        "local_window_size": 900,
        "num_global_keys": 70,
    },
}


@pytest.mark.parametrize("name", by_default(["causal", "segments", "alibi"], OPTIONS))
def test_nothing_as_large_as_the_logits(name):
    program = _program(_gradients(**OPTIONS[name]), *_shapes())
    assert CALL in program
    shapes = {tuple(map(int, x)) for x in _dimensions(program)}
    assert any(T in shape for shape in shapes)
    assert any(S in shape for shape in shapes)
    largest = max(functools.reduce(lambda a, b: a * b, shape, 1) for shape in shapes)
    assert largest <= B * S * N * H  # the queries and keys themselves


def _dimensions(program: str) -> list[list[str]]:
    return [x.split("x")[:-1] for x in re.findall(r"tensor<((?:\d+x)+)\w+>", program)]


def test_none_takes_it_where_cuda_is_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(device, "target", lambda: device.Target("NVIDIA A100-SXM4-80GB", 80))
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="rbf_jax"):
        attend = functools.partial(rbf_attention, is_causal=True)
        program = _program(attend, *_shapes())
        _program(attend, *_shapes())
    assert program.count(f"@{CALL}") == 2
    assert [record.getMessage() for record in caplog.records] == [
        "rbf_attention: implementation=None takes 'triton' where the program is compiled for CUDA, "
        "else 'xla'."
    ]


def test_none_on_the_cpu_runs_all_the_same():
    """A program that may be compiled for CUDA, and is placed on the CPU."""
    query, key = jnp.ones((1, 5, 1, 8)), jnp.ones((1, 5, 1, 8))
    assert rbf_attention(query, key, key, implementation=None).shape == query.shape


def test_use_tiles_is_taken():
    tiles = Tiles(block_q=16, block_k=16, num_warps=1, num_stages=1)
    with use_tiles(forward=tiles):
        small = _program(lambda *x: _attend(*x), *_shapes())
    default = _program(lambda *x: _attend(*x), *_shapes())
    flags = [f"tensor<{B * N * -(-T // block)}xi32>" for block in (16, 64)]
    assert flags[0] in small
    assert flags[0] not in default


@pytest.mark.parametrize(
    ("change", "requirement"),
    [
        ({"block_q": 48}, "block_q=48 must be a power of two from 16 to 256"),
        ({"block_k": 8}, "block_k=8 must be a power of two from 16 to 256"),
        ({"num_warps": 3}, "num_warps=3 must be a power of two up to 16"),
        ({"num_stages": 0}, "num_stages=0 must be an int ≥ 1"),
        ({"heads_at_once": 1.5}, "heads_at_once=1.5 must be an int ≥ 1"),
        ({"max_registers": 20}, "max_registers=20 must be None or an int from 32 to 255"),
    ],
)
def test_tiles_say_what_is_wrong_with_them(change, requirement):
    fields = {"block_q": 64, "block_k": 64, "num_warps": 4, "num_stages": 2} | change
    with pytest.raises(ValueError, match=re.escape(requirement)):
        Tiles(**fields)


def test_refusals_name_who_can(monkeypatch):
    query = jnp.ones((1, 4, 1, 264), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"head dimensions up to 256, not 264; .*'xla'"):
        rbf_attention(query, query, query, implementation="triton")
    with jax.enable_x64(True):
        query = jnp.ones((1, 4, 1, 8), jnp.float64)
        with pytest.raises(NotImplementedError, match=r"not float64; .*'xla' and 'reference'"):
            rbf_attention(query, query, query, implementation="triton")


def test_forward_mode_is_refused():
    query, key, value = _shapes()
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        jax.eval_shape(lambda *x: jax.jvp(jax.grad(_loss), x, x), query, key, value)


class TestWithoutKernels:
    """On machines that cannot run them; `h100` is undone."""

    @pytest.fixture(autouse=True)
    def undo(self, h100, monkeypatch):
        monkeypatch.undo()

    def _refusal(self) -> str:
        query = jnp.ones((1, 4, 1, 8))
        with pytest.raises(NotImplementedError) as error:
            rbf_attention(query, query, query, implementation="triton")
        return str(error.value)

    @pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
    def test_no_gpu(self):
        assert "needs an NVIDIA GPU, and JAX's default backend is cpu; 'xla'" in self._refusal()

    def test_an_old_gpu(self, monkeypatch):
        self._pretend(monkeypatch, "NVIDIA T4", "7.5")
        assert "needs compute capability 8.0 or later, and this GPU has 7.5" in self._refusal()

    def test_no_jax_triton(self, monkeypatch):
        def missing():
            raise ImportError("No module named 'jax_triton'")

        self._pretend(monkeypatch, "NVIDIA A100", "8.0")
        monkeypatch.setattr(launch, "_jax_triton", missing)
        assert "needs the package jax-triton (the extra 'cuda' of rbf-jax)" in self._refusal()

    def _pretend(self, monkeypatch, name, capability):
        class Device:
            device_kind, compute_capability, core_count = name, capability, 40

        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda *_: [Device()])
        device.target.cache_clear()
        monkeypatch.setattr(device, "target", device.target.__wrapped__)

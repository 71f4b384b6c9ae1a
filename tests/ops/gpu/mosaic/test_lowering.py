"""The Mosaic GPU kernels in programs for CUDA, and what it refuses; a GPU is pretended."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import core as mosaic_gpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rbf_jax import rbf_attention
from rbf_jax.ops.call import Rules
from rbf_jax.ops.gpu import device
from rbf_jax.ops.gpu.mosaic import backward_fused, backward_keys, backward_queries, common, forward
from rbf_jax.ops.gpu.mosaic import passes as attention
from rbf_jax.ops.gpu.mosaic.config import (
    HEAD_DIMS,
    BackwardTiles,
    ForwardTiles,
    choose,
    choose_backward,
    use_tiles,
)
from rbf_jax.ops.vjp import LOGSUMEXP_NAME, OUTPUT_NAME
from tests.harness.selected import by_default

pytestmark = pytest.mark.usefixtures("h100")

exhaustive = pytest.mark.exhaustive
T, S = 1031, 2053
B, N, K = 2, 4, 2
CALL = re.compile(r"custom_call @mosaic_gpu\w*\(")


def _shapes(H=64, dtype=jnp.bfloat16):
    key = jax.ShapeDtypeStruct((B, S, K, H), dtype)
    return jax.ShapeDtypeStruct((B, T, N, H), dtype), key, key


def _attend(q, k, v, **options):
    return rbf_attention(q, k, v, implementation="mosaic", **options)


def _program(function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def _kernels(function, *arguments) -> tuple[int, int]:
    """How many kernels of Mosaic and of Triton a program has; lowering them takes longer."""
    program = str(jax.jit(function).trace(*arguments).jaxpr)
    return program.count("mpmd_map["), program.count("rbf_triton_call[")


@pytest.mark.parametrize(
    ("H", "dtype", "options"),
    [
        (64, jnp.bfloat16, {"is_causal": True}),
        pytest.param(
            128,
            jnp.bfloat16,
            {"origin_sink": True, "local_window_size": (100, 50)},
            marks=exhaustive,
        ),
        pytest.param(
            256, jnp.float16, {"key_value_seq_lengths": jnp.array([5, 900])}, marks=exhaustive
        ),
        (80, jnp.bfloat16, {"alibi_slopes": jnp.ones(N), "query_seq_lengths": jnp.array([5, 9])}),
        (64, jnp.bfloat16, {"sink_logits": jnp.ones(N), "local_window_size": (100, 0)}),
    ],
)
def test_forward(H, dtype, options):
    """Mosaic's own lowering runs, with layouts of all that a thread holds; ptxas does not."""
    program = _program(functools.partial(_attend, **options), *_shapes(H, dtype))
    assert len(CALL.findall(program)) == 1


FORWARD_TILES = [
    ForwardTiles(block_k=64, stages=3),
    ForwardTiles(block_k=192),
    ForwardTiles(tiles_per_cta=4),
]


@pytest.mark.parametrize("tiles", by_default(FORWARD_TILES[-1:], FORWARD_TILES), ids=str)
def test_use_tiles_is_taken(tiles):
    with use_tiles(tiles):
        program = _program(lambda *x: _attend(*x), *_shapes())
    assert len(CALL.findall(program)) == 1
    assert program != _program(lambda *x: _attend(*x), *_shapes())


@pytest.mark.parametrize("H", by_default([80, 256], [*HEAD_DIMS, 80]))
def test_backward(H):
    """Rows of numbers fill the tiles: a copy of them does not end where their array does."""

    def loss(*x):
        out, logsumexp = _attend(*x, return_residual=True, is_causal=True)
        return out.astype(jnp.float32).sum() + logsumexp.sum()

    program = _program(jax.grad(loss, argnums=(0, 1, 2)), *_shapes(H))
    H = H if H in HEAD_DIMS else 128
    assert len(CALL.findall(program)) == (2 if choose_backward(H).fused else 3)
    for tiles in (choose(H, False, T, B * N), choose_backward(H)):
        assert f"tensor<{B}x{N}x{-(-T // tiles.rows) * tiles.rows}xf32>" in program


@pytest.mark.parametrize(
    ("H", "options"),
    by_default(
        [(64, {"local_window_size": (100, 50)})],
        [(64, {"local_window_size": (100, 50)}), (128, {"is_causal": True, "origin_sink": True})],
    ),
)
def test_fused_backward(H, options):
    """It adds to an array of zeros that it is given; nothing else does."""

    def loss(*x):
        return _attend(*x, **options).astype(jnp.float32).sum()

    with use_tiles(backward=BackwardTiles(fused=True)):
        program = _program(jax.grad(loss, argnums=(0, 1, 2)), *_shapes(H))
    calls = [line for line in program.splitlines() if CALL.search(line)]
    assert len(calls) == 2
    assert [call.count(".add.tile.bulk_group") > 0 for call in calls] == [False, True]
    assert ["output_operand_alias<" in call for call in calls] == [False, True]


@pytest.mark.parametrize(
    ("flags", "calls"),
    [
        ("", 2),
        ("--xla_gpu_deterministic_ops=false", 2),
        ("--xla_a=b --xla_gpu_deterministic_ops=true", 3),
        ("--xla_gpu_exclude_nondeterministic_ops --xla_a=b", 3),
    ],
)
def test_backward_under_the_deterministic_flag(monkeypatch, flags, calls):
    """One kernel adds to dq in the order of its blocks' ends; two have an order of their own."""
    monkeypatch.setenv("XLA_FLAGS", flags)

    def loss(*x):
        return _attend(*x).astype(jnp.float32).sum()

    assert _kernels(jax.grad(loss, argnums=(0, 1, 2)), *_shapes(64)) == (calls, 0)


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        ({}, 1),
        ({"H": 128, "version": "0.10.2", "is_causal": True}, 1),
        ({"version": "0.11.3"}, 0),
        ({"version": "0.12.0.1"}, 0),
        ({"mask": jnp.ones((1, 1, 1, 512), bool)}, 0),
        ({"H": 80}, 0),
        ({"dtype": jnp.float16}, 0),
        ({"dtype": jnp.float16, "length": 4096}, 1),
        ({"dtype": jnp.float16, "length": 4095}, 0),
        ({"dtype": jnp.float32, "length": 4096}, 0),
        ({"length": 511}, 0),
    ],
)
def test_it_is_the_default_where_it_is_faster(monkeypatch, change, calls):
    options = {"H": 64, "dtype": jnp.bfloat16, "version": "0.11.2", "length": 512, **change}
    monkeypatch.setattr(jax, "__version__", options.pop("version"))
    shape = (B, options.pop("length"), N, options.pop("H"))
    arrays = [jax.ShapeDtypeStruct(shape, options.pop("dtype"))] * 3
    mosaic, triton = _kernels(functools.partial(rbf_attention, **options), *arrays)
    assert (mosaic, triton > 0) == (calls, not calls)


@pytest.mark.parametrize(
    ("length", "options", "mosaic"),
    [
        (1024, {}, True),
        (1022, {}, False),
        (2048, {"is_causal": True}, True),
        (1024, {"is_causal": True}, False),
        (1024, {"is_causal": True, "local_window_size": (100, 0)}, True),
    ],
)
def test_a_ring_asks_by_its_chunks(monkeypatch, length, options, mosaic):
    """Two devices have halves; under a causal rule each has two quarters."""
    monkeypatch.setattr(jax, "__version__", "0.11.2")
    array = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.bfloat16)
    mesh = jax.make_mesh(
        (2,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2]
    )
    with jax.set_mesh(mesh):
        kernels = _kernels(functools.partial(rbf_attention, **options), array, array, array)
    assert [number > 0 for number in kernels] == [mosaic, not mosaic]


@pytest.mark.parametrize(
    ("change", "requirement"),
    [
        ({"mask": jnp.ones((1, 1, 1, S), bool)}, "does not support mask"),
        (
            {
                "query_segment_ids": jnp.zeros((B, T), jnp.int32),
                "key_value_segment_ids": jnp.zeros((B, S), jnp.int32),
            },
            "does not support query_segment_ids, key_value_segment_ids",
        ),
        (
            {"num_global_keys": 3, "is_causal": True, "local_window_size": 9},
            "does not support num_global_keys",
        ),
        ({"H": 264}, "supports head dimensions up to 256, not 264"),
        ({"dtype": jnp.float32}, "supports bfloat16 and float16, not float32"),
    ],
)
def test_refusals_name_who_can(change, requirement):
    shapes = _shapes(change.pop("H", 64), change.pop("dtype", jnp.bfloat16))
    expected = re.escape(requirement) + ".*'xla' and 'reference' can do this call"
    with pytest.raises(NotImplementedError, match=expected):
        jax.eval_shape(functools.partial(_attend, **change), *shapes)


@pytest.mark.parametrize(
    ("capability", "said"), [(80, "this GPU has 8.0; 'triton'"), (100, "this GPU has 10.0")]
)
def test_other_gpus(capability, said, monkeypatch):
    monkeypatch.setattr(device, "target", lambda: device.Target("another", capability))
    with pytest.raises(NotImplementedError, match=f"needs compute capability 9.0, and {said}"):
        jax.eval_shape(_attend, *_shapes())


def test_other_versions_of_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.12.0")
    with pytest.raises(NotImplementedError, match=r"is made for jax .* and this is jax 0.12.0"):
        jax.eval_shape(_attend, *_shapes())


KERNELS = {
    "forward": lambda *x, **sizes: forward.forward(*x[0], **sizes),
    "queries": backward_queries.queries,
    "keys": backward_keys.keys,
    "gradients": backward_fused.gradients,
}
MEMORY = {
    "forward": forward.memory_of,
    "queries": backward_queries.memory_of,
    "keys": backward_keys.memory_of,
    "gradients": backward_fused.memory_of,
}


@pytest.mark.parametrize("H", [64, 256])
@pytest.mark.parametrize(
    ("kernel", "tiles"),
    [
        ("forward", ForwardTiles()),
        ("forward", ForwardTiles(block_k=64, stages=3, tiles_per_cta=3)),
        ("queries", BackwardTiles(stages=3)),
        ("queries", BackwardTiles(consumers=1)),
        ("keys", BackwardTiles(stages=3)),
        ("keys", BackwardTiles(consumers=1)),
        ("gradients", BackwardTiles(fused=True)),
        ("gradients", BackwardTiles(fused=True, stages=3)),
    ],
)
def test_shared_memory_is_what_the_kernel_asks_for(kernel, tiles, H):
    query, key, value = (jax.ShapeDtypeStruct((1, 768, 1, H), jnp.bfloat16) for _ in range(3))
    numbers = jax.ShapeDtypeStruct((1, 1, 768), jnp.float32)
    per_head = jax.ShapeDtypeStruct((1, 3, 1), jnp.float32)
    inputs = query, key, value, numbers, per_head, jax.ShapeDtypeStruct((1, 3), jnp.int32)
    sizes = {"rules": Rules(), "true_lengths": common.Lengths(768, 768), "tiles": tiles}
    if kernel == "forward":
        sizes["online"] = False
    call = functools.partial(KERNELS[kernel], **sizes)
    traced = jax.jit(call).trace(inputs, (query, numbers, numbers))
    memory = common.shared_memory(MEMORY[kernel](key, tiles), reductions=kernel != "gradients")
    asked = f"smem_bytes={memory} "
    with mosaic_gpu.artificial_shared_memory_limit(0), pytest.raises(ValueError, match=asked):
        traced.lower(lowering_platforms=("cuda",))


def test_a_version_that_only_lowered_is_there_for_who_asks(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.12.0.1")
    assert len(CALL.findall(_program(lambda *x: _attend(*x), *_shapes()))) == 1


def test_versions_hold_the_one_that_is_tested():
    assert jax.__version__ in attention._JAX_VERSIONS


class TestTransformations:
    """What models do with an operation; one kernel forward and one backward."""

    def _loss(self, *inputs):
        out, logsumexp = _attend(*inputs, is_causal=True, return_residual=True)
        return out.astype(jnp.float32).sum() + logsumexp.sum()

    def test_vmap_folds_the_axis_into_the_batch(self):
        shapes = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in _shapes()]
        program = _program(jax.vmap(jax.grad(self._loss, argnums=(0, 1, 2))), *shapes)
        assert len(CALL.findall(program)) == 2
        assert f"tensor<{3 * B}x{T + 1}x{N}x64xbf16>" in program

    @pytest.mark.parametrize(("names", "calls"), [((), 3), ((OUTPUT_NAME, LOGSUMEXP_NAME), 2)])
    def test_remat_keeps_what_its_policy_names(self, names, calls):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        checkpointed = jax.checkpoint(self._loss, policy=policy)
        program = _program(jax.value_and_grad(checkpointed, argnums=(0, 1, 2)), *_shapes())
        assert len(CALL.findall(program)) == calls

    @pytest.mark.parametrize(("check_vma", "calls"), [(True, 3), (False, 2)])
    def test_shard_map(self, check_vma, calls):
        """Where varying axes are checked nothing can be added to: two backward kernels."""
        mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("data",))
        sharded = jax.shard_map(
            _attend, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
        )

        def loss(*inputs):
            return sharded(*inputs).astype(jnp.float32).sum()

        program = _program(jax.grad(loss, argnums=(0, 1, 2)), *_shapes())
        assert len(CALL.findall(program)) == calls
        assert "all_gather" not in program

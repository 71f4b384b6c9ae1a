"""The default on Hopper, Mosaic's kernels, in programs that XLA has split over a mesh.

Programs for CUDA are compiled as far as a CPU can: XLA splits them, and finds a handler under the
name of the kernels that is never run.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxlib import lapack

from rbf_jax import rbf_attention
from tests.harness.collectives import collectives, mesh_of

B, T, N, K, H = 8, 16 * 4096, 8, 4, 64  # 4,096 to each chunk of a ring
NAME = "mosaic_gpu_v2"
ROWS = ("data", "fsdp")

pytestmark = pytest.mark.usefixtures("h100")


@pytest.fixture(scope="session", autouse=True)
def handler():
    capsule = lapack.registrations()["cpu"][0][1]
    jax.ffi.register_ffi_target(NAME, capsule, platform="cpu")


def compiled(sizes, spec, *, is_set, attend=rbf_attention):
    """The backward pass too, of a causal call with q, k and v that lie so."""
    mesh = mesh_of(**sizes)
    sharding = NamedSharding(mesh, spec)
    shapes = [
        jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16, sharding=sharding) for n in (N, K, K)
    ]

    def loss(*x):
        return attend(*x, is_causal=True).astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=sharding)
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        return gradients.trace(*shapes).lower(lowering_platforms=("cuda",)).compile()


def calls(program):
    """The queries of each call of a kernel, as a device has them."""
    found = re.findall(rf' custom-call\(.*custom_call_target="{NAME}".*', program.as_text())
    return {tuple(map(int, re.search(r"bf16\[([\d,]+)\]", x)[1].split(","))) for x in found}


@pytest.mark.parametrize(
    ("sizes", "moves", "queries"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2, "seq": 1}, set(), (2, T, 4, H)),
        ({"data": 1, "fsdp": 2, "tensor": 2, "seq": 2}, {"collective-permute"}, (4, T // 4, 4, H)),
        ({"data": 1, "fsdp": 1, "tensor": 1, "seq": 8}, {"collective-permute"}, (8, T // 16, 8, H)),
    ],
    ids=str,
)
def test_a_mesh_that_is_set(sizes, moves, queries):
    """Along "seq" a call takes a chunk, half of what a device has of a row."""
    program = compiled(sizes, P(ROWS, "seq", "tensor"), is_set=True)
    assert calls(program) == {queries}
    assert set(collectives(program)) == moves


@pytest.mark.parametrize("spec", [P("x"), P("x", None, "y"), P(("x", "y"))], ids=str)
def test_a_users_own_jit(spec):
    """The mesh is nowhere but in the arrays, and its axes have any names."""
    program = compiled({"x": 2, "y": 4}, spec, is_set=False)
    assert calls(program) == {part({"x": 2, "y": 4}, spec)}
    assert not collectives(program)


def test_a_mesh_that_is_set_with_an_axis_of_another_name():
    """Batch and heads stay where they are; a ring has them whole along that axis."""
    sizes, spec = {"data": 2, "x": 4}, P("data", None, "x")
    program = compiled(sizes, spec, is_set=True)
    assert calls(program) == {part(sizes, spec)}
    assert not collectives(program)
    program = compiled({"seq": 2, "x": 4}, P("x", "seq"), is_set=True)
    assert calls(program) == {(B, T // 4, N, H)}


def part(sizes, spec):
    return NamedSharding(mesh_of(**sizes), spec).shard_shape((B, T, N, H))


def test_a_shard_map_over_some_axes():
    """JAX cannot split kernels there: they say so, and the default is "xla"."""

    def within(implementation):
        def attend(*inputs, **options):
            call = functools.partial(rbf_attention, implementation=implementation, **options)
            return jax.shard_map(call, axis_names={"x"}, in_specs=P("x"), out_specs=P("x"))(*inputs)

        return compiled({"x": 2, "y": 4}, P("x", None, "y"), is_set=True, attend=attend)

    assert not calls(within(None))
    for name in ("mosaic", "triton", "cudnn"):
        with pytest.raises(NotImplementedError, match=r"over all axes of the mesh.*leaves out y"):
            within(name)

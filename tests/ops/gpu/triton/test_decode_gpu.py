"""Attention to a cache by the kernels on an NVIDIA GPU: `make test-gpu`."""

import jax
import jax.numpy as jnp
import pytest

from rbf_jax.ops.decode import api as decode
from rbf_jax.ops.decode.triton import Sizes, use_sizes
from rbf_jax.ops.gpu.triton.config import Tiles
from tests.harness import contract, decode_cases
from tests.harness.decode_cases import CASES, EVERYTHING, Case

if jax.default_backend() != "gpu":
    pytest.skip("needs an NVIDIA GPU: make test-gpu", allow_module_level=True)

LONG = [
    Case("long", T=1, N=8, K=8, H=128, slots=9001, starts=(9000, 5000, 17), dtype="bfloat16"),
    Case("long", T=3, N=16, K=2, H=64, R=1, slots=9001, starts=(8000, 64), dtype="float16"),
    Case("long", T=1, N=8, K=2, H=128, R=4, slots=5000, starts=(9000, 777), sink=True),
    Case(
        "long_ring",
        T=8,
        N=8,
        K=1,
        H=128,
        R=1,
        slots=4500,
        window=4400,
        starts=(9999, 4490),
        alibi=True,
        dtype="bfloat16",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.dtype}")
def test_equals_xla(case):
    contract.poison()
    decode_cases.check(case)
    with use_sizes(Sizes(Tiles(16, 16, 4, 2), 3)):
        contract.poison()
        decode_cases.check(case)


@pytest.mark.parametrize("case", LONG, ids=lambda case: f"{case.name}-{case.dtype}")
def test_equals_xla_where_rows_are_long(case):
    contract.poison()
    decode_cases.check(case)


@pytest.mark.parametrize("num_splits", [1, 2, 5, 128])
@pytest.mark.parametrize("tiles", [Tiles(16, 16, 1, 1), Tiles(32, 32, 4, 2), Tiles(64, 64, 8, 3)])
def test_any_sizes(num_splits, tiles):
    with use_sizes(Sizes(tiles, num_splits)):
        contract.poison()
        decode_cases.check(EVERYTHING)


def test_the_same_bits_from_run_to_run():
    case = LONG[0]
    first = decode_cases.attend(case, "triton", case.arrays())
    for _ in range(5):
        contract.poison()
        again = decode_cases.attend(case, "triton", case.arrays())
        assert all(bool((x == y).all()) for x, y in zip(first, again))


def test_the_default_is_triton():
    query, cache, *places = EVERYTHING.arrays()
    call = jax.jit(lambda *x: decode.attend(*x, **EVERYTHING.options()))
    assert "triton_kernel_call" in call.lower(query, cache, *places).as_text()
    got = call(query, cache, *places)
    want = decode_cases.attend(EVERYTHING, "triton", EVERYTHING.arrays())
    assert all(bool(jnp.array_equal(x, y)) for x, y in zip(got, want))

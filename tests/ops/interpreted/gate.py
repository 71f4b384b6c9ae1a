"""The gate of the forward pass: right on any input, taken where it must be and not elsewhere.

Only bfloat16 has one; the other dtypes run the same inputs without.
"""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from triton import language as tl

from rbf_jax.ops.triton import forward
from rbf_jax.ops.triton.gate import gated_tiles
from rbf_jax.ops.triton.tiles import Tiles, override_tiles
from tests.harness import contract, triton_interpreter
from tests.harness.adversarial import CASES

TILES = Tiles(16, 16, 1, 1)


@pytest.fixture(autouse=True)
def _small_tiles():
    with override_tiles(forward=TILES, queries=TILES, keys=TILES):
        yield


def run(case, dtype="bfloat16"):
    """What violates the contract, and the flags of all tiles."""
    triton_interpreter.launches.clear()
    found = contract.violations(contract.TRITON, case, dtype)
    flags = [out[2] for name, out in triton_interpreter.launches if name == "forward_kernel"]
    names = [name for name, _ in triton_interpreter.launches]
    assert names.count("gate_kernel") == (dtype == "bfloat16")
    return found, np.concatenate(flags)


# As the kernels are; for the tests that change nothing in them.
run_once = functools.cache(run)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gate(case):
    found, flags = run_once(case)
    assert not found
    assert len(flags) == case.B * case.N * 3
    taken = {0.0: "none", 1.0: "all"}.get(flags.mean(), "some")
    assert taken == case.gate, flags


SEEN_FROM_OUTSIDE = [c for c in CASES if c.name not in ("queries_beyond", "huge_values")]


@pytest.mark.parametrize("case", SEEN_FROM_OUTSIDE, ids=lambda case: case.name)
def test_gated_tiles_says_which(case):
    """Computed from the outside; lengths of queries and values it does not know."""
    query, _, _, gamma, weight, *_ = case.arrays(jnp.bfloat16)
    logsumexp = contract.expected(case, "bfloat16", True, 0)[0].logsumexp
    found = gated_tiles(query, logsumexp, gamma=gamma, key_norm_weight=weight, block_q=16)
    _, flags = run_once(case)
    np.testing.assert_array_equal(np.ravel(found), flags != 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gate_forced_on_every_tile(case, monkeypatch):
    monkeypatch.setattr(forward, "SMALLEST_SUM", tl.constexpr(3e38))
    found, flags = run(case)
    assert not found
    assert flags.all()


@pytest.mark.parametrize("name", ["far_keys", "tiny_weight", "norms_1e4", "one_near_key_causal"])
def test_without_the_gate_it_is_wrong(name, monkeypatch):
    monkeypatch.setattr(forward, "SMALLEST_SUM", tl.constexpr(0.0))
    monkeypatch.setattr(forward, "LARGEST_REFERENCE", tl.constexpr(float("inf")))
    found, flags = run(next(case for case in CASES if case.name == name))
    assert not flags.any()
    assert found


@pytest.mark.parametrize(
    ("case", "dtype"), list(zip(CASES, itertools.cycle(["float32", "float16"])))
)
def test_dtypes_without_a_gate(case, dtype):
    dtype = dtype if case.values == 1.0 else "float32"  # beyond float16
    found, flags = run(case, dtype)
    assert not found
    assert len(flags) == 1

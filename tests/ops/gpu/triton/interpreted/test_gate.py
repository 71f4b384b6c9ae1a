"""The gate of the forward pass: right on any input, taken where it must be and not elsewhere.

Only bfloat16 has one; the other dtypes run the same inputs without.
"""

import functools
import itertools

import numpy as np
import pytest
from triton import language as tl

from rbf_jax.ops.gpu.triton import forward
from rbf_jax.ops.gpu.triton.config import Tiles, use_tiles
from tests.harness import contract, triton_interpreter
from tests.harness.adversarial import CASES
from tests.harness.selected import by_default

TILES = Tiles(16, 16, 1, 1)
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def _small_tiles():
    with use_tiles(forward=TILES, queries=TILES, keys=TILES):
        yield


program_of = functools.cache(contract.program_of)  # most cases differ in numbers only


def run(case, dtype="bfloat16"):
    """What violates the contract, and the flags of all tiles."""
    triton_interpreter.launches.clear()
    found = contract.violations(contract.TRITON, case, dtype, make=program_of)
    flags = [out[2] for name, out in triton_interpreter.launches if name == "forward_kernel"]
    names = [name for name, _ in triton_interpreter.launches]
    assert names.count("gate_kernel") == (dtype == "bfloat16")
    return found, np.concatenate(flags)


# As the kernels are; for the tests that change nothing in them.
run_once = functools.cache(run)


def _named(*names):
    return [BY_NAME[name] for name in names]


DEFAULT = _named(
    "ordinary",
    "far_keys",
    "one_near_key_causal",
    "norms_1e4",
    "equal_further",
    "opposite",
    "sphere_below_the_largest_reference",
    "sphere_above_the_largest_reference",
    "negative_weight",
    "tiny_weight",
    "weight_per_head",
    "sink_far_below_the_bound",
    "huge_values",
    "row_masked",
    "queries_beyond",
    "no_keys",
    "window_far_slopes",
)


@pytest.mark.parametrize("case", by_default(DEFAULT, CASES), ids=lambda case: case.name)
def test_gate(case):
    found, flags = run_once(case)
    assert not found
    assert len(flags) == case.B * case.N * 3
    taken = {0.0: "none", 1.0: "all"}.get(flags.mean(), "some")
    assert taken == case.gate, flags


FORCED = _named("ordinary", "one_near_key_causal", "sink", "row_masked", "queries_beyond")


@pytest.mark.parametrize("case", by_default(FORCED, CASES), ids=lambda case: case.name)
def test_gate_forced_on_every_tile(case, monkeypatch):
    monkeypatch.setattr(forward, "SMALLEST_SUM", tl.constexpr(3e38))
    found, flags = run(case)
    assert not found
    assert flags.all()


@pytest.mark.parametrize(
    "name",
    by_default(["far_keys"], ["far_keys", "tiny_weight", "norms_1e4", "one_near_key_causal"]),
)
def test_without_the_gate_it_is_wrong(name, monkeypatch):
    monkeypatch.setattr(forward, "SMALLEST_SUM", tl.constexpr(0.0))
    monkeypatch.setattr(forward, "LARGEST_REFERENCE", tl.constexpr(float("inf")))
    found, flags = run(BY_NAME[name])
    assert not flags.any()
    assert found


WITHOUT = list(zip(CASES, itertools.cycle(["float32", "float16"])))
WITHOUT_BY_DEFAULT = [
    (BY_NAME["far_keys"], "float16"),
    (BY_NAME["one_near_key_causal"], "float32"),
    (BY_NAME["weight_per_head"], "float16"),
    (BY_NAME["row_masked"], "float32"),
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    by_default(WITHOUT_BY_DEFAULT, WITHOUT),
    ids=lambda x: getattr(x, "name", x),
)
def test_dtypes_without_a_gate(case, dtype):
    dtype = dtype if case.values == 1.0 else "float32"  # beyond float16
    found, flags = run(case, dtype)
    assert not found
    assert len(flags) == 1

"""The gate of the forward pass: right on any input, taken where it must be and not elsewhere.

Only bfloat16 has one; the other dtypes run the same inputs without.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest
from triton import language as tl

from rbf_jax.ops.triton import forward
from rbf_jax.ops.triton.tiles import Tiles, override_tiles
from tests.ops import cases, contract, triton_interpreter

TILES = Tiles(16, 16, 1, 1)


@dataclasses.dataclass(frozen=True)
class Adversarial(cases.Case):
    """A case that says of how many tiles the gate must be taken.

    `change` makes other queries and keys of the drawn ones; `weight` is λ.
    """

    T: int = 48
    S: int = 48
    B: int = 1
    gate: Literal["all", "some", "none"] = "all"
    change: Callable | None = None
    weight: float | None = None

    def arrays(self, dtype, seed=0):
        query, key, *rest = super().arrays(dtype, seed)
        if self.change is not None:
            query, key = (x.astype(dtype) for x in self.change(query, key))
        if self.weight is not None:
            rest[2] = np.float32(self.weight)
        return query, key, *rest


def one_near(index, query, key):
    """A key at the origin among keys that are far from every query."""
    return query, key.at[:, index].set(0)


def some_far(query, key):
    return query.at[:, 16:, :, 0].add(-60), key


def opposite(query, key):
    """The nearest key of each query is twice its norm away."""
    return query, -query


def equal(at, query, key):
    return query, jnp.full_like(key, at)


def equal_both(query, key):
    one = key[:, :1]
    return jnp.broadcast_to(one, query.shape), jnp.broadcast_to(one, key.shape)


def sphere(radius, query, key):
    """Queries of one norm but for rounding, each with a key nearby: the bound is almost met."""
    wide, noise = query.astype(jnp.float32), key.astype(jnp.float32)
    query = radius * wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)
    return query, query + 0.3 * noise


def case(name, gate, change=None, weight=None, **rest):
    fields = {f.name for f in dataclasses.fields(Adversarial)}
    own = {key: rest.pop(key) for key in list(rest) if key in fields}
    options = tuple(sorted(rest.items()))
    return Adversarial(name, gate=gate, change=change, weight=weight, options=options, **own)


def fully_masked_rows(B, N, T, S):
    mask = np.ones((1, 1, T, S), bool)
    mask[:, :, 20] = False
    return mask


near = functools.partial
CASES = [
    case("ordinary", "none"),
    case("far_keys", "all", offset=60.0),
    case("some_far", "some", some_far),
    case("one_near_key", "none", near(one_near, 37), offset=60.0),
    case("one_near_key_causal", "some", near(one_near, 10), offset=60.0, is_causal=True),
    case("norms_1e-4", "none", norm=1e-4),
    case("norms_1e-2", "none", norm=1e-2),
    case("norms_10", "all", norm=10.0),
    case("norms_1e2", "all", norm=1e2),
    case("norms_1e4", "all", norm=1e4 / 4),
    case("equal_near", "none", near(equal, 0.5)),
    case("equal_far", "all", near(equal, 16.0)),
    case("equal_keys_and_queries", "none", equal_both),
    case("opposite", "all", opposite, norm=5.0),
    case("sphere_below_the_largest_reference", "none", near(sphere, 140.0)),
    case("sphere_above_the_largest_reference", "all", near(sphere, 180.0)),
    case("dot_product", "all", weight=0.0),
    case("negative_weight", "all", weight=-0.5),
    case("tiny_weight", "all", weight=1e-6),
    case("small_weight", "all", weight=1e-2),
    case("weight_per_head", "some", per_head=True, N=4, K=2),
    case("sink", "none", origin_sink=True),
    case("sink_far_below_the_bound", "all", near(equal, 16.0), origin_sink=True, norm=10.0),
    case("sink_beside_near_keys", "none", near(sphere, 100.0), origin_sink=True),
    case("row_masked", "some", mask=fully_masked_rows),
    case("queries_beyond", "none", query_seq_lengths=lambda *_: np.array([20])),
    case("no_keys", "all", key_value_seq_lengths=lambda *_: np.array([0])),
    case("window_far", "some", some_far, local_window_size=(20, 9)),
    case("window_far_slopes", "some", some_far, alibi_slopes=lambda *_: np.array([0.0, 0.5])),
]


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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gate(case):
    found, flags = run(case)
    assert not found
    assert len(flags) == case.B * case.N * 3
    taken = {0.0: "none", 1.0: "all"}.get(flags.mean(), "some")
    assert taken == case.gate, flags


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
    found, flags = run(case, dtype)
    assert not found
    assert len(flags) == 1

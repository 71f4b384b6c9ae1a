"""The Mosaic GPU kernels by Pallas's interpreter, on the CPU: what it computes, and its barriers.

What only a GPU can tell: whether the programs compile there, how fast they are, and whether memory
that is read and written asynchronously is so in the right order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.ops.call import Rules
from rbf_jax.ops.dispatch import ATTENTION
from rbf_jax.ops.gpu.mosaic import forward
from rbf_jax.ops.gpu.mosaic import passes as attention
from rbf_jax.ops.gpu.mosaic.config import BackwardTiles, ForwardTiles, use_tiles
from tests.harness import adversarial, cases, contract, kernels
from tests.harness.selected import by_default

TILES = ForwardTiles(block_k=64)
MANY_TILES = ForwardTiles(block_k=64, tiles_per_cta=3)
TWO_KERNELS = BackwardTiles()
FUSED = BackwardTiles(fused=True)
ADVERSARIAL = {case.name: case for case in adversarial.CASES}
LENGTHS_AND_SINK = cases.case(
    "lengths_and_sink",
    origin_sink=True,
    query_seq_lengths=lambda *_: np.array([7, 33], np.int32),
    key_value_seq_lengths=lambda *_: np.array([33, 11], np.int32),
)
BY_NAME = {**cases.BY_NAME, LENGTHS_AND_SINK.name: LENGTHS_AND_SINK}
# Rules together, heads that are filled up, and more tiles of keys than stages.
TILES_AND_RULES = {
    "T": 130,
    "S": 300,
    "B": 1,
    "N": 2,
    "K": 1,
    "H": 80,
    "per_head": True,
    "sink_logits": cases.sinks(3, -2),
    "alibi_slopes": lambda B, N, *_: 0.1 * np.arange(N),
    "query_seq_lengths": lambda *_: np.array([100], np.int32),
    "key_value_seq_lengths": lambda *_: np.array([270], np.int32),
}
CAUSAL = cases.case("all_causal", is_causal=True, **TILES_AND_RULES)
WINDOW = cases.case("all_window", local_window_size=(150, 9), **TILES_AND_RULES)
STEPS = cases.case("steps", T=130, S=300, B=1, N=1, K=1)
# Some of the steps are within all rules, others are not.
WHOLE_STEPS = cases.case(
    "whole_steps",
    T=520,
    S=260,
    B=2,
    N=1,
    K=1,
    local_window_size=(270, 0),
    key_value_seq_lengths=lambda *_: np.array([256, 140], np.int32),
)


def _forward_violations(case, dtype="bfloat16", tiles=TILES):
    """Of the output and the logsumexp: the gradients are the expected ones, and take no time."""
    gradients = contract.expected(case, dtype, True, 0)[0][2:]

    def make(subject, static, gamma):
        def program(arrays, options):
            query, key, value, gamma, key_norm_weight, *_ = arrays
            numbers = {"gamma": gamma, "key_norm_weight": key_norm_weight}
            with_logsumexp = {"return_residual": True, **options, **dict(static)}
            return *subject.attend(query, key, value, **numbers, **with_logsumexp), *gradients

        return program

    with use_tiles(tiles):
        return contract.violations(contract.MOSAIC, case, dtype, make=make)


def _id(x):
    kernels = {True: "fused", False: "two_kernels"}.get(getattr(x, "fused", None))
    return getattr(x, "name", kernels or x)


GRADIENTS = [
    (CAUSAL, "bfloat16", TWO_KERNELS),
    (WINDOW, "float16", FUSED),
    (BY_NAME["multi_query"], "bfloat16", dataclasses.replace(TWO_KERNELS, consumers=1)),
    (BY_NAME["window_two_sided"], "bfloat16", TWO_KERNELS),
    (LENGTHS_AND_SINK, "float16", TWO_KERNELS),
    (BY_NAME["alibi"], "bfloat16", TWO_KERNELS),
    (BY_NAME["grouped"], "bfloat16", FUSED),
    (BY_NAME["window_two_sided"], "float16", dataclasses.replace(FUSED, stages=3)),
    (LENGTHS_AND_SINK, "float16", FUSED),
]


@pytest.mark.parametrize(("case", "dtype", "tiles"), by_default(GRADIENTS[:2], GRADIENTS), ids=_id)
def test_values_and_gradients(case, dtype, tiles):
    with use_tiles(TILES, tiles):
        assert not contract.violations(contract.MOSAIC, case, dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backward", [TWO_KERNELS, FUSED], ids=["two", "fused"])
@pytest.mark.parametrize("case", [STEPS, WHOLE_STEPS], ids=lambda case: case.name)
def test_more_steps_than_stages(case, backward):
    with use_tiles(TILES, backward):
        assert not contract.violations(contract.MOSAIC, case, "bfloat16")


@pytest.mark.exhaustive
def test_more_steps_than_stages_in_float16():
    assert not _forward_violations(STEPS, "float16")


def test_many_tiles_in_a_cta():
    """Five tiles for CTAs of three, one of which is beyond the queries."""
    assert not _forward_violations(WHOLE_STEPS, tiles=MANY_TILES)


def test_gate_of_one_tile_of_many():
    shape = {"T": 260, "S": 150, "N": 1, "K": 1}
    case = adversarial.case("one", "some", _second_tile_far, **shape)
    assert not _forward_violations(case, tiles=MANY_TILES)


@pytest.mark.exhaustive
def test_larger_heads():
    case = dataclasses.replace(cases.BY_NAME["grouped"], B=1, H=128, T=70, S=70)
    assert not _forward_violations(case, tiles=ForwardTiles(block_k=128))


GATED = ["far_keys", "one_near_key_causal", "tiny_weight", "huge_values", "queries_beyond"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", GATED)
def test_gate(name):
    assert not _forward_violations(ADVERSARIAL[name])


def _second_tile_far(query, key):
    return query.at[:, 64:, :, 0].add(-60), key


@pytest.mark.exhaustive
def test_gate_of_one_warpgroup():
    """All of the CTA go over the keys again, in as many steps."""
    shape = {"T": 128, "S": 300, "N": 1, "K": 1}
    assert not _forward_violations(adversarial.case("one", "some", _second_tile_far, **shape))


def test_gate_forced_on_every_tile(monkeypatch):
    monkeypatch.setattr(forward, "SMALLEST_SUM", 3e38)
    seen = []
    attend = forward.Block._attend
    monkeypatch.setattr(forward.Block, "_attend", lambda *x: seen.append(x[-1]) or attend(*x))
    assert not _forward_violations(ADVERSARIAL["sink"])
    assert seen == [False, True]


@pytest.mark.parametrize("name", by_default(["far_keys"], ["far_keys", "tiny_weight"]))
def test_without_the_gate_it_is_wrong(name, monkeypatch):
    monkeypatch.setattr(forward, "SMALLEST_SUM", 0.0)
    monkeypatch.setattr(forward, "LARGEST_REFERENCE", np.inf)
    assert _forward_violations(ADVERSARIAL[name])


def test_vmap_folds_the_axis_into_the_batch():
    inputs = cases.BY_NAME["causal"].arrays(jnp.bfloat16)[:3]
    attend = functools.partial(contract.MOSAIC.attend, is_causal=True)
    with use_tiles(TILES):
        want = attend(*inputs)
        got = jax.vmap(attend)(*[x[:, None] for x in inputs])
    np.testing.assert_array_equal(np.asarray(got[:, 0]), np.asarray(want))


@pytest.mark.parametrize(
    ("rules", "starts", "backward"),
    [
        (Rules(right=0, return_residual=True), (50, 5), FUSED),
        pytest.param(
            Rules(left=9, right=3, return_residual=True),
            (-30, -7),
            TWO_KERNELS,
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["causal", "window"],
)
def test_offsets(rules, starts, backward):
    with use_tiles(TILES, backward):
        attend = ATTENTION["mosaic"].attend
        kernels.check_offset(attend, rules, starts, "bfloat16", 3e-2, T=40, S=90, N=1, K=1)


@pytest.mark.exhaustive
def test_ring():
    rules = Rules(right=0, sink=True, return_residual=True)
    with use_tiles(TILES, FUSED):
        kernels.check_ring(attention.PASSES, rules, "bfloat16", 3e-2, T=40, S=40, B=1, N=1, K=1)

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

from rbf_jax.ops import nvidia, reference
from rbf_jax.ops.mosaic import attention, forward
from rbf_jax.ops.mosaic.tiles import Tiles, override_tiles
from rbf_jax.ops.ring import Ring, ring_attention
from rbf_jax.ops.types import Inputs, Masking, Options
from tests.harness import adversarial, cases, contract
from tests.harness.mosaic_interpreter import interpreted

TILES = Tiles(block_k=64)
MANY_VISITS = Tiles(block_k=64, visits=3)
TWO_KERNELS = Tiles(block_k=64, pingpong=False)
ONE_KERNEL = dataclasses.replace(TWO_KERNELS, one_kernel=True)
ADVERSARIAL = {case.name: case for case in adversarial.CASES}
FORWARD = [
    ("multi_query", "bfloat16", Tiles(block_k=64, consumers=1, pingpong=False)),
    ("causal_more_queries", "bfloat16", Tiles(block_k=64, consumers=3, pingpong=False)),
]
GRADIENTS = [
    ("multi_query", "bfloat16", dataclasses.replace(TWO_KERNELS, consumers=1)),
    ("window_two_sided", "bfloat16", TWO_KERNELS),
    ("lengths_and_sink", "float16", TWO_KERNELS),
    ("alibi", "bfloat16", TWO_KERNELS),
    ("grouped", "bfloat16", ONE_KERNEL),
    ("window_two_sided", "float16", dataclasses.replace(ONE_KERNEL, stages=3)),
    ("lengths_and_sink", "float16", ONE_KERNEL),
]
LENGTHS_AND_SINK = cases.case(
    "lengths_and_sink",
    origin_sink=True,
    query_seq_lengths=lambda *_: np.array([7, 33], np.int32),
    key_value_seq_lengths=lambda *_: np.array([33, 11], np.int32),
)
BY_NAME = {**cases.BY_NAME, LENGTHS_AND_SINK.name: LENGTHS_AND_SINK}
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


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    monkeypatch.setattr(nvidia, "unavailable", lambda: None)
    monkeypatch.setattr(nvidia, "target", lambda: nvidia.Target("NVIDIA H100 80GB HBM3", 90))
    with interpreted():
        yield


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

    with override_tiles(tiles):
        return contract.violations(contract.MOSAIC, case, dtype, make=make)


def _ids(runs):
    return [f"{name}-{dtype}-{'one' if tiles.one_kernel else 'two'}" for name, dtype, tiles in runs]


@pytest.mark.parametrize(("name", "dtype", "tiles"), FORWARD, ids=_ids(FORWARD))
def test_values(name, dtype, tiles):
    assert not _forward_violations(BY_NAME[name], dtype, tiles)


@pytest.mark.parametrize(("name", "dtype", "tiles"), GRADIENTS, ids=_ids(GRADIENTS))
def test_values_and_gradients(name, dtype, tiles):
    with override_tiles(TILES, tiles):
        assert not contract.violations(contract.MOSAIC, BY_NAME[name], dtype)


@pytest.mark.parametrize("backward", [TWO_KERNELS, ONE_KERNEL], ids=["two", "one"])
@pytest.mark.parametrize("case", [STEPS, WHOLE_STEPS], ids=lambda case: case.name)
def test_more_steps_than_stages(case, backward):
    with override_tiles(TILES, backward):
        assert not contract.violations(contract.MOSAIC, case, "bfloat16")


def test_more_steps_than_stages_in_float16():
    assert not _forward_violations(STEPS, "float16")


def test_many_tiles_in_a_block_of_threads():
    """Five tiles for blocks of three, one of which is beyond the queries."""
    assert not _forward_violations(WHOLE_STEPS, tiles=MANY_VISITS)


def test_gate_of_one_tile_of_many():
    shape = {"T": 260, "S": 150, "N": 1, "K": 1}
    case = adversarial.case("one", "some", _second_tile_far, **shape)
    assert not _forward_violations(case, tiles=MANY_VISITS)


def test_larger_heads():
    case = dataclasses.replace(cases.BY_NAME["grouped"], B=1, H=128, T=70, S=70)
    assert not _forward_violations(case, tiles=Tiles(block_k=128))


@pytest.mark.parametrize(
    "name", ["far_keys", "one_near_key_causal", "tiny_weight", "huge_values", "queries_beyond"]
)
def test_gate(name):
    assert not _forward_violations(ADVERSARIAL[name])


def _second_tile_far(query, key):
    return query.at[:, 64:, :, 0].add(-60), key


def test_gate_of_one_warpgroup():
    """All of the block go over the keys again, in as many steps."""
    shape = {"T": 128, "S": 300, "N": 1, "K": 1}
    assert not _forward_violations(adversarial.case("one", "some", _second_tile_far, **shape))


def test_gate_forced_on_every_tile(monkeypatch):
    monkeypatch.setattr(forward, "SMALLEST_SUM", 3e38)
    seen = []
    attend = forward.Block._attend
    monkeypatch.setattr(forward.Block, "_attend", lambda *x: seen.append(x[-1]) or attend(*x))
    assert not _forward_violations(ADVERSARIAL["sink"])
    assert seen == [False, True]


@pytest.mark.parametrize("name", ["far_keys", "tiny_weight"])
def test_without_the_gate_it_is_wrong(name, monkeypatch):
    monkeypatch.setattr(forward, "SMALLEST_SUM", 0.0)
    monkeypatch.setattr(forward, "LARGEST_REFERENCE", np.inf)
    assert _forward_violations(ADVERSARIAL[name])


def test_vmap_folds_the_axis_into_the_batch():
    inputs = cases.BY_NAME["causal"].arrays(jnp.bfloat16)[:3]
    attend = functools.partial(contract.MOSAIC.attend, is_causal=True)
    with override_tiles(TILES):
        want = attend(*inputs)
        got = jax.vmap(attend)(*[x[:, None] for x in inputs])
    np.testing.assert_array_equal(np.asarray(got[:, 0]), np.asarray(want))


@pytest.mark.parametrize(
    ("rule", "starts", "backward"),
    [({"is_causal": True}, (50, 5), ONE_KERNEL), ({"window": (9, 3)}, (-30, -7), TWO_KERNELS)],
    ids=["causal", "window"],
)
def test_positions_that_are_not_indices(rule, starts, backward):
    """As ring attention has them."""
    query, key, value, _, _, dout, dlogsumexp = cases.case("offset", T=40, S=90, N=1, K=1).arrays(
        jnp.bfloat16
    )
    masking = Masking(alibi_slopes=jnp.full(1, 0.1), query_offset=jnp.array(starts, jnp.int32))
    options = Options(return_residual=True, **rule)

    def results(attend):
        def call(*x):
            return attend(Inputs(*x, jnp.full(1, 0.3), jnp.ones(1)), masking, options)

        results, vjp = jax.vjp(call, query, key, value)
        return *results, *vjp((dout, dlogsumexp))

    with override_tiles(TILES, backward):
        got = results(attention.attend)
    for mine, other in zip(got, results(reference.attend), strict=True):
        mine, other = (np.asarray(x, np.float32) for x in (mine, other))
        np.testing.assert_allclose(mine, other, rtol=3e-2, atol=3e-2)


def test_ring():
    """Two devices, which an axis of vmap stands for: each attends to chunks of both."""
    options = Options(is_causal=True, origin_sink=True, return_residual=True)
    case = cases.case("ring", T=40, S=40, B=1, N=1, K=1)
    query, key, value, _, _, dout, dlogsumexp = case.arrays(jnp.bfloat16)
    ring = Ring.plan("seq", 2, 40, 40, options)

    def results(attend, query, key, value, dout, dlogsumexp):
        def call(*x):
            return attend(Inputs(*x, jnp.full(1, 0.3), jnp.ones(1)), Masking(), options)

        outputs, vjp = jax.vjp(call, query, key, value)
        return *outputs, *vjp((dout, dlogsumexp))

    def split(x):
        return x.reshape(1, 2, -1, *x.shape[2:]).swapaxes(0, 1)

    arrays = query, key, value, dout, dlogsumexp
    one = functools.partial(results, ring_attention(ring, attention.PASSES))
    with override_tiles(Tiles(block_k=64, consumers=1, pingpong=False), ONE_KERNEL):
        got = jax.jit(jax.vmap(one, axis_name="seq"))(*map(split, arrays))
    for mine, other in zip(got, results(reference.attend, *arrays), strict=True):
        mine, other = (np.asarray(x, np.float32) for x in (mine, split(other)))
        np.testing.assert_allclose(mine, other, rtol=3e-2, atol=3e-2)

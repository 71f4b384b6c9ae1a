"""Head dimensions, tiles, and drawn calls: short sequences that still have several tiles."""

import contextlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import tests.harness.triton_interpreter  # noqa: F401 (before Triton)
from rbf_jax.ops.triton import attention as triton
from rbf_jax.ops.triton.tiles import Tiles, override_tiles
from tests.harness import cases, contract, offsets, random_cases
from tests.harness.cases import drawn_case


@contextlib.contextmanager
def tiles(block_q, block_k, heads_at_once=1):
    chosen = Tiles(block_q, block_k, 1, 1, heads_at_once)
    with override_tiles(forward=chosen, queries=chosen, keys=chosen):
        yield


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("H", [1, 16, 17, 24, 32, 64, 80, 96, 128, 200, 256])
def test_head_dimensions(H, dtype):
    case = cases.case(f"H={H}", T=20, S=26, N=4, K=2, B=1, H=H, is_causal=True)
    with tiles(16, 16):
        assert not contract.violations(contract.TRITON, case, dtype)


# Whole tiles, tiles cut by each rule, tiles cut by the end, tiles with nothing to do.
PHASES = [
    cases.case("full", T=50, S=67),
    cases.case("causal", T=67, S=67, is_causal=True),
    cases.case("causal_more_keys", T=35, S=67, is_causal=True),
    cases.case("causal_more_queries", T=67, S=35, is_causal=True),
    cases.case("whole_tiles", T=64, S=64, is_causal=True),
    cases.case("window", T=67, S=67, is_causal=True, local_window_size=40),
    cases.case("window_narrow", T=67, S=67, local_window_size=(5, 2)),
    cases.case("window_wide", T=67, S=67, local_window_size=(37, 33)),
    cases.case("window_to_the_right", T=50, S=99, local_window_size=(0, 45)),
    cases.case("window_more_queries", T=99, S=50, local_window_size=(20, 3)),
    cases.case("window_one_sided", T=67, S=67, local_window_size=(67, 9)),
    cases.case("grouped", T=40, S=40, N=6, K=2, is_causal=True),
    cases.case(
        "lengths",
        T=67,
        S=67,
        B=3,
        is_causal=True,
        query_seq_lengths=lambda *_: np.array([67, 0, 20]),
        key_value_seq_lengths=lambda *_: np.array([16, 67, 33]),
    ),
    cases.case(
        "lengths_and_window",
        T=67,
        S=67,
        local_window_size=(20, 12),
        query_seq_lengths=lambda *_: np.array([40, 64]),
        key_value_seq_lengths=lambda *_: np.array([64, 5]),
    ),
    cases.case("segments", T=67, S=67, **cases.SEGMENTS),
    cases.case("segments_more_keys", T=40, S=90, is_causal=True, **cases.SEGMENTS),
    cases.case(
        "segments_nowhere",
        T=40,
        S=40,
        query_segment_ids=lambda B, N, T, S: np.full((B, T), 7),
        key_value_segment_ids=lambda B, N, T, S: np.arange(B * S).reshape(B, S) % 9 - 1,
    ),
    cases.case(
        "mask_of_blocks",
        T=64,
        S=64,
        mask=lambda B, N, T, S: np.kron(np.eye(4, dtype=bool)[::-1], np.ones((16, 16), bool)),
    ),
]


@pytest.mark.parametrize("blocks", [(16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("case", PHASES, ids=lambda case: case.name)
def test_phases(case, blocks):
    with tiles(*blocks):
        assert not contract.violations(contract.TRITON, case, "float32")


@pytest.mark.parametrize("heads_at_once", [2, 3, 8])
@pytest.mark.parametrize("name", ["full", "grouped"])
def test_order_of_programs(name, heads_at_once):
    """Heads that are worked on together, also where their number divides nothing."""
    case = next(case for case in PHASES if case.name == name)
    with tiles(16, 32, heads_at_once):
        assert not contract.violations(contract.TRITON, case, "float32")


SIZES = st.sampled_from([(16, 16), (16, 32), (32, 16)])


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(case=drawn_case(), blocks=SIZES, dtype=st.sampled_from(["float32", "bfloat16"]))
def test_any_shapes_and_options(case, blocks, dtype):
    with tiles(*blocks):
        assert not contract.violations(contract.TRITON, case, dtype)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # of the interpreter
@pytest.mark.parametrize("filling", [np.nan, np.inf])
def test_what_is_beyond_the_lengths_is_left_out(filling):
    """Tiles of 16 hold both sides of a length."""
    case = cases.case("beyond", T=40, S=40, B=1, N=1, K=1)
    query, key, value, gamma, weight, dout, _ = case.arrays(jnp.float32)
    lengths = {"query_seq_lengths": jnp.array([21]), "key_value_seq_lengths": jnp.array([27])}

    def results(filling):
        arrays = [
            x.at[:, length:].set(filling)
            for x, length in ((query, 21), (key, 27), (value, 27), (dout, 21))
        ]

        def call(*inputs):
            numbers = {"gamma": gamma, "key_norm_weight": weight}
            return contract.TRITON.attend(*inputs, **numbers, **lengths)

        out, vjp = jax.vjp(call, *arrays[:3])
        dquery, dkey, dvalue = vjp(arrays[3])
        return out, dquery[:, :21], dkey[:, :27], dvalue

    with tiles(16, 16):
        for got, want in zip(results(filling), results(0), strict=True):
            np.testing.assert_array_equal(got, want)


@offsets.parametrize
def test_offsets(name, starts):
    with tiles(16, 16):
        offsets.check(triton.attend, name, starts, "float32", 2e-4)


@pytest.mark.parametrize("seed", [0, 1, 2, *random_cases.failed_seeds()])
def test_random_cases(seed):
    """Some of what is run on the GPU by the thousand, and all that ever failed there."""
    assert not random_cases.violations(seed)

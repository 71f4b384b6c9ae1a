"""Head dimensions, tiles, and drawn calls: short sequences that still have several tiles."""

import contextlib
import dataclasses
import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from rbf_jax.ops.call import Rules
from rbf_jax.ops.dispatch import ATTENTION
from rbf_jax.ops.gpu.triton.config import Tiles, use_tiles
from tests.harness import cases, contract, kernels, offsets, random_cases
from tests.harness.cases import drawn_case
from tests.harness.selected import by_default


@contextlib.contextmanager
def tiles(block_q, block_k, heads_at_once=1):
    chosen = Tiles(block_q, block_k, 1, 1, heads_at_once)
    with use_tiles(forward=chosen, queries=chosen, keys=chosen):
        yield


@pytest.mark.parametrize(
    ("H", "dtype"),
    by_default(
        [(17, "bfloat16"), (80, "float32"), (256, "float32")],
        itertools.product((1, 16, 17, 24, 32, 64, 80, 96, 128, 200, 256), ("float32", "bfloat16")),
    ),
)
def test_head_dimensions(H, dtype):
    case = cases.case(f"H={H}", T=20, S=26, N=2, K=1, B=1, H=H, is_causal=True)
    with tiles(16, 16):
        assert not contract.violations(contract.TRITON, case, dtype)


_one_head = functools.partial(cases.case, B=1, N=1, K=1)
# Whole tiles, tiles cut by each rule, tiles cut by the end, tiles with nothing to do. Some windows
# are such that one more or less would change which tiles are whole, cut or left out.
PHASES = [
    _one_head("full", T=50, S=67),
    _one_head("causal", T=67, S=67, is_causal=True),
    _one_head("causal_more_keys", T=35, S=67, is_causal=True),
    _one_head("causal_more_queries", T=67, S=35, is_causal=True),
    _one_head("whole_tiles", T=64, S=64, is_causal=True),
    _one_head("window", T=67, S=67, is_causal=True, local_window_size=32),
    _one_head("window_narrow", T=67, S=67, local_window_size=(5, 2)),
    _one_head("window_wide", T=67, S=67, local_window_size=(33, 33)),
    _one_head("window_to_the_right", T=50, S=99, local_window_size=(0, 46)),
    _one_head("window_more_queries", T=99, S=50, local_window_size=(30, 3)),
    _one_head("window_one_sided", T=67, S=67, local_window_size=(67, 9)),
    cases.case("grouped", T=40, S=40, B=1, N=6, K=2, is_causal=True),
    _one_head(
        "lengths",
        T=67,
        S=67,
        B=3,
        is_causal=True,
        query_seq_lengths=lambda *_: np.array([67, 0, 20]),
        key_value_seq_lengths=lambda *_: np.array([16, 67, 33]),
    ),
    _one_head(
        "lengths_and_window",
        T=67,
        S=67,
        B=2,
        local_window_size=(20, 12),
        query_seq_lengths=lambda *_: np.array([40, 64]),
        key_value_seq_lengths=lambda *_: np.array([64, 5]),
    ),
    _one_head("segments", T=67, S=67, **cases.SEGMENTS),
    _one_head("segments_more_keys", T=40, S=90, B=2, is_causal=True, **cases.SEGMENTS),
    _one_head(
        "segments_nowhere",
        T=40,
        S=40,
        query_segment_ids=lambda B, N, T, S: np.full((B, T), 7),
        key_value_segment_ids=lambda B, N, T, S: np.arange(B * S).reshape(B, S) % 9 - 1,
    ),
    _one_head(
        "mask_of_blocks",
        T=64,
        S=64,
        mask=lambda B, N, T, S: np.kron(np.eye(4, dtype=bool)[::-1], np.ones((16, 16), bool)),
    ),
    _one_head("global_keys", T=67, S=67, is_causal=True, local_window_size=5, num_global_keys=3),
    _one_head(
        "global_keys_of_many_tiles", T=67, S=80, local_window_size=(3, 2), num_global_keys=53
    ),
    _one_head(
        "global_keys_segments",
        T=67,
        S=67,
        B=2,
        is_causal=True,
        num_global_keys=20,
        **cases.SEGMENTS,
    ),
    _one_head(
        "global_keys_alibi",
        T=50,
        S=67,
        num_global_keys=19,
        alibi_slopes=lambda *_: np.array([0.2], np.float32),
    ),
    _one_head(
        "global_keys_lengths",
        T=67,
        S=67,
        B=2,
        local_window_size=(20, 12),
        num_global_keys=5,
        sink_logits=cases.sinks(2.0),
        query_seq_lengths=lambda *_: np.array([40, 64]),
        key_value_seq_lengths=lambda *_: np.array([64, 2]),
    ),
]


BLOCKS = [(16, 32), (32, 16)]


@pytest.mark.parametrize(
    ("case", "blocks"),
    by_default(
        list(zip(PHASES, itertools.cycle(BLOCKS))),
        itertools.product(PHASES, BLOCKS),
    ),
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_phases(case, blocks):
    with tiles(*blocks):
        assert not contract.violations(contract.TRITON, case, "float32")


FULL = cases.case("full", T=50, S=67)
GROUPED = next(case for case in PHASES if case.name == "grouped")


@pytest.mark.parametrize(
    ("case", "heads_at_once"),
    by_default([(FULL, 3), (GROUPED, 8)], itertools.product((FULL, GROUPED), (2, 3, 8))),
    ids=lambda x: getattr(x, "name", x),
)
def test_order_of_programs(case, heads_at_once):
    """Heads that are worked on together, also where their number divides nothing."""
    with tiles(16, 32, heads_at_once):
        assert not contract.violations(contract.TRITON, case, "float32")


SIZES = st.sampled_from([(16, 16), (16, 32), (32, 16)])


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


@pytest.mark.parametrize(
    ("rules", "starts", "slopes"),
    [
        (Rules(right=0, sink=True), (-30, 60), True),
        (Rules(left=6, right=3), (16, -7), False),
        (Rules(left=9, right=0, num_global_keys=20), (5, 33), True),
    ],
    ids=["causal", "window", "causal_window"],
)
def test_offsets(rules, starts, slopes):
    rules = dataclasses.replace(rules, return_residual=True)
    attend = ATTENTION["triton"].attend
    with tiles(16, 16):
        kernels.check_offset(attend, rules, starts, "float32", 1e-4, slopes=slopes, T=21, S=37)


@pytest.mark.exhaustive
@offsets.parametrize
def test_offsets_in_a_longer_sequence(name, starts):
    with tiles(16, 16):
        offsets.check(ATTENTION["triton"].attend, name, starts, "float32", 2e-4)


@pytest.mark.parametrize(
    "seed", by_default([28, 1076, 1871], [0, 1, 2, *random_cases.failed_seeds()])
)
def test_random_cases(seed):
    """Some of what is run on the GPU by the thousand, and all that ever failed there."""
    assert not random_cases.violations(seed)

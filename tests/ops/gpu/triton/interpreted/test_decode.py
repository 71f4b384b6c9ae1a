"""Attention to a cache, with few keys that still are several blocks and splits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.ops.decode import api as decode
from rbf_jax.ops.decode.triton import Sizes, use_sizes
from rbf_jax.ops.gpu.triton.config import Tiles
from tests.harness import cases, contract, decode_cases
from tests.harness import triton_interpreter as interpreter
from tests.harness.decode_cases import CASES, EVERYTHING, Case
from tests.harness.selected import by_default
from tests.ops import test_decode


def sizes(num_splits, block_q=16):
    return use_sizes(Sizes(Tiles(block_q, 16, 1, 1), num_splits))


BY_NAME = {(case.name, case.dtype): case for case in CASES}
# Of the cases, one of each rule and dtype.
DEFAULT = [
    ("float16", "float16"),
    ("registers", "float32"),
    ("registers_alone", "float32"),
    ("nothing_but_the_sink", "float32"),
    ("sink", "bfloat16"),
    ("sink_logits", "float32"),
    ("nothing_but_sink_logits", "float32"),
    ("several_tokens", "float32"),
    ("window", "float32"),
    ("window_of_none", "float32"),
    ("window_and_registers", "float32"),
    ("ring", "bfloat16"),
    ("ring_of_all", "float32"),
    ("alibi", "float32"),
    ("many_rows", "float32"),
    ("H=100", "float32"),
    ("H=200", "bfloat16"),
]


@pytest.mark.parametrize(
    "case",
    by_default([BY_NAME[name] for name in DEFAULT], CASES),
    ids=lambda case: f"{case.name}-{case.dtype}",
)
def test_equals_xla(case):
    with sizes(3):
        decode_cases.check(case)


CONTRACT = [  # a GPU does all
    (test_decode.STEP, "bfloat16"),
    (test_decode.LENGTHS_CAUSAL, "float32"),
    (test_decode.SINKS_CAUSAL, "float32"),
    (cases.BY_NAME["far_keys"], "float16"),
    (cases.BY_NAME["huge_norms"], "bfloat16"),
]


@pytest.mark.parametrize(
    ("case", "dtype"), by_default(CONTRACT[:3], CONTRACT), ids=test_decode.name_of
)
def test_the_operations_contract(case, dtype):
    """Held to float64."""
    attend = functools.partial(test_decode.attend, implementation="triton")
    with sizes(2):
        subject = dataclasses.replace(test_decode.SUBJECT, attend=attend)
        assert not contract.violations(subject, case, dtype)


@pytest.mark.parametrize("num_splits", by_default([1, 5, 33], [1, 2, 5, 33]))
def test_any_number_of_splits(num_splits):
    """More of them than blocks, too."""
    with sizes(num_splits, block_q=32):
        decode_cases.check(EVERYTHING)


@pytest.mark.parametrize("case", [EVERYTHING, Case("step", dtype="bfloat16")], ids=lambda c: c.name)
def test_sizes_of_its_own_choice(case):
    decode_cases.check(case)


def test_one_split_needs_no_merge():
    for num_splits, names in ((1, ["decode_kernel"]), (2, ["decode_kernel", "merge_kernel"])):
        interpreter.launches.clear()
        with sizes(num_splits):
            jax.block_until_ready(decode_cases.attend(EVERYTHING, "triton", EVERYTHING.arrays()))
        assert [name for name, _ in interpreter.launches] == names


def test_short_rows_are_shared_out_too():
    """All splits of a row work, however little of the cache it has filled."""
    case = Case("shared_out", starts=(31, 63), N=1, K=1, slots=1000)
    interpreter.launches.clear()
    with sizes(2):
        jax.block_until_ready(decode_cases.attend(case, "triton", case.arrays()))
    (_, logsumexp), _ = (outputs for _, outputs in interpreter.launches)
    assert np.isfinite(logsumexp).all()
    assert logsumexp.shape == (2, 1, 1, 2)


def test_gradients_are_those_of_xla():
    arrays = EVERYTHING.arrays()
    query, cache, *places = arrays
    options = EVERYTHING.options()
    heads = [options.pop(x) for x in ("gamma", "key_norm_weight", "alibi_slopes", "sink_logits")]
    random = np.random.default_rng(0)
    dout, dlogsumexp = (
        random.standard_normal(s).astype(np.float32) for s in (query.shape, query.shape[:3])
    )

    def gradients(implementation):
        def call(query, cache, gamma, weight, slopes, sinks):
            return decode.attend(
                query,
                cache,
                *places,
                gamma=gamma,
                key_norm_weight=weight,
                alibi_slopes=slopes,
                sink_logits=sinks,
                implementation=implementation,
                **options,
            )

        return jax.jit(lambda *x: jax.vjp(call, *x)[1]((dout, dlogsumexp)))(query, cache, *heads)

    with sizes(2):
        got = gradients("triton")
    jax.tree.map(np.testing.assert_array_equal, got, gradients("xla"))


def element(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


SOME = [{"cache"}, {"starts", "lengths", "gamma"}, {"slopes", "query", "lengths"}]
EACH = [{"query"}, {"starts", "lengths"}, {"gamma"}]


@pytest.mark.parametrize(
    "batched", by_default(SOME, SOME + EACH), ids=lambda names: "+".join(sorted(names))
)
def test_vmap_equals_a_loop(batched):
    case = Case("vmap", T=2, R=1, slots=30, starts=(20, 0), window=15, alibi=True)
    query, cache, starts, lengths = case.arrays()
    options = case.options()
    given = {
        "query": query,
        "cache": cache,
        "starts": starts,
        "lengths": lengths,
        "gamma": jnp.asarray(options.pop("gamma")),
        "slopes": jnp.asarray(options.pop("alibi_slopes")),
    }

    def shifted(name, x):
        change = {"starts": 3, "lengths": 3}.get(name, 0.7)
        return jax.tree.map(lambda x: jnp.stack([x, (x + change).astype(x.dtype)]), x)

    mapped = {name: shifted(name, x) if name in batched else x for name, x in given.items()}

    def call(given):
        given = dict(given)
        arrays = [given.pop(name) for name in ("query", "cache", "starts", "lengths")]
        return decode.attend(
            *arrays,
            gamma=given["gamma"],
            alibi_slopes=given["slopes"],
            **options,
            implementation="triton",
        )

    axes = ({name: 0 if name in batched else None for name in given},)
    with sizes(2):
        got = jax.jit(jax.vmap(call, axes))(mapped)
        for i in range(2):
            one = {name: element(x, i) if name in batched else x for name, x in mapped.items()}
            want = jax.jit(call)(one)
            decode_cases.assert_close(case, element(got, i), want)


def test_strict_rank_promotion():
    with jax.numpy_rank_promotion("raise"), sizes(2):
        decode_cases.attend(EVERYTHING, "triton", EVERYTHING.arrays())

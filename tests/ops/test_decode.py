"""Attention to a cache: the operation's contract, and rings that tokens are appended to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.ops.decode import api as decode
from rbf_jax.ops.decode import cache as caches
from tests.harness import cases, contract


def attend(query, key, value, *, return_residual, is_causal=False, **options):
    """`decode.attend` called like `rbf_attention`. Where all keys are seen they are registers."""
    B, S, K, H = key.shape
    R = 0 if is_causal else S
    window = options.pop("local_window_size", None)
    lengths = options.pop("key_value_seq_lengths", np.full(B, S if is_causal else 0, np.int32))
    if not is_causal:  # A place for text, which is not taken.
        key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (key, value))
    empty = caches.empty(B, K, key.shape[1], H, key.dtype)
    lengths = jnp.asarray(lengths)
    cache = caches.fill(empty, key, value, lengths, R)
    return decode.attend(
        query,
        cache,
        jnp.zeros(B, jnp.int32),
        lengths,
        num_registers=R,
        window=window,
        **options,
    )


SUBJECT = contract.Subject("decode", attend, keeps_output=False)
STEP = cases.case("step", T=1, S=40, N=4, per_head=True, origin_sink=True)
LENGTHS_CAUSAL = cases.case(
    "lengths_causal",
    N=4,
    K=1,
    is_causal=True,
    local_window_size=9,
    key_value_seq_lengths=lambda *_: np.array([0, 21], np.int32),
    alibi_slopes=lambda B, N, *_: 0.1 * np.arange(N),
)


SINKS = cases.case(
    "sinks", T=1, S=40, N=4, K=2, per_head=True, sink_logits=cases.sinks(30, -5, 0, 2)
)
SINKS_CAUSAL = dataclasses.replace(
    LENGTHS_CAUSAL,
    name="sinks_causal",
    options=(*LENGTHS_CAUSAL.options, ("sink_logits", cases.sinks(9, -5))),
    N=2,
)


CONTRACT = [
    (SINKS, "float32"),
    (SINKS, "bfloat16"),
    (SINKS_CAUSAL, "float32"),
    *((STEP, dtype) for dtype in ("float32", "bfloat16", "float16")),
    *((cases.BY_NAME["far_keys"], dtype) for dtype in ("float32", "float16")),
    (cases.BY_NAME["multi_query"], "bfloat16"),
    (cases.BY_NAME["huge_norms"], "bfloat16"),
    (LENGTHS_CAUSAL, "float32"),
]


def name_of(x):
    return getattr(x, "name", x)


@pytest.mark.parametrize(("case", "dtype"), CONTRACT, ids=name_of)
def test_values_and_gradients(case, dtype):
    assert not contract.violations(SUBJECT, case, dtype)


def test_float64():
    with jax.enable_x64(True):
        assert not contract.violations(SUBJECT, STEP, "float64")


B, R, N, K, H = 3, 2, 4, 2, 8
LENGTHS = np.array([23, 17, 5], np.int32)  # tokens of each row in the end
SLOPES = np.array([0.3, 0.1, 0.02, 0.0], np.float32)
OPTIONS = {"gamma": 0.4, "key_norm_weight": 0.9, "alibi_slopes": SLOPES, "origin_sink": True}


def _arrays(seed=0):
    """Of the longest row, registers first: queries, keys, values."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(x, (B, R + LENGTHS[0], n, H)) for x, n in zip(keys, (N, K, K))]


def _expected(query, key, value, window):
    """In float64, text queries only: to tokens by the rules, to registers always and at once."""
    T = LENGTHS[0]
    behind = np.arange(T)[:, None] - np.arange(T)[None]
    allowed = (behind >= 0) & (behind <= (T if window is None else window))
    allowed = np.pad(allowed, ((0, 0), (R, 0)), constant_values=True)
    bias = np.pad(SLOPES[:, None, None] * behind, ((0, 0), (0, 0), (R, 0)))
    q, k, v = (np.asarray(x, np.float64) for x in (query[:, R:], key, value))
    k, v = np.repeat(k, N // K, axis=2), np.repeat(v, N // K, axis=2)
    logits = 2 * 0.4 * np.einsum("btnh,bsnh->bnts", q, k)
    logits -= 0.4 * 0.9 * (k**2).sum(-1).swapaxes(1, 2)[:, :, None] + bias
    weights = np.where(allowed, np.exp(logits), 0)
    total = 1 + weights.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", weights / total, v)
    return out, np.log(total[..., 0]).swapaxes(1, 2)


@functools.partial(jax.jit, static_argnames=("window",))
def _step(cache, query, key, value, starts, lengths, window):
    cache = caches.append(cache, key, value, starts, lengths, R)
    return cache, decode.attend(
        query, cache, starts, lengths, num_registers=R, window=window, **OPTIONS
    )


@pytest.mark.parametrize(
    ("window", "slots", "prompts"),
    [
        (None, 23, (11, 4, 0)),
        (None, 40, (1, 1, 1)),
        (4, 4 + 3, (11, 4, 0)),  # a ring of just enough slots, prompts longer than it
        (4, 9, (0, 0, 0)),
        (0, 3, (2, 9, 1)),
    ],
)
def test_rows_of_different_lengths_grow_by_several_tokens(window, slots, prompts):
    """Up to three tokens at once; rows that have ended, or have fewer, take none or fewer."""
    query, key, value = _arrays()
    expected, expected_logsumexp = _expected(query, key, value, window)
    held = np.array(prompts, np.int32)
    cache = caches.empty(B, K, R + slots, H, jnp.float32)
    cache = caches.fill(cache, key[:, : R + 11], value[:, : R + 11], jnp.asarray(held), R)
    random = np.random.default_rng(0)
    seen = 0
    while (held < LENGTHS).any():
        counts = np.minimum(random.integers(0, 4, B), LENGTHS - held).astype(np.int32)
        at = np.minimum(held[:, None] + np.arange(3), LENGTHS[0] - 1)
        new = [x[np.arange(B)[:, None], R + at] for x in (query, key, value)]
        cache, (out, logsumexp) = _step(cache, *new, held, held + counts, window)
        for row, count in enumerate(counts):
            here = slice(held[row], held[row] + count)
            np.testing.assert_allclose(out[row, :count], expected[row, here], atol=2e-6)
            np.testing.assert_allclose(
                logsumexp[row, :count], expected_logsumexp[row, here], atol=2e-6
            )
            seen += count
        held = held + counts
    assert seen == (LENGTHS - prompts).sum()


def test_norms_are_those_of_the_keys_as_they_are_kept():
    """And they are what is used, not computed again."""
    keys = jax.random.split(jax.random.key(0), 2)
    key = jax.random.normal(keys[0], (2, R + 6, K, H))
    query = jax.random.normal(keys[1], (2, 1, N, H), jnp.bfloat16)

    @jax.jit
    def run(key, query):
        lengths = jnp.array([6, 3], jnp.int32)
        cache = caches.fill(caches.empty(2, K, R + 8, H, jnp.bfloat16), key, key, lengths, R)
        cache = caches.append(cache, key[:, :2], key[:, :2], lengths, lengths + 2, R)
        places = {"starts": lengths, "lengths": lengths + 2, "num_registers": R}
        halved = cache._replace(key_norms=cache.key_norms / 2)
        whole, _ = decode.attend(query, halved, **places)
        half, _ = decode.attend(query, cache, **places, key_norm_weight=0.5)
        return cache, whole, half

    cache, whole, half = run(key, query)
    assert cache.key.dtype == jnp.bfloat16
    exact = np.square(np.asarray(cache.key, np.float64)).sum(-1)
    np.testing.assert_allclose(cache.key_norms, exact, rtol=1e-6)
    np.testing.assert_array_equal(whole, half)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_copies_no_keys(rows):
    """Given away, the cache is written where it is; also the one row, of which XLA thinks apart."""
    cache = caches.empty(rows, K, R + 4096, H, jnp.float32)
    tokens = [jnp.zeros((rows, 1, heads, H)) for heads in (N, K, K)]
    places = jnp.zeros(rows, jnp.int32), jnp.ones(rows, jnp.int32)

    def step(cache, query, key, value, starts, lengths):
        cache = caches.append(cache, key, value, starts, lengths, R)
        return cache, decode.attend(query, cache, starts, lengths, num_registers=R)

    compiled = jax.jit(step, donate_argnums=0).lower(cache, *tokens, *places).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.key.nbytes


def test_wrong_input_is_an_error():
    query, key, value = _arrays()
    zeros = jnp.zeros(B, jnp.int32)
    cache = caches.fill(caches.empty(B, K, 9, H, jnp.float32), key, value, zeros, R)
    good = {"query": query, "cache": cache, "starts": zeros, "lengths": zeros}

    def check(message, **changes):
        with pytest.raises(ValueError, match=message):
            decode.attend(**{**good, **changes})

    check(r"query has shape \(4, 8\), but must be \(B, T, N, H\)", query=query[0, 0])
    check("cache has shapes", cache=cache._replace(key_norms=cache.key_norms[:, :1]))
    check("K a divisor of N", query=query[:, :, :3])
    check("cache.key has dtype float32, but must have query's", query=query.astype(jnp.bfloat16))
    check("starts has shape", starts=zeros[:1])
    check("lengths has shape .* must be int32", lengths=zeros.astype(jnp.float32))
    check("num_registers=9 must be an int from 0, less than the 9 slots", num_registers=9)
    check("num_registers=True must be an int", num_registers=True)
    check("window=-1 must be None or an int ≥ 0", window=-1)
    check("window=2.5 must be None or an int ≥ 0", window=2.5)
    check(r"gamma=0.0 must be finite and greater than 0 in float32", gamma=0.0)
    check(r"gamma=nan must be finite and greater than 0 in float32", gamma=float("nan"))
    check(r"key_norm_weight=inf must be finite", key_norm_weight=np.inf)
    check(r"alibi_slopes=.* must be finite and not negative", alibi_slopes=-SLOPES)
    check(r"sink_logits=nan must be finite in float32", sink_logits=float("nan"))
    check(r"sink_logits has shape \(3,\)", sink_logits=np.ones(3, np.float32))
    check(r"origin_sink=True is sink_logits=0", origin_sink=True, sink_logits=1.0)
    check(r"gamma has shape \(3,\), but must be a scalar or have", gamma=np.ones(3, np.float32))
    check("implementation='cudnn' must be None or one of", implementation="cudnn")

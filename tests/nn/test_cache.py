"""Token by token the model says what it says of whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.nn import cache as caches
from rbf_jax.nn.cache import empty_cache, num_slots
from rbf_jax.ops.decode.cache import empty
from tests.harness.models import LENGTH, VOCAB, primitives, small_config, small_model

B = 3
PROMPTS = np.int32([5, 1, 2])
TOKENS = np.random.default_rng(3).integers(0, VOCAB, (B, LENGTH)).astype(np.int32)

CASES = {
    "susie": ({}, {"positions": "susie", "num_registers": 1}),
    "rope, window": ({"window": 2}, {"positions": "rope"}),
    "alibi, sink": ({"sink": "origin"}, {"positions": "alibi", "num_registers": 4}),
    "dot, learned, QK-norm": ({"kind": "dot", "qk_norm": True}, {"positions": "learned"}),
    "dot, none, exclusive, sink": (
        {"kind": "dot", "exclusive": True, "learn_gamma": True, "sink": "origin"},
        {"positions": "none", "num_registers": None},
    ),
    "dot, alibi, window, learned sink": (
        {"kind": "dot", "window": 2, "sink": "learned"},
        {"positions": "alibi", "num_registers": None, "num_layers": 1},
    ),
    "dot, rope": (
        {"kind": "dot", "qk_norm": True, "sink": "none"},
        {"positions": "rope", "num_kv_heads": 1},
    ),
    "dial, alibi, window, learned sink": (
        {"window": 1, "sink": "learned", "learn_key_norm_weight": True},
        {"positions": "alibi", "num_kv_heads": None, "remat": True},
    ),
    "not normalised": (
        {"normalize": False, "learn_gamma": True, "gamma": 0.05},
        {"positions": "susie"},
    ),
    "not normalised, alibi, window": (
        {"normalize": False, "window": 2, "gamma": 0.05},
        {"positions": "alibi", "num_registers": 2},
    ),
    "susie, window, no registers": (
        {"window": 3, "qk_norm": True, "sink": "none"},
        {"positions": "susie"},
    ),
}


def _run(model, variables, max_step=3):
    """Logits of whole rows, those of each position from a cache, and the cache in the end.

    Rows are of different lengths from the prompt to the end; up to `max_step` tokens at once.
    """

    @jax.jit
    def whole(variables):
        prefill = model.apply(
            variables,
            TOKENS[:, : PROMPTS.max()],
            PROMPTS,
            empty_cache(model.config, B, LENGTH, max_step),
            method="prefill",
        )
        return model.apply(variables, TOKENS), prefill

    @jax.jit
    def extend(variables, tokens, cache, counts):
        return model.apply(variables, tokens, cache, counts, method="extend")

    expected, (logits, cache) = whole(variables)
    got = np.zeros_like(expected)
    rows = np.arange(B)
    got[rows, PROMPTS - 1] = logits
    seen = np.zeros((B, LENGTH), bool)
    seen[rows, PROMPTS - 1] = True
    held = PROMPTS.copy()
    random = np.random.default_rng(0)
    while (held < LENGTH).any():
        counts = np.minimum(random.integers(0, max_step + 1, B), LENGTH - held).astype(np.int32)
        at = np.minimum(held[:, None] + np.arange(max_step), LENGTH - 1)
        logits, cache = extend(variables, TOKENS[rows[:, None], at], cache, counts)
        for row in range(B):
            here = slice(held[row], held[row] + counts[row])
            got[row, here] = logits[row, : counts[row]]
            seen[row, here] = True
        held += counts
    return np.asarray(expected), got, seen, cache


@pytest.mark.parametrize("case", CASES)
def test_a_cache_gives_the_logits_of_the_whole_row(case):
    attention, changes = CASES[case]
    model, variables = small_model(attention, **changes)
    expected, got, seen, cache = _run(model, variables)
    assert seen.sum() == (LENGTH + 1 - PROMPTS).sum()
    np.testing.assert_allclose(got[seen], expected[seen], atol=2e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(cache.lengths, LENGTH)
    slots = LENGTH if model.config.attention.window is None else model.config.attention.window + 3
    assert num_slots(model.config, cache) == slots < LENGTH + 1


def test_bfloat16():
    model, variables = small_model(positions="rope", dtype="bfloat16")
    variables = jax.tree.map(lambda x: x / 2, variables)
    expected, got, seen, cache = _run(model, variables, max_step=1)
    assert got.dtype == np.float32
    error = np.abs(got - expected)[seen].max()
    assert 0 < error < 0.05 * np.abs(expected).max()
    layer = cache.layers[0]
    assert (layer.key.dtype, layer.key_norms.dtype) == (jnp.bfloat16, jnp.float32)


def test_tokens_beyond_a_rows_length_are_of_no_account():
    model, variables = small_model({"window": 2}, positions="alibi")
    run = jax.jit(
        lambda tokens: model.apply(
            variables, tokens, PROMPTS, empty_cache(model.config, B, LENGTH), method="prefill"
        )
    )
    changed = np.where(np.arange(LENGTH) < PROMPTS[:, None], TOKENS, (TOKENS + 1) % VOCAB)
    (a, cache), (b, _) = run(TOKENS), run(changed)
    np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    ("attention", "changes", "capacity", "last"),
    [
        ({}, {"positions": "rope"}, 7, 7),  # of the cache
        ({"window": 2}, {"positions": "learned"}, LENGTH, LENGTH),  # of the table of positions
        ({"window": 9}, {"positions": "none"}, 4, 4),  # a ring smaller than the window
    ],
)
def test_a_row_that_outgrows_its_place_is_nan(attention, changes, capacity, last):
    model, variables = small_model(attention, **changes, num_layers=1)
    cache = empty_cache(model.config, 1, capacity)
    zeros = np.zeros((1, 1), np.int32)

    @jax.jit
    def run(cache, start):
        cache = cache._replace(lengths=cache.lengths + start)
        return model.apply(variables, zeros, cache, method="extend")[0]

    assert np.isfinite(run(cache, last - 1)).all()
    assert np.isnan(run(cache, last)).all()


def test_a_ring_goes_on_for_ever_in_steps_that_it_was_made_for():
    model, variables = small_model({"window": 2}, positions="rope", num_layers=1)
    cache = empty_cache(model.config, 1, 100)
    assert num_slots(model.config, cache) == 3
    cache = cache._replace(lengths=cache.lengths + 10_000)

    def extend(step):
        tokens = np.zeros((1, step), np.int32)
        return jax.jit(lambda c: model.apply(variables, tokens, c, method="extend")[0])(cache)

    assert np.isfinite(extend(1)).all()
    assert np.isnan(extend(2)).all()


def test_a_step_reads_no_keys_to_square_them():
    """Key norms are kept: what is squared of size B·K·(R+C)·H would be all keys again."""
    model, variables = small_model({"implementation": "xla"}, positions="none", num_layers=1)
    cache = empty_cache(model.config, B, 50)
    jaxpr = jax.make_jaxpr(lambda c: model.apply(variables, TOKENS[:, :1], c, method="extend"))(
        cache
    )
    keys = cache.layers[0].key.shape
    large = [
        e.primitive.name
        for e in primitives(jaxpr.jaxpr)
        if any(getattr(x.aval, "shape", None) == keys for x in e.invars)
    ]
    assert large.count("dot_general") == 2
    assert set(large) <= {"dot_general", "scatter", "convert_element_type", "jit", "pjit"}


@pytest.mark.parametrize(
    ("implementation", "named"),
    [(None, None), ("xla", "xla"), ("triton", "triton"), ("reference", None)],
)
def test_a_step_takes_its_implementation_of_the_name(implementation, named, monkeypatch):
    """As jax.export needs it, which names "xla"; one that has no step takes the best."""
    asked = []
    monkeypatch.setattr(
        caches.decode, "attend", lambda q, *_, **options: asked.append(options) or (q, None)
    )
    tokens, zeros = jnp.ones((1, 1, 1, 8)), jnp.zeros(1, jnp.int32)
    step = caches.Step(empty(1, 1, 4, 8, "float32"), zeros, zeros + 1)
    caches.attend(tokens, tokens, tokens, 0, step, implementation=implementation)
    assert [options["implementation"] for options in asked] == [named]


def test_wrong_input_is_an_error():
    model, variables = small_model(positions="learned")
    cache = empty_cache(model.config, B, 4)

    def check(message, method, *args):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda v: model.apply(v, *args, method=method), variables)

    long = np.zeros((B, LENGTH + 1), np.int32)
    check("length 13, but positions='learned' has", "prefill", long, PROMPTS, cache)
    check(
        "tokens has length 5, but the cache has room for 4", "prefill", long[:, :5], PROMPTS, cache
    )
    check("lengths has shape .* must be integers", "prefill", long[:, :4], PROMPTS[:1], cache)
    check(r"tokens has shape \(3,\), but must be \(B, T\)", "extend", PROMPTS, cache)
    check("counts has shape .* must be integers", "extend", long[:, :1], cache, PROMPTS[:2])
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        empty_cache(small_config(), 1, 0)

"""What every implementation refuses: options that it does not name, whatever they are."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rbf_jax import rbf_attention
from rbf_jax.ops import call, dispatch
from rbf_jax.ops.call import Inputs, Masking, Rules
from rbf_jax.ops.decode import api as decode

pytestmark = pytest.mark.usefixtures("h100")

B, T, N, K, H = 2, 16, 4, 2, 64
TABLES = {"attention": dispatch.ATTENTION, "decode": decode.IMPLEMENTATIONS}
EVERY = [(table, name) for table, names in TABLES.items() for name in names]
ARRAYS = {
    "mask": jnp.ones((1, 1, T, T), bool),
    "query_lengths": jnp.full(B, T, jnp.int32),
    "key_lengths": jnp.full(B, T, jnp.int32),
    "query_segments": jnp.zeros((B, T), jnp.int32),
    "key_segments": jnp.zeros((B, T), jnp.int32),
    "alibi_slopes": jnp.zeros(N),
    "query_offset": jnp.zeros(B, jnp.int32),
}


@dataclasses.dataclass(frozen=True)
class NewRules(Rules):
    """With an option that no implementation has heard of."""

    soft_cap: float | None = None


def _inputs(table):
    query, key = jnp.ones((B, T, N, H), jnp.bfloat16), jnp.ones((B, T, K, H), jnp.bfloat16)
    key = key.swapaxes(1, 2) if table == "decode" else key
    return Inputs(query, key, key, jnp.ones(N), jnp.zeros(N))


# What each of them can do: cuDNN is the one that needs λ = 0, known when tracing.
ABLE = {"static_gamma": 0.1, "static_key_norm_weight": 0.0}


@pytest.mark.parametrize(("table", "name"), EVERY)
def test_an_unknown_rule_is_refused(table, name):
    implementation, inputs = TABLES[table][name], _inputs(table)
    assert implementation.refusal(inputs, Masking(), NewRules(**ABLE)) is None
    with pytest.raises(NotImplementedError, match="does not support soft_cap; none can do this"):
        dispatch.attend(name, inputs, Masking(), NewRules(soft_cap=30.0, **ABLE), TABLES[table])


@pytest.mark.parametrize(("table", "name"), EVERY)
def test_arrays_are_refused_unless_they_are_named(table, name):
    assert set(ARRAYS) == set(Masking._fields)
    implementation, inputs = TABLES[table][name], _inputs(table)
    for field, array in ARRAYS.items():
        reason = implementation.refusal(inputs, Masking(**{field: array}), Rules(**ABLE))
        if field in implementation.supports:
            assert reason is None
            continue
        named = call._ARGUMENTS.get(field, field)
        assert reason == f"does not support {named}"
        with pytest.raises(NotImplementedError, match=reason):
            dispatch.attend(name, inputs, Masking(**{field: array}), Rules(**ABLE), TABLES[table])


def test_without_an_implementation_no_unknown_rule_is_ignored():
    """None ends at "xla", which refuses too."""
    for table in TABLES.values():
        refused = [
            x.refusal(_inputs("attention"), Masking(), NewRules(soft_cap=1.0))
            for x in table.values()
        ]
        assert all(refused)


def _rules(monkeypatch, **options) -> Rules:
    """Of a call, as an implementation receives them."""
    seen = []
    monkeypatch.setattr(
        dispatch, "attend", lambda *x: seen.append(x[3]) or (x[1].query, jnp.zeros((B, T, N)))
    )
    inputs = _inputs("attention")
    rbf_attention(*inputs[:3], **options)
    return seen[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"local_window_size": (5, 0)}, {"local_window_size": (5, 0), "is_causal": True}),
        ({"local_window_size": (5, 0)}, {"local_window_size": 5, "is_causal": True}),
        ({"local_window_size": (T, 0)}, {"is_causal": True}),
        ({"local_window_size": T}, {}),
        ({"local_window_size": (T, 3)}, {"local_window_size": (2 * T, 3)}),
        ({"num_global_keys": 3, "is_causal": True}, {"is_causal": True}),
        ({"num_global_keys": 3, "local_window_size": T}, {}),
        ({"origin_sink": True}, {"sink_logits": jnp.zeros(N)}),
    ],
    ids=str,
)
def test_the_same_rules(one, other, monkeypatch):
    assert _rules(monkeypatch, **one) == _rules(monkeypatch, **other)


def test_a_window_of_all_but_one_is_a_rule(monkeypatch):
    rules = _rules(monkeypatch, local_window_size=(T - 1, T - 1))
    assert (rules.left, rules.right) == (T - 1, T - 1)


def _program(implementation, **options):
    def attend(*x):
        return rbf_attention(*x, implementation=implementation, gamma=0.1, **options)

    traced = jax.jit(attend).trace(*_inputs("attention")[:3])
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
def test_a_window_with_right_0_is_causal(implementation):
    """Also what is made of it."""
    first, second = (  # made in one line: programs hold where they were made
        _program(implementation, is_causal=is_causal, local_window_size=(5, 0))
        for is_causal in (False, True)
    )
    assert first == second


@pytest.mark.parametrize("is_causal", [True, False])
def test_cudnn_takes_a_window_with_right_0(monkeypatch, is_causal):
    """Nothing is launched: what `jax.nn` is asked for is looked at."""
    seen = []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, k, v, **given: seen.append(given) or q
    )
    rbf_attention(
        *_inputs("attention")[:3],
        implementation="cudnn",
        gamma=0.25,
        key_norm_weight=0.0,
        is_causal=is_causal,
        local_window_size=(5, 0),
    )
    window = {"is_causal": True, "local_window_size": (5, 0)}
    assert seen == [{"scale": 0.5, "implementation": "cudnn", **window}]

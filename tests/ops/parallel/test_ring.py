"""Calls that a mesh splits, by batch, heads and sequence, held to the contract."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rbf_jax import rbf_attention
from rbf_jax.ops.call import Rules
from rbf_jax.ops.parallel.ring import Ring
from rbf_jax.ops.vjp import LOGSUMEXP_NAME, OUTPUT_NAME
from tests.harness import cases, contract
from tests.harness.collectives import collectives, mesh_of
from tests.harness.selected import by_default

exhaustive = pytest.mark.exhaustive
XLA = functools.partial(rbf_attention, implementation="xla")
SUBJECT = contract.Subject("xla on many devices", XLA)


def violations(case, dtype, mesh):
    contract.expected(case, dtype, True, 0)  # kept, so that it is not made under the mesh
    with jax.set_mesh(mesh):
        return contract.violations(SUBJECT, case, dtype)


LENGTHS = {
    "query_seq_lengths": lambda *_: np.array([40, 3]),
    "key_value_seq_lengths": lambda *_: np.array([17, 43]),
}
SLOPES = {"alibi_slopes": lambda B, N, T, S: np.linspace(0, 0.3, N, dtype=np.float32)}
CAUSAL_WINDOW = {"is_causal": True, "local_window_size": 9}
CASES = [
    cases.case("full", T=48, S=64),
    cases.case("causal", T=64, S=64, is_causal=True),
    cases.case("causal_filled_up", T=43, S=43, is_causal=True, per_head=True),
    cases.case("causal_more_keys", T=29, S=51, is_causal=True),
    cases.case("causal_more_queries", T=51, S=29, is_causal=True),
    cases.case("short", T=5, S=5, is_causal=True),
    cases.case("grouped", T=40, S=40, N=4, K=2, is_causal=True),
    cases.case("sink", T=40, S=40, is_causal=True, origin_sink=True, offset=3.0),
    cases.case("window", T=64, S=64, is_causal=True, local_window_size=11),
    cases.case("window_of_one", T=64, S=64, is_causal=True, local_window_size=0),
    cases.case("window_two_sided", T=64, S=50, local_window_size=(9, 20)),
    cases.case("segments", T=43, S=43, is_causal=True, **cases.SEGMENTS),
    cases.case("lengths", T=43, S=43, is_causal=True, **LENGTHS),
    cases.case("alibi", T=43, S=43, is_causal=True, **SLOPES),
    cases.case("mask", T=43, S=60, mask=cases.mask_over("B", "N", "T", "S"), is_causal=True),
    cases.case("mask_of_keys", T=43, S=60, mask=cases.mask_over("B", "S")),
    cases.case("few_keys", T=43, S=3, N=4, K=2, is_causal=True, origin_sink=True, per_head=True),
    cases.case(
        "few_keys_everything",
        T=43,
        S=7,
        is_causal=True,
        local_window_size=(6, 2),
        mask=cases.mask_over("B", "N", "T", "S"),
        query_seq_lengths=lambda *_: np.array([40, 3]),
        key_value_seq_lengths=lambda *_: np.array([5, 7]),
        **SLOPES,
        **cases.SEGMENTS,
    ),
    cases.case("far_keys", T=43, S=43, offset=60.0, is_causal=True),
    cases.case(
        "everything",
        T=43,
        S=43,
        N=4,
        K=2,
        per_head=True,
        is_causal=True,
        origin_sink=True,
        local_window_size=30,
        **LENGTHS,
        **SLOPES,
        **cases.SEGMENTS,
    ),
    cases.case(
        "sink_logits", T=40, S=40, N=4, K=2, is_causal=True, sink_logits=cases.sinks(9, -5, 0, 2)
    ),
    cases.case("sink_logits_scalar", T=64, S=50, sink_logits=cases.sinks(1.5), **LENGTHS),
    cases.case("global_keys", T=64, S=64, num_global_keys=11, **CAUSAL_WINDOW),
    cases.case("global_keys_few_others", T=40, S=13, num_global_keys=7, **CAUSAL_WINDOW),
    cases.case(
        "global_keys_all",
        T=40,
        S=40,
        num_global_keys=40,
        sink_logits=cases.sinks(0, 3),
        **CAUSAL_WINDOW,
    ),
    cases.case(
        "global_keys_two_sided", T=64, S=50, num_global_keys=3, local_window_size=(9, 20), **SLOPES
    ),
    cases.case(
        "global_keys_segments", T=43, S=43, num_global_keys=3, is_causal=True, **cases.SEGMENTS
    ),
    cases.case(
        "global_keys_everything",
        T=43,
        S=43,
        N=4,
        K=2,
        per_head=True,
        is_causal=True,
        local_window_size=(8, 0),
        num_global_keys=5,
        sink_logits=cases.sinks(-3, 0.5, 4, 1),
        mask=cases.mask_over("B", "N", "T", "S"),
        query_seq_lengths=lambda *_: np.array([40, 43]),
        key_value_seq_lengths=lambda *_: np.array([3, 43]),
        **SLOPES,
        **cases.SEGMENTS,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sequences(case):
    assert not violations(case, "float32", mesh_of(seq=4))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("everything", "bfloat16"),
        ("causal_filled_up", "float16"),
        pytest.param("full", "bfloat16", marks=exhaustive),
        pytest.param("full", "float16", marks=exhaustive),
        pytest.param("causal_filled_up", "bfloat16", marks=exhaustive),
        pytest.param("everything", "float16", marks=exhaustive),
    ],
)
def test_sequences_in_16_bits(name, dtype):
    case = next(case for case in CASES if case.name == name)
    assert not violations(case, dtype, mesh_of(seq=8))


MESHES = [
    {"data": 2, "fsdp": 1, "tensor": 2, "seq": 2},
    {"data": 2, "tensor": 2},
    {"seq": 2, "another": 2},
    {"fsdp": 2, "seq": 4},
    {"data": 2, "another": 2},
]


@pytest.mark.parametrize(
    ("name", "sizes"),
    by_default(
        [*(("everything", sizes) for sizes in MESHES[:3]), ("global_keys_everything", MESHES[0])],
        itertools.product(("everything", "global_keys_everything"), MESHES),
    ),
    ids=str,
)
def test_batch_and_heads_too(name, sizes):
    case = next(case for case in CASES if case.name == name)
    assert not violations(case, "float32", mesh_of(**sizes))


def test_what_does_not_divide_is_left_out():
    case = cases.case("odd", T=30, S=30, B=3, N=3, K=3, is_causal=True)
    assert not violations(case, "float32", mesh_of(data=2, tensor=2, seq=2))


def arrays(T, N=4, K=4, B=4):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (B, T, n, 16)) for key, n in zip(keys, (N, K, K, N))]


def both(q, k, v, dout):
    out, vjp = jax.vjp(functools.partial(XLA, is_causal=True), q, k, v)
    return out, vjp(dout)


@pytest.mark.parametrize("spec", [P("x"), P(None, None, "y"), P("x", None, "y")], ids=str)
@pytest.mark.parametrize("K", [4, 8])
def test_a_users_own_jit_gathers_nothing(spec, K):
    """The mesh is nowhere but in the arrays, and its axes have any names."""
    mesh = mesh_of(x=2, y=4)
    sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays(32, N=8, K=K)]
    compiled = jax.jit(both).lower(*sharded).compile()
    assert not collectives(compiled)
    assert compiled(*sharded)[0].sharding.spec == spec


@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        ({"data": 2, "seq": 4}, P("data", "seq")),
        ({"data": 2, "tensor": 2, "seq": 2}, P("data", "seq", "tensor")),
    ],
    ids=str,
)
def test_a_ring_permutes_and_gathers_nothing(sizes, spec):
    mesh = mesh_of(**sizes)
    sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays(64)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(both).lower(*sharded).compile()
        out, _ = compiled(*sharded)
    assert set(collectives(compiled)) == {"collective-permute"}
    assert out.sharding.spec == spec


def test_queries_are_split_where_keys_are_few():
    """As text attends to register tokens."""
    mesh = mesh_of(data=2, seq=4)
    q, k, v, dout = arrays(64)
    q, dout = (jax.device_put(x, NamedSharding(mesh, P("data", "seq"))) for x in (q, dout))
    k, v = (jax.device_put(x[:, :4], NamedSharding(mesh, P("data"))) for x in (k, v))
    with jax.set_mesh(mesh):
        compiled = jax.jit(both).lower(q, k, v, dout).compile()
        out, _ = compiled(q, k, v, dout)
    assert not collectives(compiled)
    assert out.sharding.spec == P("data", "seq")


def test_remat_keeps_what_its_policy_names():
    q, k, v, dout = arrays(32)
    policy = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME, LOGSUMEXP_NAME)

    def loss(q, k, v):
        return jnp.sum(XLA(q, k, v, is_causal=True) * dout)

    def gradients(loss):
        # With the value: only then is the forward pass in the program twice.
        lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(q, k, v)
        return lowered.as_text().count("collective_permute"), lowered.compile()(q, k, v)[1]

    with jax.set_mesh(mesh_of(seq=4)):
        _, want = gradients(loss)
        kept, got = gradients(jax.checkpoint(loss, policy=policy))
        recomputed, _ = gradients(jax.checkpoint(loss))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), got, want)
    assert kept < recomputed


def test_a_window_ends_the_round_beside_global_keys_too():
    """Blocks are passed on as far as the window reaches, with a register in front of the text."""
    rules = Rules(left=128, right=0)
    plain = Ring.plan("seq", 8, 8192, 8192, rules)
    assert (plain.turns, plain.chunks, plain.key_chunk) == (2, 1, 1024)
    beside = Ring.plan("seq", 8, 8193, 8192, rules, behind=1)
    assert (beside.turns, beside.chunks) == (2, 1)
    assert beside.query_chunk == beside.key_chunk == 1025

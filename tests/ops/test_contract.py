"""Every implementation on every case: values and all gradients against float64, or a refusal."""

import functools

import hypothesis
import jax
import numpy as np
import pytest

from rbf_jax import rbf_attention
from tests.harness import cases, contract, selected
from tests.harness.compiling import AS_USERS_COMPILE
from tests.harness.oracle import oracle


def _marks(subject, case):
    """Many blocks say little about plain formulas, which have none."""
    plain = subject.name == "reference" and jax.default_backend() == "cpu"
    return [pytest.mark.exhaustive] if plain and max(case.T, case.S) >= 300 else []


def _runs():
    for subject in contract.SUBJECTS.values():
        for case in cases.CASES:
            for dtype in subject.dtypes:
                if not subject.takes(case):
                    continue
                if dtype == "float64":  # has a test of its own
                    continue
                if dtype == subject.dtypes[0] or case.name in cases.IN_16_BITS:
                    name = f"{subject.name}-{case.name}-{dtype}"
                    yield pytest.param(subject, case, dtype, id=name, marks=_marks(subject, case))


@pytest.mark.parametrize(("subject", "case", "dtype"), list(_runs()))
def test_values_and_gradients(subject, case, dtype):
    assert not contract.violations(subject, case, dtype)


AS_USERS = [
    ("everything", "float32"),
    ("several_blocks", "bfloat16"),
    ("far_keys_causal", "float32"),
]
XLA_RUNS = [(run.values[1].name, run.values[2]) for run in _runs() if run.values[0].name == "xla"]

if jax.default_backend() == "cpu":  # elsewhere all tests compile as users do

    @pytest.mark.parametrize(("case", "dtype"), selected.by_default(AS_USERS, XLA_RUNS))
    def test_as_users_compile(case, dtype):
        """The other tests compile without most optimizations."""
        make = functools.partial(contract.program_of, compiler_options=AS_USERS_COMPILE)
        subject = contract.SUBJECTS["xla"]
        assert not contract.violations(subject, cases.BY_NAME[case], dtype, make=make)


@pytest.mark.parametrize("name", ["reference", "xla"])
@pytest.mark.parametrize("case", ["everything", "several_blocks"])
def test_float64(name, case):
    with jax.enable_x64(True):
        assert not contract.violations(contract.SUBJECTS[name], cases.BY_NAME[case], "float64")


def test_identity_with_distances():
    """The oracle's reformulated logits are −γ‖q−k‖² up to what softmax ignores."""
    case = cases.BY_NAME["full"]
    q, k, v, gamma, weight, dout, dlogsumexp = case.arrays(np.float32)
    results, *_ = oracle(q, k, v, gamma, weight, dout, dlogsumexp)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    distances = ((q[:, :, None] - k[:, None]) ** 2).sum(-1)  # B T S N
    weights = np.exp(-gamma * distances)
    weights /= weights.sum(2, keepdims=True)
    np.testing.assert_allclose(results.out, np.einsum("btsn,bsnh->btnh", weights, v), rtol=1e-12)


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_without_key_norms_it_is_dot_product_attention(name):
    q, k, v, *_ = cases.BY_NAME["grouped"].arrays(np.float32)
    got = rbf_attention(
        q, k, v, gamma=0.2, key_norm_weight=0.0, is_causal=True, implementation=name
    )
    with jax.default_matmul_precision("highest"):
        want = jax.nn.dot_product_attention(q, k, v, scale=0.4, is_causal=True)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of at most 8 and 16, so that short sequences have several."""
    monkeypatch.setattr("rbf_jax.ops.xla._MAX_BLOCKS", (8, 16))


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(case=cases.drawn_case())
def test_any_shapes_and_options(small_blocks, case):
    """Compiled as users do, since blocks of few rows are not exact else.

    Where a query sees one key its weight must be 1 to the bit. Without optimizations XLA sums each
    copy of such a small product in an order of its own.
    """
    options = AS_USERS_COMPILE if jax.default_backend() == "cpu" else None
    make = functools.partial(contract.program_of, compiler_options=options)
    assert not contract.violations(contract.SUBJECTS["xla"], case, "float32", make=make)


@pytest.mark.parametrize(
    "case",
    [c for c in cases.CASES if "global_keys" in c.features],
    ids=lambda case: case.name,
)
def test_global_keys_in_small_blocks(small_blocks, case):
    """They are within a block, or more than a block."""
    assert not contract.violations(contract.SUBJECTS["xla"], case, "float32")

"""The list of what is supported says what the suite runs, and refusals are refusals."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from rbf_jax import rbf_attention
from rbf_jax.ops.gpu.triton import launch
from tests.harness import cases, contract, support

REFUSED = [case for case in cases.CASES if case.features & contract.CUDNN.refuses]


def test_document_is_up_to_date():
    path = Path(__file__).parents[2] / "docs" / "implementations.md"
    assert path.read_text() == support.document(), "run the command in tests/harness/support.py"


def test_every_feature_is_described():
    features = set().union(*(case.features for case in cases.CASES))
    assert features == set(support.WHAT)


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_cudnn_refuses_what_the_list_says(case, monkeypatch):
    """The GPU is pretended: nothing is launched, since the call is refused before."""
    monkeypatch.setattr(launch, "unavailable", lambda: "is not there")
    q, k, v, gamma, *_ = case.arrays(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="'xla' and 'reference' can do this call"):
        rbf_attention(
            q,
            k,
            v,
            gamma=gamma,
            key_norm_weight=0.0,
            implementation="cudnn",
            **case.resolved_options(),
        )

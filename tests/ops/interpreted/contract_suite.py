"""The contract suite on implementation="triton", by Triton's interpreter."""

import pytest

import tests.harness.triton_interpreter  # noqa: F401 (before Triton)
from tests.harness import cases, contract

RUNS = [
    (case, dtype)
    for case in cases.CASES
    for dtype in contract.TRITON.dtypes
    if dtype == "float32" or case.name in cases.IN_16_BITS
]
# Every second one is "even" by name, so that two processes can share them.
IDS = [f"{('even', 'odd')[i % 2]}-{c.name}-{dtype}" for i, (c, dtype) in enumerate(RUNS)]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=IDS)
def test_values_and_gradients(case, dtype):
    assert not contract.violations(contract.TRITON, case, dtype)

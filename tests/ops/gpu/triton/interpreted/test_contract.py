"""The contract suite on implementation="triton", by Triton's interpreter."""

import pytest

from tests.harness import cases, contract
from tests.harness.selected import by_default

# Every option and dtype, and some extremes, at least once; test_shapes.py has two-sided windows.
# Tiles are those that the implementation chooses.
DEFAULT = {
    "one_of_each": "float32",
    "multi_query": "bfloat16",
    "per_head_weight": "float32",
    "window_zero": "float32",
    "lengths_zero": "float32",
    "mask_NT": "float32",
    "mask_rows": "float16",
    "sink_masked": "float32",
    "everything": "bfloat16",
    "unnormalized_everything": "float16",
    "unnormalized_far_keys": "float32",
    "huge_norms": "bfloat16",
    "small_norms_large_gamma": "float16",
    "large_cotangent": "float16",
    "sink_logits": "bfloat16",
    "sink_logits_masked": "float32",
    "global_keys_everything": "float16",
}


RUNS = [
    (case, dtype)
    for case in cases.CASES
    for dtype in contract.TRITON.dtypes
    if dtype == "float32" or case.name in cases.IN_16_BITS
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    by_default([(cases.BY_NAME[name], dtype) for name, dtype in DEFAULT.items()], RUNS),
    ids=lambda x: getattr(x, "name", x),
)
def test_values_and_gradients(case, dtype):
    assert not contract.violations(contract.TRITON, case, dtype)

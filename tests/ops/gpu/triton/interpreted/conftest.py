"""All tests of this folder run the kernels by Triton's interpreter."""

import pytest

from tests.harness import triton_interpreter


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    with triton_interpreter.interpreted():
        yield

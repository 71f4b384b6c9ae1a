"""All tests of this folder run the kernels by Triton's interpreter."""

import pytest

from tests.harness import triton_interpreter
from tests.harness.compiling import without_optimizations


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    with without_optimizations(), triton_interpreter.interpreted():
        yield

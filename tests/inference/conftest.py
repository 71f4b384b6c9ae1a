import pytest

from tests.harness.compiling import without_optimizations


@pytest.fixture(scope="package", autouse=True)
def compile_quickly():
    with without_optimizations():
        yield

"""Where compiling is most of what a test takes: programs that are small, and many."""

import contextlib
from collections.abc import Iterator

import jax
import pytest


@contextlib.contextmanager
def without_optimizations() -> Iterator[None]:
    """Leaves out LLVM's optimizations, here and in processes started here; XLA's own stay."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name.upper(), "1")
            yield
    finally:
        jax.config.update(name, before)


@pytest.fixture(scope="module", autouse=True)
def compile_quickly() -> Iterator[None]:
    """`without_optimizations` for the tests of a file, or of a folder by its conftest.py."""
    with without_optimizations():
        yield

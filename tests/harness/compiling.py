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


# What `tests/conftest.py` turns off in the default run.
AS_USERS_COMPILE = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}

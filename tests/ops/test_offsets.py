"""Positions of queries that are not their indices, as ring attention and caches need them."""

import jax.numpy as jnp
import pytest

from rbf_jax.ops.dispatch import ATTENTION
from tests.harness import offsets


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@offsets.parametrize
def test_offsets(implementation, name, starts, monkeypatch):
    monkeypatch.setattr("rbf_jax.ops.xla._MAX_BLOCKS", (8, 16))
    offsets.check(ATTENTION[implementation].attend, name, starts, jnp.float32, 2e-5)

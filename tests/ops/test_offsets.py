"""Positions of queries that are not their indices, as ring attention and caches need them."""

import jax.numpy as jnp
import pytest

from rbf_jax.ops import reference, xla
from tests.harness import offsets


@pytest.mark.parametrize("attend", [reference.attend, xla.attend], ids=["reference", "xla"])
@offsets.parametrize
def test_offsets(attend, name, starts, monkeypatch):
    monkeypatch.setattr("rbf_jax.ops.xla._MAX_BLOCKS", (8, 16))
    offsets.check(attend, name, starts, jnp.float32, 2e-5)

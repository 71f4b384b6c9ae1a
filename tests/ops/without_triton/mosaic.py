"""The Mosaic GPU kernels where neither Triton nor jax_triton is installed; a GPU is pretended."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import pytest

from rbf_jax import rbf_attention
from rbf_jax.ops import nvidia


@pytest.fixture(autouse=True)
def not_installed(monkeypatch):
    for name in ("triton", "jax_triton"):
        assert name not in sys.modules
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    monkeypatch.setattr(nvidia, "unavailable", lambda: None)
    monkeypatch.setattr(nvidia, "target", lambda: nvidia.Target("NVIDIA H100 80GB HBM3", 90))


@pytest.mark.parametrize("implementation", ["mosaic", None])
def test_forward_and_backward(implementation):
    array = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.bfloat16)
    attend = functools.partial(rbf_attention, implementation=implementation, return_residual=True)

    def loss(*inputs):
        out, logsumexp = attend(*inputs)
        return out.astype(jnp.float32).sum() + logsumexp.sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(array, array, array)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu\w*\(", program)) == 2


def test_triton_is_refused():
    array = jnp.ones((1, 4, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="'triton' needs the package jax-triton"):
        rbf_attention(array, array, array, implementation="triton")

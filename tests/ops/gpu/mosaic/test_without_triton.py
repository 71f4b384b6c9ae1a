"""The Mosaic GPU kernels where neither Triton nor jax_triton is installed."""

import functools
import importlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest


def _forget() -> dict:
    """Removes this project and Triton from the modules that are imported, and returns them."""
    names = [x for x in sys.modules if x.split(".")[0] in ("rbf_jax", "triton", "jax_triton")]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def rbf_attention(monkeypatch):
    """The operation, imported anew where importing Triton fails; an H100 is pretended."""
    before = _forget()
    sys.modules.update({"triton": None, "jax_triton": None})
    try:
        nvidia = importlib.import_module("rbf_jax.ops.gpu.device")
        monkeypatch.setattr(nvidia, "unavailable", lambda: None)
        monkeypatch.setattr(nvidia, "target", lambda: nvidia.Target("NVIDIA H100 80GB HBM3", 90))
        yield importlib.import_module("rbf_jax").rbf_attention
    finally:
        _forget()
        sys.modules.update(before)


@pytest.mark.parametrize("implementation", ["mosaic", None])
def test_forward_and_backward(rbf_attention, implementation):
    array = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.bfloat16)
    attend = functools.partial(rbf_attention, implementation=implementation, return_residual=True)

    def loss(*inputs):
        out, logsumexp = attend(*inputs)
        return out.astype(jnp.float32).sum() + logsumexp.sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(array, array, array)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu\w*\(", program)) == 2


def test_triton_is_refused(rbf_attention):
    array = jnp.ones((1, 4, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="'triton' needs the package jax-triton"):
        rbf_attention(array, array, array, implementation="triton")

"""The GPU that kernels are compiled for."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax


class Target(NamedTuple):
    """The GPU that programs are compiled for.

    Attributes:
      name: as JAX gives it.
      compute_capability: times ten.
      num_multiprocessors: an H100 has 132.
    """

    name: str
    compute_capability: int
    num_multiprocessors: int = 132


def unavailable() -> str | None:
    """Returns why no kernel can be run here, as the rest of a sentence, or None if one may be."""
    if jax.default_backend() != "gpu" or "NVIDIA" not in jax.devices()[0].device_kind:
        return f"needs an NVIDIA GPU, and JAX's default backend is {jax.default_backend()}"
    return None


@functools.cache
def target() -> Target:
    """The GPU that JAX sees first."""
    device = jax.devices()[0]
    capability = int(float(device.compute_capability) * 10 + 0.5)
    return Target(device.device_kind, capability, device.core_count)

"""Strict mode for every test: CPU unless told otherwise, two devices, no silent promotion."""

import os

# Set before jax is imported: `make test-gpu` says JAX_PLATFORMS=cuda,cpu.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")

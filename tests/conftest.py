"""Strict mode for every test: CPU and two devices unless told otherwise, no silent promotion."""

import os
import signal

# Set before jax is imported: `make test-gpu` says JAX_PLATFORMS=cuda,cpu.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    )

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")

# A shell that starts pytest in the background has it, and all it starts, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Minutes each, in processes of their own: first, so that no worker is left with one at the end.
LONGEST = (
    "test_all_at_the_smoke_scale",
    "test_triton_interpreted.py",
    "test_many_devices.py",
    "test_mosaic_interpreted.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))

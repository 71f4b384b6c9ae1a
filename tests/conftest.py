"""Strict mode for every test: CPU, no silent promotion; and what all tests of a run share."""

import os
import shutil
import signal
import tempfile

from tests.harness.compiling import QUICKLY

# Set before jax is imported: `make test-gpu` says JAX_PLATFORMS=cuda,cpu.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ON_CPU = os.environ["JAX_PLATFORMS"] == "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
)
# Workers and child processes inherit what was added.
if ON_CPU and not os.environ.get("AS_USERS_COMPILE"):
    os.environ["XLA_FLAGS"] += "".join(f" {flag}" for flag in QUICKLY)
# A thread for each warpgroup of an interpreted Mosaic kernel: with fewer they would deadlock.
os.environ.setdefault("NPROC", "8")

# Tests and the processes they start compile a program once: all workers share this cache.
_COMPILED = None
if ON_CPU and not {"PYTEST_XDIST_WORKER", "JAX_COMPILATION_CACHE_DIR"} & os.environ.keys():
    _COMPILED = tempfile.mkdtemp(prefix="rbf-jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis  # noqa: E402
import jax  # noqa: E402

from tests.harness.times import Times  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")

pytest_plugins = ["tests.harness.runs"]

# Training takes every device that JAX lists: two, unless a test asks `jax.local_devices` for more.
_list_devices = jax.devices
jax.devices = lambda backend=None: _list_devices(backend)[:2]
jax.device_count = lambda backend=None: len(jax.devices(backend))

# A background shell starts its children with Ctrl-C ignored; tests of signals need it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--keep-times", action="store_true", help="keep this run's times as record")


def pytest_configure(config):
    """Few drawn examples by default, many where exhaustive tests run too; times are reported."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Times(config), "times")
    few = hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
    hypothesis.settings.register_profile("default", few)
    hypothesis.settings.register_profile("exhaustive", few, max_examples=50)
    every = config.getoption("markexpr") != "not exhaustive"
    hypothesis.settings.load_profile("exhaustive" if every else "default")


def pytest_unconfigure():
    if _COMPILED is not None:
        shutil.rmtree(_COMPILED, ignore_errors=True)

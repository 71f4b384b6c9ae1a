"""Calls on eight devices: tests/ops/many_devices, in processes that have as many."""

import pytest

from tests.harness import own_process

FOLDER = "tests/ops/many_devices"
FILES = ["ring.py", "partition.py", "mosaic.py"]
EIGHT_CPUS = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # LLVM's alone: two fifths of the time.
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
}


def test_all_files_are_run():
    assert own_process.all_files(FOLDER) == {*FILES, "collectives.py"}


@pytest.mark.parametrize("file", FILES)
def test_many_devices(file):
    own_process.run(f"{FOLDER}/{file}", EIGHT_CPUS)

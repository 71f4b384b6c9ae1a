"""Calls on eight devices: tests/ops/many_devices, in a process that has as many."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path("tests/ops/many_devices")
FILES = ["ring.py", "partition.py"]


def test_all_files_are_run():
    files = {path.name for path in (ROOT / FOLDER).glob("*.py")} - {"__init__.py"}
    assert files == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_many_devices(file):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "pytest", str(FOLDER / file)]
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(
        [*command, *plugins, "--override-ini=addopts=", "--quiet", "--tb=short"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout, run.stdout[-500:]

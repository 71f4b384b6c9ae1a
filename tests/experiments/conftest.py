import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.compiling import without_optimizations
from tests.harness.tiny import write_corpus

REPOSITORY = Path(__file__).parents[2]
SMOKE = f"--config={REPOSITORY / 'configs' / 'smoke.py'}"


@pytest.fixture(scope="package", autouse=True)
def compile_quickly():
    with without_optimizations():
        yield


@pytest.fixture(scope="package")
def start(tmp_path_factory):
    """Starts training on a small corpus; it logs and saves often, so that it can be killed."""
    folder = tmp_path_factory.mktemp("programs")
    arguments = [
        SMOKE,
        "--config.data.source=text",
        f"--config.data.train_files={write_corpus(folder)}",
        f"--config.data.cache_dir={folder / 'cache'}",
        "--config.data.context_length=16",
        "--config.train.log_every=3",
        "--config.train.eval_every=10",
        "--config.train.checkpoint_every=5",
        "--config.train.steps=100",
    ]
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # Bit-identical as users compile it.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(run):
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.train", *arguments, f"--run={run}"],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture(scope="package")
def finished(start, tmp_path_factory):
    """The folder of a run that was never stopped. Only to be read."""
    run = tmp_path_factory.mktemp("finished") / "run"
    process = start(run)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return run

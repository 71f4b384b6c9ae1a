import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.harness.runs import HANG, environment

REPOSITORY = Path(__file__).parents[2]
SMOKE = f"--config={REPOSITORY / 'configs' / 'smoke.py'}"


@pytest.fixture(scope="package")
def start(corpus):
    """Starts training on the small corpus; its output goes into the file `output`."""

    def start(run, *options, devices=2, **variables):
        arguments = [
            SMOKE,
            f"--run={run}",
            "--config.data.source=text",
            f"--config.data.train_files={corpus / 'stories.txt'}",
            f"--config.data.cache_dir={corpus / 'cache'}",
            "--config.data.context_length=16",
            "--config.train.log_every=1",
            "--config.train.eval_every=10",
            "--config.train.checkpoint_every=5",
            *options,
        ]
        handle, output = tempfile.mkstemp(dir=corpus)
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.train", *arguments],
            cwd=REPOSITORY,
            env=environment(devices, **variables),
            stdout=handle,
            stderr=subprocess.STDOUT,
        )
        os.close(handle)
        process.output = Path(output)
        return process

    return start


def ends(*processes):
    """Waits for all; returns their exit statuses and what they wrote."""
    try:
        statuses = [process.wait(HANG) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return statuses, [process.output.read_text() for process in processes]

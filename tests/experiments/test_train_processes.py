"""Two processes train one run: killed, stopped and taken up again on other devices."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.experiments.conftest import REPOSITORY, SMOKE
from tests.harness.tiny import without_timing, write_corpus

STEPS = 30


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(run, mesh, …) → processes that train together; each writes into a file of its own."""
    folder = tmp_path_factory.mktemp("processes")
    corpus = write_corpus(folder)
    numbers = itertools.count()

    def start(run, *options, processes=1, devices=1, own_options=((), ())):
        arguments = [
            SMOKE,
            f"--run={run}",
            "--config.data.source=text",
            f"--config.data.train_files={corpus}",
            f"--config.data.cache_dir={folder / 'cache'}",
            "--config.data.context_length=16",
            "--config.train.batch_size=8",
            f"--config.train.steps={STEPS}",
            "--config.train.log_every=1",
            "--config.train.eval_every=10",
            "--config.train.checkpoint_every=5",
            "--config.logging.tensorboard=false",
            *options,
        ]
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        if processes > 1:
            address = f"localhost:{free_port()}"
            arguments += [f"--coordinator={address}", "--heartbeat_timeout=10"]
            environment["JAX_NUM_PROCESSES"] = str(processes)
        started = []
        for index in range(processes):
            output = folder / f"output_{next(numbers)}"
            with output.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "experiments.train", *arguments, *own_options[index]],
                    cwd=REPOSITORY,
                    env={**environment, "JAX_PROCESS_ID": str(index)}
                    if processes > 1
                    else environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            process.output = output
            started.append(process)
        return started

    return start


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def ends(processes, timeout=90):
    """Waits for all; returns their exit statuses and what they wrote."""
    deadline = time.monotonic() + timeout
    try:
        statuses = [p.wait(timeout=max(deadline - time.monotonic(), 0.1)) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return statuses, [process.output.read_text() for process in processes]


def wait_for_step(processes, run, step):
    path = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.01)


def test_killed_stopped_and_moved_it_trains_as_on_one_device(start, tmp_path):
    once, moved = tmp_path / "once", tmp_path / "moved"
    (plain,) = start(once)
    statuses, outputs = ends([plain])
    assert statuses == [0], outputs

    # 8 devices of two processes; one process is killed, and the other does not hang.
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    two = start(moved, *mesh, processes=2, devices=4)
    wait_for_step(two, moved, 7)
    two[1].kill()
    killed = time.monotonic()
    statuses, outputs = ends(two)
    assert time.monotonic() - killed < 60
    assert statuses[0] not in (0, None), outputs
    assert statuses[1] == -signal.SIGKILL
    assert "another task died" in outputs[0] or "another has gone" in outputs[0], outputs[0]

    # Both hold all rows, and half of the tokens; the signal to one stops both.
    two = start(moved, "--config.mesh.seq=2", processes=2)
    wait_for_step(two, moved, 17)
    two[1].send_signal(signal.SIGTERM)
    statuses, outputs = ends(two)
    assert statuses == [128 + signal.SIGTERM] * 2, outputs
    stopped = max(line["step"] for line in without_timing(moved / "metrics.jsonl"))
    assert all(f"stopped by a signal after step {stopped}" in text for text in outputs)
    assert "Going on from the checkpoint of step 5." in outputs[0]
    assert "goes on with mesh.fsdp: 2 -> 1; mesh.seq: 1 -> 2; mesh.tensor: 2 -> 1." in outputs[0]

    (process,) = start(moved)
    statuses, outputs = ends([process])
    assert statuses == [0], outputs
    assert f"Going on from the checkpoint of step {stopped}." in outputs[0]

    expected, actual = (without_timing(run / "metrics.jsonl") for run in (once, moved))
    keys = [(line["step"], line["split"]) for line in expected]
    assert [(line["step"], line["split"]) for line in actual] == keys
    for key in ("loss", "logit_max", "key_norm_mean"):
        pairs = [(a[key], b[key]) for a, b in zip(actual, expected) if key in b]
        np.testing.assert_allclose(*zip(*pairs), rtol=1e-3)


def test_what_one_process_cannot_do_ends_both(start, tmp_path):
    two = start(tmp_path / "run", processes=2, own_options=((), ("--config.seed=7",)))
    statuses, outputs = ends(two)
    assert statuses == [2, 2], outputs
    message = "is used with two configurations at once. Different: seed: 0 -> 7"
    assert "train: process 1: " in outputs[0]
    assert message in outputs[0]
    assert message in outputs[1]

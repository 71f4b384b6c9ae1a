"""Two processes train one run: killed, stopped and taken up again on other devices."""

import json
import signal
import socket
import time

import numpy as np
import pytest

from rbf_jax.sweeps.study import newest_checkpoint
from tests.experiments.conftest import ends
from tests.harness.runs import HANG
from tests.harness.tiny import without_timing

SIZES = ("--config.train.batch_size=8", "--config.train.steps=30")
SIZES += ("--config.logging.tensorboard=false",)


@pytest.fixture
def start_two(start):
    """Starts two processes that train together; the second has options of its own."""

    def start_two(run, *options, devices=1, second=()):
        together = [f"--coordinator=localhost:{free_port()}", "--heartbeat_timeout=60"]
        return [
            start(
                *(run, *SIZES, *together, *options, *own),
                devices=devices,
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(index),
            )
            for index, own in enumerate(((), second))
        ]

    return start_two


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def wait_for(processes, condition):
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if condition():
            return
        time.sleep(0.01)


def last_step(run):
    """That of the newest line of metrics; -1 while it is being written."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else -1


# The first mesh: its sizes along "fsdp" and "tensor", and the devices of each process.
@pytest.mark.parametrize(
    ("fsdp", "tensor", "devices"),
    [(2, 1, 1), pytest.param(2, 2, 4, marks=pytest.mark.exhaustive)],
)
def test_killed_stopped_and_moved_it_trains_as_on_one_device(
    fsdp, tensor, devices, start, start_two, tmp_path
):
    once, moved = tmp_path / "once", tmp_path / "moved"
    statuses, outputs = ends(start(once, *SIZES, devices=1))
    assert statuses == [0], outputs

    # Each process reads its own rows. One is killed, and the other does not hang.
    mesh = (f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}")
    two = start_two(moved, *mesh, devices=devices)
    wait_for(two, lambda: newest_checkpoint(moved) >= 5)
    two[1].kill()
    statuses, outputs = ends(*two)
    assert statuses[0] not in (0, None), outputs
    assert statuses[1] == -signal.SIGKILL
    assert "another task died" in outputs[0] or "another has gone" in outputs[0], outputs[0]

    # Both hold all rows, and half of the tokens; the signal to one stops both.
    before = last_step(moved)
    two = start_two(moved, "--config.mesh.seq=2")
    wait_for(two, lambda: last_step(moved) > max(before, 16))
    two[1].send_signal(signal.SIGTERM)
    statuses, outputs = ends(*two)
    assert statuses == [128 + signal.SIGTERM] * 2, outputs
    stopped = max(line["step"] for line in without_timing(moved / "metrics.jsonl"))
    assert all(f"stopped by a signal after step {stopped}" in text for text in outputs)
    assert "Going on from the checkpoint of step " in outputs[0]
    changes = ["mesh.fsdp: 2 -> 1", "mesh.seq: 1 -> 2"] + ["mesh.tensor: 2 -> 1"] * (tensor - 1)
    assert f"goes on with {'; '.join(changes)}." in outputs[0]

    (status,), (output,) = ends(start(moved, *SIZES, devices=1))
    assert status == 0, output
    assert f"Going on from the checkpoint of step {stopped}." in output

    expected, actual = (without_timing(run / "metrics.jsonl") for run in (once, moved))
    keys = [(line["step"], line["split"]) for line in expected]
    assert [(line["step"], line["split"]) for line in actual] == keys
    for key in ("loss", "logit_max", "key_norm_mean"):
        pairs = [(a[key], b[key]) for a, b in zip(actual, expected) if key in b]
        np.testing.assert_allclose(*zip(*pairs), rtol=1e-3)


def test_what_one_process_cannot_do_ends_both(start_two, tmp_path):
    statuses, outputs = ends(*start_two(tmp_path / "run", second=("--config.seed=7",)))
    assert statuses == [2, 2], outputs
    message = "is used with two configurations at once. Different: seed: 0 -> 7"
    assert "train: process 1: " in outputs[0]
    assert message in outputs[0]
    assert message in outputs[1]

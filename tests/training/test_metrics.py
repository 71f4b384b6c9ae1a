import importlib.util
import json
import struct
import sys
import types

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from configs import base
from rbf_jax.training import metrics
from rbf_jax.training.run_folder import RunFolder

TRAIN = {"loss": 2.0, "gamma/0": [0.5, 0.25], "seconds": 1.5}
VALID = {"loss": 3.0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_lines(path):
    file = metrics.MetricsFile(path, 0)
    file.write(2, "train", TRAIN)
    file.write(2, "valid", VALID)
    # On the disk at once, not at the end.
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 2, "split": "train", **TRAIN},
        {"step": 2, "split": "valid", **VALID},
    ]
    assert metrics.read_valid_losses(path) == {2: 3.0}
    file.close()


def test_lines_behind_the_checkpoint_are_dropped(path):
    file = metrics.MetricsFile(path, 0)
    for step in range(1, 6):
        file.write(step, "train", {"loss": float(step), "seconds": 10.0 * step})
    file.close()
    resumed = metrics.MetricsFile(path, 3)
    resumed.write(4, "train", {"loss": 4.5})
    resumed.close()
    losses = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
    assert losses == [1.0, 2.0, 3.0, 4.5]


def test_half_a_last_line_is_dropped_but_no_other(path):
    whole = '{"step": 1, "split": "train", "loss": 1.0}\n'
    path.write_text(whole + '{"step": 2, "spl')
    metrics.MetricsFile(path, 5).close()
    assert path.read_text() == whole
    path.write_text(whole + "what?\n" + whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no line of metrics"):
        metrics.MetricsFile(path, 5)


def test_numbers():
    values = {"a": jnp.float32(0.5), "b": jnp.array([1.0, 2.0])}
    assert metrics.to_numbers(values) == {"a": 0.5, "b": [1.0, 2.0]}
    assert metrics.all_finite({"a": 0.5, "b": [1.0, 2.0]})
    assert not metrics.all_finite({"a": 0.5, "b": [1.0, float("inf")]})


def read_events(folder):
    """Yields the events of a TensorBoard folder's files, as TFRecord has them."""
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_tensorboard(tmp_path):
    config = base.get_config()
    (writer,) = metrics.open_writers(config, RunFolder(tmp_path), 4)
    writer.write(5, "train", TRAIN)
    writer.close()
    events = list(read_events(tmp_path / "tensorboard"))
    values = {v.tag: v.simple_value for event in events for v in event.summary.value}
    assert values == {
        "train/loss": 2.0,
        "train/gamma/0/head_0": 0.5,
        "train/gamma/0/head_1": 0.25,
        "train/seconds": 1.5,
    }
    # What an interrupted run wrote behind its last checkpoint is taken back.
    starts = [e.step for e in events if e.session_log.status == event_pb2.SessionLog.START]
    assert starts == [5]


def test_tensorboard_is_flushed(tmp_path):
    (writer,) = metrics.open_writers(base.get_config(), RunFolder(tmp_path), 4)
    writer.write(5, "train", {"loss": 2.0})
    writer.flush()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()
    writer.close()


def test_weights_and_biases(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((values, step)),
        finish=lambda: calls.append("finish"),
    )
    init = lambda **options: calls.append(options) or run  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = base.get_config()
    config.logging.tensorboard, config.logging.wandb_project = False, "stories"
    for _ in range(2):
        (writer,) = metrics.open_writers(config, RunFolder(tmp_path), 0)
        writer.write(5, "train", TRAIN)
        writer.close()
    first, logged, finished, second = calls[:4]
    assert first["project"] == "stories"
    assert first["config"]["model"]["attention"]["kind"] == "rbf"
    assert logged[0]["train/gamma/0/head_1"] == 0.25
    assert logged[1] == 5
    assert finished == "finish"
    # A run that goes on is the same run there.
    assert (second["id"], second["resume"]) == (first["id"], "allow")


@pytest.mark.parametrize(
    ("package", "extra", "key", "value", "advice"),
    [
        ("tensorboardX", "train", "tensorboard", True, "--config.logging.tensorboard=false"),
        ("wandb", "wandb", "wandb_project", "stories", "--config.logging.wandb_project="),
    ],
)
def test_missing_packages_are_named(package, extra, key, value, advice, monkeypatch):
    config = base.get_config().logging
    config.tensorboard = False
    metrics.require_packages(config)
    config[key] = value
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    with pytest.raises(ImportError, match=rf"{package} is not installed: .*\[{extra}\].*{advice}"):
        metrics.require_packages(config)

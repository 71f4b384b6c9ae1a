import json
import random
import signal
import time

import jax
import pytest

from experiments import train
from rbf_jax.training import load_run
from tests.experiments.conftest import REPOSITORY, SMOKE
from tests.harness.tiny import state_digests, without_timing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"{SMOKE}x"], "does not exist; did you mean"),
        ([SMOKE, "--config.model.num_layer=3"], "did you mean model.num_layers?"),
        ([SMOKE, "--config.train.steps=-3"], "train.steps is -3; it must be at least 1."),
        ([SMOKE, "--config.train.batch_size=3"], "train.batch_size is 3; it must be a multiple of"),
        ([SMOKE, "--config.data.tokenizer=bype"], "data.tokenizer"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    cache = f"--config.data.cache_dir={tmp_path}"
    status = train.main(["train", *arguments, cache, f"--run={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("train: ")
    assert message in error
    assert error.count("\n") == 1


def test_help(capsys):
    assert train.main(["train", "--help"]) == 0
    assert "--config=configs/NAME.py" in capsys.readouterr().out


def lines_of_metrics(run):
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def stop_after_lines(process, run, lines, number):
    """Sends a signal once the run has written so many lines of metrics; returns the output.

    Lines that were there before do not count: at least one is new.
    """
    lines = max(lines, lines_of_metrics(run) + 1)
    deadline = time.monotonic() + 120
    while lines_of_metrics(run) < lines and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    return process.communicate(timeout=60)[0]


def test_killed_at_random_moments_it_ends_as_if_never_stopped(start, finished, tmp_path):
    once, often = finished, tmp_path / "often"
    # The run writes 45 lines; the last few come too soon before its end to stop it there.
    thirds = (range(1, 15), range(15, 30), range(30, 39))
    moments = [random.Random().choice(third) for third in thirds]
    for lines, number in zip(moments, (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        process = start(often)
        output = stop_after_lines(process, often, lines, number)
        if number == signal.SIGTERM:
            assert process.returncode == 128 + number, (moments, output)
            assert "the same command goes on from there" in output
        else:
            assert process.returncode == -number, (moments, output)
        assert not (often / "summary.json").exists()
    last = start(often)
    output = last.communicate(timeout=120)[0]
    assert last.returncode == 0, (moments, output)
    assert "Going on from the checkpoint of step" in output

    assert without_timing(often / "metrics.jsonl") == without_timing(once / "metrics.jsonl")
    expected, actual = load_run(once), load_run(often)
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), expected.variables, actual.variables)
    assert jax.tree.all(equal), (moments, equal)
    digests = [state_digests(run, actual.step) for run in (once, often)]
    assert digests[0] == digests[1], moments
    losses = [json.loads((run / "summary.json").read_text())["valid_loss"] for run in (once, often)]
    assert losses[0] == losses[1]

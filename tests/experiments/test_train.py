import json
import random
import signal
import time

import jax
import pytest

from experiments import train
from rbf_jax.training import TrainingDiverged, load_run
from tests.experiments.conftest import REPOSITORY, SMOKE, ends
from tests.harness.runs import HANG
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


def test_divergence_has_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    def diverge(*_, **__):
        raise TrainingDiverged("the loss of step 3 is not finite.")

    monkeypatch.setattr("rbf_jax.training.train", diverge)
    assert train.main(["train", SMOKE, f"--run={tmp_path / 'run'}"]) == 1
    assert capsys.readouterr().err == "train: the loss of step 3 is not finite.\n"


def test_help(capsys):
    assert train.main(["train", "--help"]) == 0
    assert "--config=configs/NAME.py" in capsys.readouterr().out


def lines_of_metrics(run):
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def stop_after_lines(process, run, lines, number):
    """Sends a signal once the run has written so many lines of metrics; returns what it wrote.

    Lines that were there before do not count: at least one is new.
    """
    lines = max(lines, lines_of_metrics(run) + 1)
    deadline = time.monotonic() + HANG
    while lines_of_metrics(run) < lines and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    return ends(process)[1][0]


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGKILL, signal.SIGTERM),
        pytest.param((signal.SIGKILL, signal.SIGTERM) * 3, marks=pytest.mark.exhaustive),
    ],
    ids=len,
)
def test_killed_at_random_moments_it_ends_as_if_never_stopped(signals, start, tmp_path):
    once, often = tmp_path / "once", tmp_path / "often"
    as_users = {"as_users_compile": True}  # Bit-identical as they have it.
    assert ends(first := start(once, **as_users))[0] == [0], first.output.read_text()

    # The run writes 44 lines; a signal in the last ones could come after its end.
    share = 24 // len(signals)
    moments = [random.randrange(1 + i * share, 1 + (i + 1) * share) for i in range(len(signals))]
    for lines, number in zip(moments, signals):
        process = start(often, **as_users)
        output = stop_after_lines(process, often, lines, number)
        if number == signal.SIGTERM:
            assert process.returncode == 128 + number, (moments, output)
            assert "the same command goes on from there" in output
        else:
            assert process.returncode == -number, (moments, output)
        assert not (often / "summary.json").exists()
    (status,), (output,) = ends(start(often, **as_users))
    assert status == 0, (moments, output)
    assert "Going on from the checkpoint of step" in output

    assert without_timing(often / "metrics.jsonl") == without_timing(once / "metrics.jsonl")
    expected, actual = load_run(once), load_run(often)
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), expected.variables, actual.variables)
    assert jax.tree.all(equal), (moments, equal)
    digests = [state_digests(run, actual.step) for run in (once, often)]
    assert digests[0] == digests[1], moments
    losses = [json.loads((run / "summary.json").read_text())["valid_loss"] for run in (once, often)]
    assert losses[0] == losses[1]

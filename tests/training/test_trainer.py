import json
import signal

import jax
import pytest

from rbf_jax.training import (
    SetupError,
    TrainingDiverged,
    TrainingStopped,
    load_run,
    train,
    trainer,
)
from rbf_jax.training.run_folder import RunFolder
from tests.training.tiny import without_timing


class Killed(Exception):
    """Stands for a signal that leaves no time to clean up."""


def kill_after(monkeypatch, step, signal_number=None):
    """Makes the trainer fail, or get a signal, right after a step and all that belongs to it."""
    after_step = trainer.Trainer._after_step

    def after_step_and_die(self, *arguments):
        after_step(self, *arguments)
        if self.step == step:
            if signal_number is None:
                raise Killed
            signal.raise_signal(signal_number)

    monkeypatch.setattr(trainer.Trainer, "_after_step", after_step_and_die)


def assert_same_end(folder, finished_run):
    assert without_timing(folder / "metrics.jsonl") == without_timing(
        finished_run / "metrics.jsonl"
    )
    expected, actual = load_run(finished_run), load_run(folder)
    assert actual.step == expected.step
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), expected.variables, actual.variables)
    assert jax.tree.all(equal), equal


def test_train_save_restore_train_equals_a_run_never_stopped(
    config, tmp_path, monkeypatch, finished_run
):
    # Step 7 lies between two checkpoints and behind lines of metrics that must not stay twice.
    with monkeypatch.context() as patch:
        kill_after(patch, 7)
        with pytest.raises(Killed):
            train(config, tmp_path / "run")
    assert without_timing(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 7
    train(config, tmp_path / "run")
    assert_same_end(tmp_path / "run", finished_run)

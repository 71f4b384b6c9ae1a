import dataclasses
import itertools
import json
import logging
import multiprocessing
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
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
from tests.harness.tiny import state_digests, without_timing


class Killed(Exception):
    """Stands for a signal that leaves no time to clean up."""


@pytest.fixture
def after(monkeypatch):
    """Has something done to the trainer right after a step and all that belongs to it."""
    after_step = trainer.Trainer._after_step

    def install(step, action, *, before=False):
        def wrapped(self, *arguments):
            if before and self.step == step:
                action(self)
            after_step(self, *arguments)
            if not before and self.step == step:
                action(self)

        monkeypatch.setattr(trainer.Trainer, "_after_step", wrapped)

    return install


def kill(trainer):
    raise Killed


def poison(trainer):
    params = jax.tree.map(lambda x: x * jnp.nan, trainer.state.params)
    trainer.state = dataclasses.replace(trainer.state, params=params)


def unfinished_copy(finished_run, folder):
    shutil.copytree(finished_run, folder)
    (folder / "summary.json").unlink()
    return folder


def assert_same_end(folder, finished_run):
    assert without_timing(folder / "metrics.jsonl") == without_timing(
        finished_run / "metrics.jsonl"
    )
    expected, actual = load_run(finished_run), load_run(folder)
    assert actual.step == expected.step
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), expected.variables, actual.variables)
    assert jax.tree.all(equal), equal
    digests = [state_digests(run, actual.step) for run in (folder, finished_run)]
    assert digests[0] == digests[1]


def test_train_save_restore_train_equals_a_run_never_stopped(config, tmp_path, after, finished_run):
    # Step 7 lies between two checkpoints and behind lines of metrics that must not stay twice.
    after(7, kill)
    with pytest.raises(Killed):
        train(config, tmp_path)
    assert without_timing(tmp_path / "metrics.jsonl")[-1]["step"] == 7
    after(0, kill)
    train(config, tmp_path)
    assert_same_end(tmp_path, finished_run)


def test_a_run_that_goes_on_knows_the_losses_of_its_checkpoints(config, tmp_path, after):
    after(9, kill)  # behind the evaluation and the checkpoint of step 8
    with pytest.raises(Killed):
        train(config, tmp_path)
    known = []
    after(9, lambda trainer: known.extend(trainer._checkpoints.losses))
    train(config, tmp_path)
    assert known == [4, 8]


def test_a_signal_stops_after_saving(config, tmp_path, after, finished_run):
    after(7, lambda trainer: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(TrainingStopped, match="after step 7") as stopped:
        train(config, tmp_path)
    assert stopped.value.signal == signal.SIGTERM
    assert (tmp_path / "checkpoints" / "7").is_dir()
    after(0, kill)
    train(config, tmp_path)
    assert_same_end(tmp_path, finished_run)


def test_a_second_interrupt_is_not_held_back(config, tmp_path, after):
    def interrupt_twice(trainer):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    after(1, interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)


def test_who_sees_an_evaluation_can_end_the_run_behind_its_checkpoint(
    config, tmp_path, finished_run
):
    seen = []

    def on_evaluation(step, loss):
        seen.append((step, loss))
        if step == 8:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path, on_evaluation=on_evaluation)
    assert (tmp_path / "checkpoints" / "8").is_dir()
    train(config, tmp_path, on_evaluation=on_evaluation)
    assert_same_end(tmp_path, finished_run)
    lines = without_timing(tmp_path / "metrics.jsonl")
    assert seen == [(line["step"], line["loss"]) for line in lines if line["split"] == "valid"]


def test_a_corrupt_newest_checkpoint_is_reported_and_the_one_before_used(
    config, tmp_path, finished_run, caplog
):
    caplog.set_level(logging.INFO)
    folder = unfinished_copy(finished_run, tmp_path / "run")
    values = folder / "checkpoints" / "12" / "params" / "ocdbt.process_0" / "d"
    largest = max(values.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)

    train(config, folder)

    assert "checkpoints/12 cannot be used" in caplog.text
    assert "Going on from the checkpoint of step 10" in caplog.text
    assert (folder / "bad_checkpoints" / "12").is_dir()
    assert_same_end(folder, finished_run)


def test_without_a_good_checkpoint_nothing_is_trained_or_moved(config, tmp_path, finished_run):
    folder = unfinished_copy(finished_run, tmp_path / "run")
    metrics = (folder / "metrics.jsonl").read_text()
    for checkpoint in (folder / "checkpoints").iterdir():
        shutil.rmtree(checkpoint / "params")
    with pytest.raises(SetupError, match=r"no checkpoint in .* is good: 12: .*; 10: "):
        train(config, folder)
    assert not (folder / "bad_checkpoints").exists()
    assert (folder / "metrics.jsonl").read_text() == metrics


def test_changed_data_is_an_error(config, tmp_path, finished_run, monkeypatch):
    folder = unfinished_copy(finished_run, tmp_path / "run")
    load_data = trainer.load_data

    def load_other_data(*arguments, **options):
        return dataclasses.replace(load_data(*arguments, **options), fingerprint="another")

    monkeypatch.setattr(trainer, "load_data", load_other_data)
    with pytest.raises(SetupError, match=r"data or the tokenizer has changed since .* step 12"):
        train(config, folder)


def test_a_run_can_be_in_another_thread(config, tmp_path, finished_run):
    thread = threading.Thread(target=train, args=(config, tmp_path))
    thread.start()
    thread.join()
    assert_same_end(tmp_path, finished_run)


def test_seconds_go_on_from_the_checkpoint(config, tmp_path, after, monkeypatch):
    # Each reading of the clock is a second after the one before, and logging is rare.
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    config.train.log_every = 12
    seconds = []
    after(4, lambda trainer: seconds.append(trainer.seconds) or kill(trainer))
    with pytest.raises(Killed):
        train(config, tmp_path)
    after(12, lambda trainer: seconds.append(trainer.seconds))
    train(config, tmp_path)
    # Steps 1, 2 and 4; 6, 8, 10 and 12.
    assert seconds == [3.0, 7.0]


def test_writers_are_flushed_before_a_checkpoint(config, tmp_path, after, monkeypatch):
    written = []

    class Writer:
        def write(self, step, split, values):
            written.append((step, split))

        def flush(self):
            written.append("flush")

        def close(self):
            written.append("close")

    monkeypatch.setattr(trainer, "open_writers", lambda *_: [Writer()])
    after(2, kill)
    with pytest.raises(Killed):
        train(config, tmp_path)
    assert written == [(1, "train"), (2, "train"), "flush", "close"]


def test_all_is_closed_though_one_cannot_be(config, tmp_path, after, monkeypatch):
    opened = []
    after(1, lambda trainer: opened.append(trainer) or kill(trainer))

    def fail(checkpoints):
        raise OSError("the disk is full")

    monkeypatch.setattr(trainer.Checkpoints, "close", fail)
    config.data.num_workers = 1
    children = set(multiprocessing.active_children())
    with pytest.raises(OSError, match="the disk is full"):
        train(config, tmp_path)
    assert opened[0]._writers[0]._file.closed
    assert set(multiprocessing.active_children()) == children


def test_non_finite_loss_stops_the_run(config, tmp_path, after):
    config.train.log_every, config.train.checkpoint_every = 3, 4
    after(4, poison)
    expected = r"step 5, found after step 6; .* step 4 in"
    with pytest.raises(TrainingDiverged, match=expected):
        train(config, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4"]
    assert max(line["step"] for line in without_timing(tmp_path / "metrics.jsonl")) == 4


def test_non_finite_parameters_are_not_saved(config, tmp_path, after):
    after(2, poison, before=True)
    config.train.log_every = 3
    with pytest.raises(TrainingDiverged, match=r"step 2, .* there is no checkpoint yet"):
        train(config, tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())


def test_non_finite_metrics_are_not_written(config, tmp_path, after):
    # The loss of the step is that of the parameters before it, what attention does is not.
    after(3, poison, before=True)
    with pytest.raises(TrainingDiverged, match=r"at step 3, .* the last good .* step 2 in"):
        train(config, tmp_path)
    assert max(line["step"] for line in without_timing(tmp_path / "metrics.jsonl")) == 2


def test_a_finished_run_is_left_alone(config, finished_run, caplog):
    caplog.set_level(logging.INFO)
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.json*")}
    summary = train(config, finished_run)
    assert "has finished already" in caplog.text
    assert summary == json.loads((finished_run / "summary.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.json*")}


def test_a_folder_of_another_configuration_is_left_alone(config, finished_run):
    config.optimizer.learning_rate = 0.5
    config.seed = 7
    with pytest.raises(SetupError, match=r"optimizer.learning_rate: 0.001 -> 0.5; seed: 0 -> 7"):
        train(config, finished_run)


def test_one_process_trains_in_a_folder(config, tmp_path):
    with (
        RunFolder(tmp_path).claimed(config),
        pytest.raises(SetupError, match="another process is training in"),
    ):
        train(config, tmp_path)


def test_errors_of_the_data_come_in_one_line_and_spare_the_folder(config, tmp_path, corpus):
    right, config.data.train_files = config.data.train_files, (str(corpus / "missing.txt"),)
    with pytest.raises(SetupError, match=r"missing\.txt") as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    config.data.train_files = right
    with RunFolder(tmp_path / "run").claimed(config):
        assert RunFolder(tmp_path / "run").read_config().data.train_files == right


def test_an_implementation_that_cannot_run_here_is_told_before_tokenising(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "load_data", lambda *arguments, **options: pytest.fail("too late"))
    config.model.attention.implementation = "triton"
    with pytest.raises(SetupError, match=r"^implementation='triton' needs an NVIDIA GPU"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("kind", [NotImplementedError, ValueError])
def test_what_cannot_be_compiled_is_one_line_and_spares_the_folder(
    kind, config, tmp_path, monkeypatch
):
    def refuse(*arguments, **options):
        raise kind("attention cannot\ndo that")

    monkeypatch.setattr(trainer, "compile_train_step", refuse)
    with pytest.raises(SetupError, match=r"^attention cannot do that$"):
        train(config, tmp_path / "run")
    config.model.attention.implementation = "xla"
    with RunFolder(tmp_path / "run").claimed(config):
        assert RunFolder(tmp_path / "run").read_config().model.attention.implementation == "xla"


def test_what_is_logged(finished_run, config):
    lines = without_timing(finished_run / "metrics.jsonl")
    trained = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert list(trained[0]) == [
        *("step", "split", "loss", "grad_norm", "learning_rate"),
        *("gamma/0", "key_norm_max", "key_norm_mean", "key_norm_weight/0"),
        *("logit_max", "register_norm"),
    ]
    assert [line["learning_rate"] for line in trained[:3]] == pytest.approx(
        [1e-3 / 3, 2e-3 / 3, 1e-3]
    )
    assert trained[-1]["learning_rate"] == pytest.approx(1e-5)
    assert trained[0]["gamma/0"] == pytest.approx([8**-0.5] * 2)
    assert trained[0]["loss"] > trained[-1]["loss"]
    valid = [line for line in lines if line["split"] == "valid"]
    assert [line["step"] for line in valid] == [4, 8, 12]
    assert list(valid[0]) == ["step", "split", "loss", "bits_per_byte", "perplexity"]


def test_summary(finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())
    valid = [
        line for line in without_timing(finished_run / "metrics.jsonl") if line["split"] == "valid"
    ]
    assert summary["steps"] == 12
    assert summary["train_tokens"] == 12 * 4 * 16
    assert summary["valid_loss"] == valid[-1]["loss"]
    assert summary["valid_bits_per_byte"] == valid[-1]["bits_per_byte"]
    assert summary["best_valid_loss"] == min(line["loss"] for line in valid)
    run = load_run(finished_run)
    assert summary["parameters"] == sum(x.size for x in jax.tree.leaves(run.variables))
    assert summary["tokens_per_second"] == pytest.approx(12 * 64 / summary["seconds"])

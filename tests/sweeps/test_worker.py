import json
import os
import signal
import subprocess
import sys

import optuna
import pytest
from optuna.trial import TrialState

from configs import base
from rbf_jax.sweeps import space, worker
from rbf_jax.sweeps.study import SweepStudy
from rbf_jax.sweeps.sweep import Sweep, SweepFolder
from rbf_jax.sweeps.table import rows
from rbf_jax.sweeps.worker import Worker
from rbf_jax.training import SetupError, TrainingDiverged, TrainingStopped

LR = "optimizer.learning_rate"
STEPS = 4


class Killed(BaseException):
    """Stands for a signal that leaves no time to clean up."""


@pytest.fixture(autouse=True)
def signals():
    """Leaves the handlers of this process as they are: a worker has a process of its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def make(tmp_path):
    """Makes a sweep of three learning rates."""

    def make(**settings):
        config = base.get_config()
        config.train.steps = STEPS
        parts = space.parse(({LR: (0.1, 0.2, 0.3)},))
        folder = SweepFolder(tmp_path / "sweep")
        folder.settle(Sweep(base=config.to_dict(), parts=parts, **settings))
        return folder

    return make


@pytest.fixture
def work(monkeypatch):
    """Runs a worker whose trials have the losses, by step, that `losses` says for a rate."""

    def work(folder, losses, name="worker_0"):
        def train(config, run_dir, *, on_evaluation):
            run_dir.joinpath("checkpoints").mkdir(exist_ok=True)
            seen = {}
            for step, loss in losses(config.optimizer.learning_rate):
                if isinstance(loss, BaseException):
                    raise loss
                seen[step] = loss
                line = {"step": step, "split": "valid", "loss": loss}
                with (run_dir / "metrics.jsonl").open("a") as metrics:
                    metrics.write(json.dumps(line) + "\n")
                (run_dir / "checkpoints" / str(step)).mkdir()
                on_evaluation(step, loss)
            return {"best_valid_loss": min(seen.values()), "valid_loss": loss}

        with monkeypatch.context() as patched:
            patched.setattr(worker, "train", train)
            Worker(folder.path, name)()
        return SweepStudy(folder).trials()

    return work


def falling(rate):
    return [(1, 3.0), (2, rate), (4, 2.0)]


@pytest.mark.parametrize(("objective", "values"), [("best", [0.1, 0.2, 0.3]), ("final", [2.0] * 3)])
def test_trials_are_told_what_they_are_worth(make, work, objective, values):
    folder = make(objective=objective)
    trials = work(folder, falling)
    assert [trial.value for trial in trials] == values
    assert [trial.intermediate_values for trial in trials] == [
        dict(falling(r)) for r in (0.1, 0.2, 0.3)
    ]
    for number, rate in enumerate((0.1, 0.2, 0.3)):
        run = folder.trial(number)
        config = json.loads((run / "config.json").read_text())
        assert (config["optimizer"]["learning_rate"], config["seed"]) == (rate, 0)
        log = (run / "log.txt").read_text()
        assert f"Trial {number}, taken by worker_0, process {os.getpid()}." in log


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SetupError("no such\n file"), "no such file"),
        (TrainingDiverged("not finite at step 2"), "not finite at step 2"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
    ],
)
def test_a_failed_trial_says_why_and_the_others_go_on(make, work, error, reason):
    folder = make()
    trials = work(folder, lambda rate: [(1, 1.0), (2, error)] if rate == 0.2 else falling(rate))
    complete, fail = TrialState.COMPLETE, TrialState.FAIL
    assert [trial.state for trial in trials] == [complete, fail, complete]
    row = rows(SweepStudy(folder))[1]
    assert (row.state, row.error, row.loss) == ("failed", reason, 1.0)
    assert reason in (folder.trial(1) / "log.txt").read_text()


def test_a_signal_leaves_the_trial_for_the_next_worker(make, work):
    folder = make(max_deaths=1)
    stopped = TrainingStopped("stopped by a signal", signal.SIGTERM)
    for _ in range(2):  # That is no death.
        trials = work(folder, lambda rate: [(1, stopped)])
    assert [trial.state for trial in trials] == [TrialState.RUNNING, *[TrialState.WAITING] * 2]
    assert [row.state for row in rows(SweepStudy(folder))] == ["interrupted", "waiting", "waiting"]
    trials = work(folder, lambda rate: [(4, 0.5)])
    assert [trial.value for trial in trials] == [0.5] * 3


def test_a_trial_that_kills_its_workers_fails(make, work):
    folder = make(max_deaths=2)
    for _ in range(2):
        with pytest.raises(Killed):
            work(folder, lambda rate: [(1, Killed())] if rate == 0.1 else falling(rate))
    trials = work(folder, falling)
    assert trials[0].user_attrs["error"] == "its worker died 2 times after step 0; see workers/"
    assert [trial.state == TrialState.FAIL for trial in trials] == [True, False, False]


def test_what_a_killed_worker_saved_but_did_not_tell_is_told(make, work, monkeypatch):
    folder = make()
    with monkeypatch.context() as patched:
        patched.setattr(optuna.Trial, "report", raise_killed)
        with pytest.raises(Killed):
            work(folder, falling)
    assert SweepStudy(folder).trials()[0].intermediate_values == {}
    trials = work(folder, lambda rate: [(2, 0.5)] if rate == 0.1 else falling(rate))
    assert trials[0].intermediate_values == {1: 3.0, 2: 0.5}


def raise_killed(*arguments):
    raise Killed


def test_the_worse_are_pruned_but_not_too_early_nor_at_the_end(make, work):
    folder = make(pruner="median", prune_after_trials=1, prune_after_evaluations=1)
    told = {0.1: [5.0, 5.0, 1.0], 0.2: [9.0, 9.0, 1.0], 0.3: [9.0, 4.0, 4.0]}
    trials = work(folder, lambda rate: list(zip((1, 2, 4), told[rate])))
    assert [trial.state for trial in trials] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.COMPLETE,
    ]
    assert trials[1].intermediate_values == {1: 9.0, 2: 9.0}
    assert [row.state for row in rows(SweepStudy(folder))] == ["finished", "pruned", "finished"]


def test_two_workers_of_one_name_do_not_run_at_once(make, work, caplog):
    folder = make()
    with folder.try_lock("worker_0"):
        trials = work(folder, falling)
    assert "worker_0 is at work already" in caplog.text
    assert all(trial.state == TrialState.WAITING for trial in trials)


def test_a_worker_sees_its_gpu(make, work, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = make()
    with folder.try_lock("worker_0"):
        Worker(folder.path, "worker_0", gpu="3")()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_jax_looks_for_gpus_only_when_the_worker_has_said_which():
    code = (
        "import rbf_jax.sweeps.engine, rbf_jax.sweeps.worker\n"
        "from jax._src import xla_bridge\n"
        "raise SystemExit(xla_bridge.backends_are_initialized())"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

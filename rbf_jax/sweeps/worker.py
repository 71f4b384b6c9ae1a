"""A worker: takes one trial after another and trains it, until there is none left to take."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

import jax
import optuna
from optuna.trial import TrialState

from rbf_jax.data.files import write_text
from rbf_jax.sweeps.study import Claim, SweepStudy
from rbf_jax.sweeps.sweep import Sweep, SweepFolder
from rbf_jax.training import SetupError, TrainingDiverged, TrainingStopped, train
from rbf_jax.training.config import from_json, to_json
from rbf_jax.training.metrics import read_valid_losses
from rbf_jax.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

_LONGEST_REASON = 300


@dataclasses.dataclass(frozen=True)
class Worker:
    """What submitit runs. Two with one name in one sweep do not run at once.

    Attributes:
      folder: of the sweep.
      name: of the worker.
      gpu: what it sees of the machine's, for CUDA_VISIBLE_DEVICES; None leaves that as it is.
    """

    folder: Path
    name: str
    gpu: str | None = None

    def __call__(self) -> None:
        """Trains until no trial is left, or SIGTERM or SIGINT comes."""
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        folder = SweepFolder(self.folder)
        if (lock := _patiently(folder, self.name)) is None:
            logger.warning("%s is at work already.", self.name)
            return
        with lock:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _exit)
            folder.sign(lock)
            study = SweepStudy(folder)
            while (claim := study.claim()) is not None:
                with claim.lock:
                    if not run_trial(study, claim, self.name):
                        return
                jax.clear_caches()

    def checkpoint(self) -> Any:
        """What submitit puts back into Slurm's queue before the time of a job ends."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_trial(study: SweepStudy, claim: Claim, worker: str) -> bool:
    """Trains a trial and tells the study how it ended.

    Args:
      study: of the sweep.
      claim: of the trial.
      worker: its name, for the log.

    Returns:
      False if a signal stopped it; the trial is then to be gone on with.
    """
    sweep, trial = study.sweep, claim.trial
    config = from_json(json.dumps(sweep.config(claim.point.values, claim.seed)))
    folder = RunFolder(study.folder.trial(trial.number))
    if not folder.config.is_file():  # Before the log, so that the folder is a run's at once.
        write_text(folder.config, to_json(config))
    with _log_to(folder.path / "log.txt"):
        logger.info("Trial %d, taken by %s, process %d.", trial.number, worker, os.getpid())
        if claim.deaths >= sweep.max_deaths:
            step = trial.user_attrs["starts"][-1]
            reason = f"its worker died {claim.deaths} times after step {step}; see workers/"
            return _failed(study, trial, reason)
        try:
            report = Report(trial, folder, sweep, config.train.steps)
            report.catch_up()
            summary = train(config, folder.path, on_evaluation=report)
        except optuna.TrialPruned:
            logger.info("Pruned after step %d.", report.last_step)
            study.study.tell(trial, state=TrialState.PRUNED)
        except TrainingStopped as error:
            logger.info("%s", error)
            attrs = trial.user_attrs
            trial.set_user_attr("stops", [*attrs.get("stops", ()), attrs["starts"][-1]])
            return False
        except (SetupError, TrainingDiverged) as error:
            return _failed(study, trial, str(error))
        except Exception as error:  # Whatever it is, the other trials go on.
            logger.exception("Trial %d failed.", trial.number)
            return _failed(study, trial, f"{type(error).__name__}: {error}")
        else:
            name = "best_valid_loss" if sweep.objective == "best" else "valid_loss"
            study.study.tell(trial, summary[name])
    return True


class Report:
    """Tells Optuna the validation losses of a trial, and ends it where Optuna prunes it."""

    def __init__(self, trial: optuna.Trial, folder: RunFolder, sweep: Sweep, steps: int):
        self._trial, self._folder, self._sweep, self._steps = trial, folder, sweep, steps
        frozen = trial.study.get_trials(deepcopy=False)[trial.number]
        self._seen = set(frozen.intermediate_values)
        self.last_step = max(self._seen, default=0)

    def catch_up(self) -> None:
        """Tells what a worker, that died before it could, saw and saved.

        Raises:
          optuna.TrialPruned: the trial is to end here.
        """
        for step, loss in sorted(read_valid_losses(self._folder.metrics).items()):
            if (self._folder.checkpoints / str(step)).is_dir() and step not in self._seen:
                self(step, loss)

    def __call__(self, step: int, loss: float) -> None:
        """Takes the loss after an evaluation.

        Raises:
          optuna.TrialPruned: the trial is to end here.
        """
        if step not in self._seen:
            self._trial.report(loss, step)
        self._seen.add(step)
        self.last_step = step
        enough = len(self._seen) > self._sweep.prune_after_evaluations
        if enough and step < self._steps and self._trial.should_prune():
            raise optuna.TrialPruned


def _patiently(folder: SweepFolder, name: str) -> IO[str] | None:
    """The lock of a worker; a parent that asks whether it is free has it for a moment."""
    for _ in range(10):
        if (lock := folder.try_lock(name)) is not None:
            return lock
        time.sleep(0.1)
    return None


def _failed(study: SweepStudy, trial: optuna.Trial, reason: str) -> bool:
    reason = " ".join(reason.split())[:_LONGEST_REASON]
    logger.error("%s", reason)
    trial.set_user_attr("error", reason)
    study.study.tell(trial, state=TrialState.FAIL)
    return True


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Writes the log to a file, too, while the block runs."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root, ours = logging.getLogger(), logging.getLogger("rbf_jax")
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _exit(number: int, frame: FrameType | None) -> None:
    """Between two trials nothing is to be saved; inside one, `train` has its own handlers."""
    raise SystemExit(128 + number)

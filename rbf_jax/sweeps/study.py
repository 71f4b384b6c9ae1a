"""The study that Optuna keeps in the sweep's folder, and who trains which of its trials.

Optuna stores trials, draws points and prunes. What it does not know is whether the worker of a
trial is still alive: here the worker holds a lock of the trial, which ends with it. A trial that is
RUNNING and whose lock is free has lost its worker; the next worker takes up that very trial, with
its number, its parameters and its folder.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from rbf_jax.sweeps import space
from rbf_jax.sweeps.sweep import Sweep, SweepFolder

optuna.logging.set_verbosity(optuna.logging.WARNING)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class _JournalLock:
    """Optuna's lock of the journal, by flock: a killed process leaves neither lock nor half a line.

    Optuna's own locks are files that stay behind, and are broken after 30 seconds.
    """

    def __init__(self, journal: Path):
        self._journal, self._lock = journal, journal.with_name(f"{journal.name}.lock")
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Waits for the lock, and removes what a process killed while writing left."""
        self._file = self._lock.open("ab")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        with self._journal.open("rb+") as journal:
            end = journal.seek(0, os.SEEK_END)
            if end and journal.seek(end - 1) >= 0 and journal.read(1) != b"\n":
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Lets the next one have it."""
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclasses.dataclass
class Claim:
    """A trial that this process trains.

    Attributes:
      trial: of Optuna.
      point: what it trains.
      seed: of parameters and data.
      lock: held until closed.
      deaths: workers that died since the trial's newest checkpoint.
    """

    trial: Trial
    point: space.Point
    seed: int
    lock: IO[str]
    deaths: int


class SweepStudy:
    """The study of a sweep's folder.

    Attributes:
      folder: of the sweep.
      sweep: what is trained.
      study: of Optuna.
    """

    def __init__(self, folder: SweepFolder):
        """Opens the study; makes it, with all points of a grid, if it is not there.

        Raises:
          ValueError: the folder holds no sweep.
        """
        self.folder, self.sweep = folder, folder.read()
        self._choices = space.all_choices(self.sweep.parts)
        with folder.locked("study"):
            backend = JournalFileBackend(
                str(folder.journal), cast(Any, _JournalLock(folder.journal))
            )
            self.study = optuna.create_study(
                storage=JournalStorage(backend),
                study_name="sweep",
                direction="minimize",
                load_if_exists=True,
                pruner=_pruner(self.sweep),
                sampler=optuna.samplers.RandomSampler(seed=0),
            )
            if self.sweep.is_grid:
                self._enqueue_missing([(p.part, p.params) for p in self.sweep.points()])

    def trials(self) -> list[FrozenTrial]:
        """The trials as they are now, less the failed ones in whose place others are."""
        found = self.study.get_trials(deepcopy=False)
        newest = {_key(t.user_attrs): t.number for t in found if "params" in t.user_attrs}
        return [
            t
            for t in found
            if t.state != TrialState.FAIL or newest.get(_key(t.user_attrs)) == t.number
        ]

    def retry_failed(self) -> None:
        """Puts a new trial in the place of each that has failed."""
        with self.folder.locked("study"):
            for trial in self.trials():
                if trial.state == TrialState.FAIL:
                    names = ("part", "params", "seed")
                    attrs = {name: trial.user_attrs[name] for name in names}
                    self.study.enqueue_trial(attrs["params"], user_attrs=attrs)

    def claim(self) -> Claim | None:
        """Takes a trial that nobody trains: one that lost its worker, else one not yet begun.

        The claim's lock ends with this process, or when it is closed.

        Returns:
          The trial, or None if there is none left to take.
        """
        with self.folder.locked("study"):
            trials = self.trials()
            for trial in trials:
                if trial.state == TrialState.RUNNING and (lock := self._lock(trial.number)):
                    if self._is_running(trial.number):
                        return self._taken(Trial(self.study, trial._trial_id), lock)
                    lock.close()  # Its worker has finished it just now.
            waiting = any(trial.state == TrialState.WAITING for trial in trials)
            drawn = sum(trial.user_attrs.get("seed", 0) == 0 for trial in trials)
            if not waiting and (self.sweep.is_grid or drawn >= self.sweep.trials):
                return None
            # A seed of its own for each draw: workers come and go.
            self.study.sampler = _sampler(self.sweep, len(self.study.get_trials(deepcopy=False)))
            new = self.study.ask()
            if (lock := self._lock(new.number)) is None:
                raise RuntimeError(f"the lock of trial {new.number}, which is new, is taken.")
            return self._taken(new, lock)

    def unfinished(self) -> int:
        """Trials that are still to be trained to their end, those not yet drawn included."""
        ended = sum(trial.state in FINISHED for trial in self.trials())
        return self.sweep.num_trials - ended

    def point(self, trial: FrozenTrial) -> space.Point | None:
        """What a trial trains; None of one whose worker died before it was drawn."""
        params = trial.user_attrs.get("params")
        return None if params is None else self._part(trial.user_attrs).point(params)

    def alive(self) -> set[int]:
        """Numbers of the trials that a worker is training."""
        with self.folder.locked("study"):  # Asking takes the lock for a moment; no one may want it.
            running = [t.number for t in self.trials() if t.state == TrialState.RUNNING]
            return {number for number in running if self.folder.is_locked(_name(number))}

    def _is_running(self, number: int) -> bool:
        return self.study.get_trials(deepcopy=False)[number].state == TrialState.RUNNING

    def _part(self, attrs: dict[str, Any]) -> space.Part:
        name = attrs.get("part", self.sweep.parts[0].name)
        return next(part for part in self.sweep.parts if part.name == name)

    def _lock(self, number: int) -> IO[str] | None:
        return self.folder.try_lock(_name(number))

    def _taken(self, trial: Trial, lock: IO[str]) -> Claim:
        """Of a trial taken up again, and of one enqueued, Optuna knows the parameters already."""
        attrs = trial.user_attrs
        part = self._part(attrs)
        params = {
            axis.name: _suggest(trial, axis.name, distribution(axis, self._choices.get(axis.name)))
            for axis in part.varying
        }
        if "params" not in attrs:
            trial.set_user_attr("part", part.name)
            trial.set_user_attr("seed", 0)
            trial.set_user_attr("params", params)
        if not self.sweep.is_grid:
            self._enqueue_missing([(part.name, params)])
        # Steps where workers took the trial up, and those of them that were stopped, not killed.
        starts, stops = attrs.get("starts", []), attrs.get("stops", [])
        step = newest_checkpoint(self.folder.trial(trial.number))
        trial.set_user_attr("starts", [*starts, step])
        deaths = starts.count(step) - stops.count(step)
        return Claim(trial, part.point(params), attrs.get("seed", 0), lock, deaths)

    def _enqueue_missing(self, points: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Enqueues each part and params with all seeds; a killed program may have left some."""
        there = {_key(trial.user_attrs) for trial in self.trials()}
        for seed in range(self.sweep.seeds):
            for part, params in points:
                attrs = {"part": part, "params": params, "seed": seed}
                if _key(attrs) not in there:
                    self.study.enqueue_trial(params, user_attrs=attrs)


def distribution(axis: space.Axis, choices: Sequence[Any] | None) -> BaseDistribution:
    """Returns what Optuna draws an axis from; `choices`, of one without a range, over all parts."""
    if (ends := axis.range) is None:
        return CategoricalDistribution(choices or ())
    if ends.integer:
        return IntDistribution(int(ends.low), int(ends.high), log=ends.log)
    return FloatDistribution(ends.low, ends.high, log=ends.log)


def _suggest(trial: Trial, name: str, drawn_from: BaseDistribution) -> Any:
    if isinstance(drawn_from, FloatDistribution):
        return trial.suggest_float(name, drawn_from.low, drawn_from.high, log=drawn_from.log)
    if isinstance(drawn_from, IntDistribution):
        return trial.suggest_int(name, drawn_from.low, drawn_from.high, log=drawn_from.log)
    if isinstance(drawn_from, CategoricalDistribution):
        return trial.suggest_categorical(name, drawn_from.choices)
    raise TypeError(f"{name} has a {type(drawn_from).__name__}.")


def newest_checkpoint(run: Path) -> int:
    """Step of the newest checkpoint of a run folder, or 0."""
    return max((int(p.name) for p in run.glob("checkpoints/*") if p.name.isdecimal()), default=0)


def _name(number: int) -> str:
    return f"trial_{number:04d}"


def _key(attrs: dict[str, Any]) -> str:
    """The same for trials of one point and seed."""
    return json.dumps([attrs.get(name) for name in ("part", "params", "seed")], sort_keys=True)


def _sampler(sweep: Sweep, trials: int) -> optuna.samplers.BaseSampler:
    seed = 1_000_003 * sweep.sampler_seed + trials
    if sweep.sampler == "tpe":
        # Points still in training count as bad ones, so that workers do not all draw the same.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    if sweep.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=sweep.prune_after_trials)
    if sweep.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner()
    return optuna.pruners.NopPruner()

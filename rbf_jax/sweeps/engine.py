"""The parent of a sweep: has submitit run the workers, replaces those that die, shows the table.

It holds nothing that matters: workers take trials from the study by themselves, and go on when the
parent is killed. Called again, it starts only the workers that are missing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit

from rbf_jax.data.files import write_text
from rbf_jax.sweeps.study import SweepStudy
from rbf_jax.sweeps.sweep import Sweep, SweepFolder
from rbf_jax.sweeps.table import Display
from rbf_jax.sweeps.worker import Worker

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 1.0
# Saving a large state takes its time.
_SECONDS_TO_STOP = 120.0
# A worker that dies so often without having taken a trial will not do so the next time either.
_MAX_FAILED_STARTS = 3
# Parameters that submitit does not prefix by "slurm_".
_OF_ALL_EXECUTORS = ("timeout_min", "gpus_per_node", "cpus_per_task", "mem_gb")
_TEN_YEARS = 10 * 365 * 24 * 60  # Minutes: submitit's local jobs must have an end.


class WorkersFailed(Exception):
    """Workers die before they take a trial; the message says where to look."""


def run(folder: SweepFolder, *, retry: bool = False) -> SweepStudy:
    """Trains what is left of a sweep.

    Args:
      folder: settled, see `SweepFolder.settle`.
      retry: train the trials that have failed again, each from its start in a new folder.

    Returns:
      The study, all of whose trials have ended.

    Raises:
      WorkersFailed: no worker lives long enough to take a trial.
      KeyboardInterrupt: Ctrl-C; local workers have saved and ended, Slurm's go on.
      ValueError: the machine cannot run the workers as asked for.
    """
    study = SweepStudy(folder)
    pool = Pool(folder, study.sweep)
    if retry:
        study.retry_failed()
    with Display(study) as display, _interruptible():
        try:
            while study.unfinished():
                pool.fill(study)
                display.show()
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except KeyboardInterrupt:
            pool.stop()
            raise
        display.show()
    return study


class Pool:
    """The workers of one parent."""

    def __init__(self, folder: SweepFolder, sweep: Sweep):
        """Decides on the workers; starts none.

        Raises:
          ValueError: more local workers than GPUs, or no Slurm.
        """
        self._folder, self._sweep = folder, sweep
        gpus = visible_gpus() if sweep.executor == "local" else []
        if gpus and sweep.workers > len(gpus):
            raise ValueError(
                f"workers is {sweep.workers}; it must be at most {len(gpus)}, the number of GPUs."
            )
        self._workers = [
            Worker(folder.path, f"worker_{i}", gpus[i] if gpus else None)
            for i in range(sweep.workers or len(gpus) or 1)
        ]
        self._jobs: dict[str, Any] = {}
        self._begun: dict[str, int] = {}
        self._failed_starts = 0
        self._executor = _executor(folder.workers, sweep)

    def fill(self, study: SweepStudy) -> None:
        """Starts the workers that are missing, no more than there are trials for them.

        Raises:
          WorkersFailed: they die before they take a trial.
        """
        begun = sum(len(trial.user_attrs.get("starts", ())) for trial in study.trials())
        running = [w for w in self._workers if self._is_there(w, begun)]
        missing = [w for w in self._workers if w not in running]
        in_training = len(study.alive())
        about_to_take = max(0, len(running) - in_training)
        to_take = max(0, study.unfinished() - in_training - about_to_take)
        for worker in missing[:to_take]:
            self._begun[worker.name] = begun
            with _without_interrupts():
                self._jobs[worker.name] = self._executor.submit(worker)
            if self._sweep.executor == "slurm":
                job = self._jobs[worker.name].job_id
                logger.info("%s is job %s; scancel %s ends it.", worker.name, job, job)
                write_text(self._job_file(worker), job)

    def stop(self) -> None:
        """Has local workers save and end, those of a parent that was killed, too."""
        if self._sweep.executor == "slurm":
            logger.info("The jobs go on; the same command shows them again.")
            return
        for job in self._jobs.values():
            if not job.done():
                os.kill(int(job.job_id), signal.SIGTERM)  # Which submitit hands on to the worker.
        for worker in self._workers:
            if worker.name not in self._jobs and (process := self._folder.holder(worker.name)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
        end = time.monotonic() + _SECONDS_TO_STOP
        while time.monotonic() < end and not self._have_ended():
            time.sleep(0.1)

    def _have_ended(self) -> bool:
        return all(job.done() for job in self._jobs.values()) and not any(
            self._folder.is_locked(worker.name) for worker in self._workers
        )

    def _is_there(self, worker: Worker, begun: int) -> bool:
        """Whether a worker runs, or waits in Slurm's queue, whoever started it."""
        job = self._jobs.get(worker.name)
        if job is None and self._sweep.executor == "slurm" and self._job_file(worker).exists():
            job_id = self._job_file(worker).read_text(encoding="utf-8")
            job = submitit.SlurmJob(self._folder.workers, job_id)
            self._jobs[worker.name] = job
        if job is not None and not job.done():
            return True
        if self._folder.is_locked(worker.name):
            return True
        if job is not None and worker.name in self._begun:
            del self._jobs[worker.name]
            self._note_end(begun - self._begun.pop(worker.name), job)
        return False

    def _note_end(self, taken: int, job: Any) -> None:
        self._failed_starts = 0 if taken else self._failed_starts + 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise WorkersFailed(
                f"{self._failed_starts} workers have ended without taking a trial; "
                f"see {job.paths.stderr}"
            )

    def _job_file(self, worker: Worker) -> Path:
        return self._folder.workers / f"{worker.name}.job"


def visible_gpus() -> list[str]:
    """Names, for CUDA_VISIBLE_DEVICES, of the NVIDIA GPUs that this process may use."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    try:
        lines = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # No driver, no GPU.
        return []
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in lines))]


def _executor(folder: Path, sweep: Sweep) -> submitit.AutoExecutor:
    if sweep.executor == "slurm" and shutil.which("srun") is None:
        raise ValueError("executor is 'slurm', but there is no srun here; 'local' needs none.")
    executor = submitit.AutoExecutor(folder, cluster=sweep.executor)
    if sweep.executor == "local":
        executor.update_parameters(timeout_min=_TEN_YEARS)
        return executor
    for name, value in sweep.slurm.items():
        if value:
            asked = list(value) if name == "setup" else value
            executor.update_parameters(
                **{name if name in _OF_ALL_EXECUTORS else f"slurm_{name}": asked}
            )
    executor.update_parameters(name="sweep")
    return executor


def _without_interrupts() -> contextlib.AbstractContextManager[None]:
    """What starts here ignores the terminal's Ctrl-C: it is for the parent to pass on."""
    return _handled(signal.SIGINT, signal.SIG_IGN)


def _interruptible() -> contextlib.AbstractContextManager[None]:
    """SIGTERM is taken as Ctrl-C while the block runs."""
    return _handled(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def _handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Signals of a number go to `handler` while the block runs."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)

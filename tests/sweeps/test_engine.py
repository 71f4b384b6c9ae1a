import os
import signal
import subprocess
import sys
import time

import pytest

from configs import base
from configs.sweeps import base as sweep_base
from rbf_jax.sweeps import engine, space
from rbf_jax.sweeps.engine import Pool, WorkersFailed
from rbf_jax.sweeps.study import SweepStudy
from rbf_jax.sweeps.sweep import Sweep, SweepFolder
from tests.harness.runs import HANG


class Job:
    """Stands for submitit's; done when told so."""

    def __init__(self, folder, worker):
        self.worker, self.finished, self.job_id = worker, False, "7"
        self.paths = type("Paths", (), {"stderr": folder / "log.err"})

    def done(self):
        return self.finished


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a pool whose executor only notes what it is to start, and the study of 3 trials."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def make(**settings):
        folder = SweepFolder(tmp_path / "sweep")
        parts = space.parse(({"optimizer.learning_rate": (0.1, 0.2, 0.3)},))
        slurm = sweep_base.slurm().to_dict()
        sweep = Sweep(base.get_config().to_dict(), parts, **{"slurm": slurm, **settings})
        folder.settle(sweep)
        pool, started = Pool(folder, sweep), []

        class Executor:
            def submit(self, worker):
                started.append(Job(tmp_path, worker))
                return started[-1]

        pool._executor = Executor()
        return pool, SweepStudy(folder), started

    return make


def names(started):
    return [job.worker.name for job in started]


def test_no_more_workers_than_trials_and_none_twice(make):
    pool, study, started = make(workers=5)
    pool.fill(study)
    pool.fill(study)
    assert names(started) == ["worker_0", "worker_1", "worker_2"]


def test_one_that_died_is_replaced_while_there_is_work(make):
    pool, study, started = make(workers=2)
    pool.fill(study)
    with study.claim().lock:
        started[1].finished = True
        pool.fill(study)
        assert names(started) == ["worker_0", "worker_1", "worker_1"]


def test_workers_of_a_parent_that_was_killed_stay(make):
    pool, study, started = make(workers=2)
    with pool._folder.try_lock("worker_0"):
        pool.fill(study)
    assert names(started) == ["worker_1"]


def test_trials_in_training_elsewhere_need_no_worker(make):
    pool, study, started = make(workers=2)
    claims = [study.claim() for _ in range(3)]
    pool.fill(study)
    assert started == []
    claims.pop().lock.close()
    pool.fill(study)
    assert names(started) == ["worker_0"]
    for claim in claims:
        claim.lock.close()


def test_workers_that_never_take_a_trial_end_the_sweep(make):
    pool, study, started = make(workers=1)
    for _ in range(3):
        pool.fill(study)
        started[-1].finished = True
    with pytest.raises(WorkersFailed, match=r"3 workers have ended without .* see .*log\.err"):
        pool.fill(study)


def test_each_gpu_has_a_worker(make, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-abc")
    pool, _, _ = make()
    assert [worker.gpu for worker in pool._workers] == ["2", "GPU-abc"]
    with pytest.raises(ValueError, match="workers is 3; it must be at most 2, the number of GPUs"):
        make(workers=3)


def test_gpus_are_asked_of_the_driver(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    listing = "GPU 0: NVIDIA H100 (UUID: GPU-1)\n  MIG 1g (UUID: MIG-1)\nGPU 1: NVIDIA H100\n"
    done = subprocess.CompletedProcess((), 0, stdout=listing)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    assert engine.visible_gpus() == ["0", "1"]

    def missing(*arguments, **keywords):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert engine.visible_gpus() == []


def test_a_job_in_the_queue_of_slurm_is_not_submitted_again(make, monkeypatch):
    monkeypatch.setattr(engine.submitit.SlurmJob, "done", lambda self: False)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    pool, study, started = make(workers=2, executor="slurm")
    pool.fill(study)
    assert names(started) == ["worker_0", "worker_1"]
    pool, study, started = make(workers=2, executor="slurm")
    pool.fill(study)
    assert started == []


def test_without_slurm_it_cannot_be_asked(make):
    with pytest.raises(ValueError, match="there is no srun here"):
        make(executor="slurm")


def test_slurm_is_asked_for_what_the_sweep_file_says(make, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    slurm = sweep_base.slurm().to_dict() | {
        "partition": "gpu",
        "mem_gb": 32,
        "setup": ("module x",),
    }
    pool, _, _ = make(executor="slurm", slurm=slurm)
    executor = engine._executor(tmp_path / "jobs", pool._sweep)
    parameters = executor._executor.parameters
    text = executor._executor._make_submission_file_text("COMMAND", "uid")
    for line in ("--partition=gpu", "--gpus-per-node=1", "--cpus-per-task=8", "--mem=32GB"):
        assert f"#SBATCH {line}\n" in text, (text, parameters)
    assert "#SBATCH --time=1440\n" in text
    assert "\nmodule x\n" in text
    assert "account" not in text


HOLDER = """
import signal, sys, time
from rbf_jax.sweeps.sweep import SweepFolder
folder = SweepFolder(sys.argv[1])
lock = folder.try_lock("worker_0")
folder.sign(lock)
time.sleep(900)
"""


def test_workers_of_a_parent_that_was_killed_are_stopped_too(make):
    pool, _, _ = make(workers=2)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, pool._folder.path])
    while pool._folder.holder("worker_0") is None:
        time.sleep(0.05)
        assert process.poll() is None
    pool.stop()
    assert process.wait(HANG) == -signal.SIGTERM
    assert pool._folder.holder("worker_0") is None


def test_a_process_of_another_machine_is_not_touched(make, monkeypatch):
    pool, _, _ = make(workers=1)
    with pool._folder.try_lock("worker_0") as lock:
        pool._folder.sign(lock)
        assert pool._folder.holder("worker_0") == os.getpid()
        monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
        assert pool._folder.holder("worker_0") is None


def test_what_starts_ignores_the_terminals_interrupt():
    with engine._without_interrupts():
        process = subprocess.Popen(["sleep", str(HANG)])
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

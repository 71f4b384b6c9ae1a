import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import sweep as program
from rbf_jax.sweeps.study import newest_checkpoint
from tests.experiments.conftest import REPOSITORY
from tests.harness.runs import HANG, environment

SMOKE = "--config=configs/sweeps/smoke.py"
STEPS = 40
COMPLETE = 1  # As Optuna's journal has it.


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def parse(*arguments):
    return program.parse(["sweep", *arguments])


def write_sweep(folder, text):
    path = folder / "mine.py"
    path.write_text(
        "from configs.sweeps import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    config.base = 'configs/smoke.py'\n"
        f"    {text}\n"
        "    return config\n"
    )
    return f"--config={path}"


def test_the_sweep_file_and_the_command_line():
    sweep, folder, retry = parse(
        SMOKE, "--config.workers=3", "--base.train.steps=7", "--config.seeds=2"
    )
    assert folder == Path("runs/sweeps/smoke")
    assert not retry
    assert parse(SMOKE, "--retry")[2]
    assert (sweep.workers, sweep.base["train"]["steps"], sweep.num_trials) == (3, 7, 8)
    assert parse(SMOKE, "--sweep=x/y")[1] == Path("x/y")


@pytest.mark.parametrize(
    ("name", "trials"),
    [("smoke", 4), ("learning_rate", 84), ("ablation", 4 * (10 + 9 + 4 + 5 + 3))],
)
def test_sweeps_are_ready_to_run(name, trials):
    sweep, *_ = parse(f"--config=configs/sweeps/{name}.py")
    assert sweep.num_trials == trials


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config.sead = 3", "sead"),
        ("config.seeds = 'x'", "seeds"),
        ("config.base = ''", "base is missing"),
        ("pass", "space is empty"),
        ("config.space = ({'model.num_layer': (1, 2)},)", "did you mean model.num_layers"),
        ("config.space = ({'model.num_layers': (1, 'x')},)", "model.num_layers is 'x'"),
        ("config.space = ({'model.positions': ('rope', 'ropes')},)", "did you mean 'rope'"),
        ("config.space = ({'model.num_layers': (1, 2), 'model.d_model': (8,)},)", "same number"),
        ("config.space = ({'seed': (1, 2)},)", "config.seeds"),
        ("config.space = ({'model.num_layers': base.linear_range(1, 4)},)", "is a range"),
        (
            "config.space = {'a': ({'model.d_model': (16, 15)},)}",
            "model.d_model=15: num_heads=2 must divide d_model=15",
        ),
        (
            "config.sampler, config.space = 'tpe', ({'optimizer.learning_rate': "
            "base.log_range(1e-5, 1e-2)},)",
            "trials is 0",
        ),
        (
            "config.sampler, config.trials, config.space = 'tpe', 4, ({'optimizer.learning_rate': "
            "base.log_range(1e-6, 1e-2)},)",
            "final_learning_rate is 1e-05",
        ),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, text, message, capsys):
    assert program.main(["sweep", write_sweep(tmp_path, text), f"--sweep={tmp_path / 's'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("sweep: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.wokers=2", "did you mean workers"),
        ("--base.train.step=2", "did you mean train.steps"),
        ("--swep=x", "Did you mean: sweep"),
        ("--config.base=configs/smok.py", "did you mean configs/smoke.py"),
    ],
)
def test_a_wrong_argument_is_one_line(argument, message, capsys):
    assert program.main(["sweep", SMOKE, argument]) == 2
    assert message in capsys.readouterr().err


class Program:
    """The program, running a sweep of four trials in a folder of its own."""

    def __init__(self, folder, corpus):
        self.sweep = folder / "sweep"
        self.arguments = [
            SMOKE,
            f"--sweep={self.sweep}",
            "--config.workers=2",
            "--base.data.source=text",
            f"--base.data.train_files={corpus / 'stories.txt'}",
            f"--base.data.cache_dir={corpus / 'cache'}",
            "--base.data.context_length=16",
            f"--base.train.steps={STEPS}",
            "--base.train.log_every=4",
            "--base.train.eval_every=20",
            "--base.train.checkpoint_every=5",
        ]

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.sweep", *self.arguments],
            env=environment(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def runs(self):
        return sorted((self.sweep / "trials").glob("*"))

    def in_training(self, least_step):
        """Run folders that have saved a step from `least_step` on and have not finished."""
        open_ones = [run for run in self.runs() if not (run / "summary.json").exists()]
        return [run for run in open_ones if newest_checkpoint(run) >= least_step]

    def wait_until(self, condition):
        end = time.monotonic() + HANG
        while not condition():
            assert time.monotonic() < end
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.02)

    def worker(self, run):
        """The process that took a run last."""
        return int(re.findall(r"taken by \w+, process (\d+)", (run / "log.txt").read_text())[-1])

    def kill_worker(self, run):
        with contextlib.suppress(ProcessLookupError):  # Which was killed before.
            os.kill(self.worker(run), signal.SIGKILL)

    def told(self):
        """Numbers of the trials that were told to be complete, one a time."""
        lines = (self.sweep / "study.journal").read_text().splitlines()
        return sorted(
            line["trial_id"] for line in map(json.loads, lines) if line.get("state") == COMPLETE
        )


@pytest.fixture
def sweep(tmp_path, corpus):
    program = Program(tmp_path, corpus)
    program.start()
    yield program
    program.process.kill()
    program.process.communicate()


def test_a_sweep_killed_again_and_again_trains_each_trial_once(sweep):
    sweep.wait_until(lambda: sweep.in_training(5))
    interrupted = {sweep.in_training(5)[0]}
    sweep.kill_worker(*interrupted)
    sweep.wait_until(lambda: sweep.told() and sweep.in_training(10))

    sweep.process.kill()
    sweep.process.communicate()
    for run in sweep.in_training(1):  # Its worker would go on without the parent.
        sweep.kill_worker(run)
    interrupted |= set(sweep.in_training(5))
    finished = {run: (run / "summary.json").stat().st_mtime_ns for run in done(sweep)}

    sweep.start()
    output = sweep.process.communicate(timeout=HANG)[0]
    assert sweep.process.returncode == 0, output
    assert "4 trials: 4 finished; best " in output
    assert sweep.told() == [0, 1, 2, 3]
    assert len(done(sweep)) == len(sweep.runs()) == 4
    for run, time_ns in finished.items():
        assert (run / "summary.json").stat().st_mtime_ns == time_ns
    for run in sweep.runs():
        assert_trained_once(run, interrupted=run in interrupted)


def done(sweep):
    return [run for run in sweep.runs() if (run / "summary.json").exists()]


def assert_trained_once(run, *, interrupted):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for split, every in (("train", 4), ("valid", 20)):
        steps = [line["step"] for line in lines if line["split"] == split]
        first = [1] if split == "train" else []
        assert steps == [*first, *range(every, STEPS + 1, every)]
    log = (run / "log.txt").read_text()
    assert log.count(f"step 1 of {STEPS}") == 1
    assert (log.count("Going on from the checkpoint of step") > 0) == interrupted


def test_an_interrupted_sweep_leaves_no_worker(sweep):
    sweep.wait_until(lambda: sweep.in_training(5))
    (run, *_) = sweep.in_training(5)
    sweep.process.send_signal(signal.SIGINT)
    output = sweep.process.communicate(timeout=HANG)[0]
    assert sweep.process.returncode == 130, output
    assert "the same command goes on" in output
    with pytest.raises(ProcessLookupError):
        os.kill(sweep.worker(run), 0)
    assert "stopped by a signal after step" in (run / "log.txt").read_text()

import math
import multiprocessing
import threading
from typing import ClassVar

import optuna
import pytest
from optuna.trial import TrialState

from rbf_jax.sweeps import space
from rbf_jax.sweeps.study import SweepStudy
from rbf_jax.sweeps.sweep import Sweep, SweepFolder
from tests.harness.runs import HANG

LR, KIND = "optimizer.learning_rate", "model.attention.kind"
BASE = {"seed": 0, "optimizer": {"learning_rate": 0.1}, "model": {"attention": {"kind": "rbf"}}}
GRID = ({LR: (0.1, 0.2)}, {KIND: ("rbf", "dot")})
RANGE = ({LR: {"low": 0.01, "high": 1.0, "log": True}}, {KIND: ("rbf", "dot")})


class Study(SweepStudy):
    """Closes the locks of what was claimed at the end of a test."""

    claims: ClassVar[list] = []

    def claim(self):
        claim = super().claim()
        if claim is not None:
            self.claims.append(claim)
        return claim


@pytest.fixture
def make(tmp_path):
    def make(given=GRID, **settings):
        folder = SweepFolder(tmp_path / "sweep")
        folder.settle(Sweep(base=BASE, parts=space.parse(given), **settings))
        return Study(folder)

    yield make
    while Study.claims:
        Study.claims.pop().lock.close()


def finish(study, claim, value=1.0):
    study.study.tell(claim.trial, value)
    claim.lock.close()


def test_each_point_and_seed_of_a_grid_is_claimed_once(make):
    study = make(seeds=2)
    claims = [study.claim() for _ in range(8)]
    assert study.claim() is None
    found = [(claim.point.values[LR], claim.point.values[KIND], claim.seed) for claim in claims]
    assert len(set(found)) == 8
    assert [claim.trial.number for claim in claims] == list(range(8))


def test_opening_again_adds_what_is_missing_and_no_more(make, monkeypatch):
    enqueue, calls = optuna.Study.enqueue_trial, []

    def killed_after_three(self, *arguments, **keywords):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(enqueue(self, *arguments, **keywords))

    with monkeypatch.context() as patched:
        patched.setattr(optuna.Study, "enqueue_trial", killed_after_three)
        with pytest.raises(KeyboardInterrupt):
            make()
    for _ in range(2):
        study = make()
        params = [tuple(trial.user_attrs["params"].values()) for trial in study.trials()]
        assert params == [(0.1, "rbf"), (0.1, "dot"), (0.2, "rbf"), (0.2, "dot")]


def test_a_point_of_two_parts_is_trained_once(make):
    study = make({"a": ({LR: (0.1, 0.2)},), "b": ({KIND: ("rbf", "dot")},)})
    assert study.sweep.num_trials == len(study.trials()) == 3
    claims = [study.claim() for _ in range(3)]
    assert [claim.point.part for claim in claims] == ["a", "a", "b"]


def test_a_trial_whose_worker_is_gone_is_taken_up_before_new_ones(make):
    study, other = make(), make()
    first, second = study.claim(), other.claim()
    assert (first.trial.number, second.trial.number) == (0, 1)
    assert study.alive() == {0, 1}
    second.lock.close()  # As the end of its process does.
    assert study.alive() == {0}
    again = study.claim()
    assert again.trial.number == 1
    assert again.point == second.point
    assert study.claim().trial.number == 2


def test_a_trial_that_ends_while_another_worker_looks_for_one_is_not_taken(make, monkeypatch):
    study, other = make(), make()
    first, lock = other.claim(), study.folder.try_lock

    def finished_meanwhile(name):
        if name == "trial_0000" and not first.lock.closed:
            finish(other, first)
        return lock(name)

    monkeypatch.setattr(study.folder, "try_lock", finished_meanwhile)
    assert study.claim().trial.number == 1
    assert study.trials()[0].state == TrialState.COMPLETE


def test_deaths_count_until_there_is_a_new_checkpoint(make):
    study = make()
    deaths = []
    for step in (0, 0, 0, 5, 5):
        if step:
            folder = study.folder.trial(0) / "checkpoints" / str(step)
            folder.mkdir(parents=True, exist_ok=True)
        claim = study.claim()
        deaths.append(claim.deaths)
        claim.lock.close()
    assert deaths == [0, 1, 2, 0, 1]


def test_one_killed_between_drawing_and_training_leaves_its_point(make, monkeypatch):
    study = make(RANGE, sampler="random", trials=2)

    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(study.folder, "try_lock", killed)
        with pytest.raises(Killed):
            study.claim()
    again = study.claim()
    assert again.trial.number == 0
    assert set(again.point.params) == {"learning_rate", "kind"}
    assert study.claim().trial.number == 1
    assert study.claim() is None


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_drawn_points_have_all_seeds(make, sampler):
    study = make(RANGE, sampler=sampler, trials=14, seeds=2)
    found = {}
    while (claim := make(RANGE, sampler=sampler, trials=14, seeds=2).claim()) is not None:
        found.setdefault(claim.point.params["learning_rate"], []).append(claim.seed)
        assert 0.01 <= claim.point.values[LR] <= 1.0
        finish(study, claim, abs(math.log(claim.point.values[LR])))
    assert list(found.values()) == [[0, 1]] * 14
    assert study.unfinished() == 0


def test_seeds_of_a_drawn_point_are_enqueued_once(make):
    study = make(RANGE, sampler="random", trials=1, seeds=3)
    for _ in range(2):
        claim = study.claim()
        assert (claim.trial.number, claim.seed) == (0, 0)
        claim.lock.close()
    assert [trial.user_attrs["seed"] for trial in study.trials()] == [0, 1, 2]


@pytest.mark.parametrize("settings", [{}, {"given": RANGE, "sampler": "random", "trials": 3}])
def test_failed_trials_have_others_in_their_place_if_asked_for(make, settings):
    study, failed = make(seeds=2, **settings), []
    while (claim := study.claim()) is not None:
        if claim.trial.number in (0, 3):
            failed.append((claim.point, claim.seed))
            study.study.tell(claim.trial, state=TrialState.FAIL)
        else:
            finish(study, claim)
    before = len(study.trials())
    assert study.unfinished() == 0

    study.retry_failed()
    assert study.unfinished() == 2
    assert len(study.trials()) == before
    again = [study.claim(), study.claim()]
    assert [(claim.point, claim.seed) for claim in again] == failed
    assert [claim.trial.number for claim in again] == [before, before + 1]
    assert study.claim() is None
    for claim in again:
        finish(study, claim)
    study.retry_failed()
    assert study.unfinished() == 0


def test_half_a_line_of_a_killed_writer_is_removed(make):
    study = make()
    with study.folder.journal.open("ab") as journal:
        journal.write(b'{"op_code": 5, "trial')
    claim = study.claim()
    finish(study, claim)
    assert make().trials()[0].state == TrialState.COMPLETE


def _claim_all(folder, queue):
    study, numbers = SweepStudy(SweepFolder(folder)), []
    while (claim := study.claim()) is not None:
        numbers.append(claim.trial.number)
        finish(study, claim)
    queue.put(numbers)


def test_processes_share_the_trials(make):
    study = make(seeds=5)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (study.folder.path, queue)
    processes = [context.Process(target=_claim_all, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    numbers = [number for _ in processes for number in queue.get(timeout=HANG)]
    for process in processes:
        process.join()
    assert sorted(numbers) == list(range(20))


def test_a_trial_is_taken_under_the_lock_of_the_study(make):
    study, claimed = make(), []
    thread = threading.Thread(target=lambda: claimed.append(study.claim()))
    with study.folder.locked("study"):  # As another worker that takes one has it.
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert not claimed
    thread.join(HANG)
    assert [claim.trial.number for claim in claimed] == [0]


def test_another_sweep_in_the_folder_is_an_error(make, tmp_path):
    make()
    make(workers=3)
    with pytest.raises(ValueError, match=r"holds another sweep; .* Different: parts"):
        make(({LR: (0.1,)},))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty and holds no sweep"):
        SweepFolder(tmp_path / "full").settle(make().sweep)
    with pytest.raises(ValueError, match=r"no sweep.json is in it"):
        SweepStudy(SweepFolder(tmp_path / "full"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "bayes"}, "sampler is 'bayes'; it must be one of grid, random, tpe"),
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        ({"trials": 3}, "trials is 3; with sampler 'grid'"),
        ({"sampler": "tpe"}, "needs the number of points"),
    ],
)
def test_errors_of_settings(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)

import shutil

import jax
import jax.numpy as jnp
import pytest

from rbf_jax.training.checkpoint import CheckpointError, Checkpoints, best_step, find_step
from rbf_jax.training.state import TrainState


def make_state(step):
    params = {"a": jnp.linspace(0, step, 12).reshape(3, 4)}
    return TrainState(jnp.int32(step), params, {"mu": jnp.float32(step)}, jnp.int32(0))


@pytest.fixture
def open_checkpoints(tmp_path):
    opened = []

    def open_them(keep=2, data="data"):
        opened.append(Checkpoints(tmp_path / "saved", keep=keep, data_fingerprint=data))
        return opened[-1]

    yield open_them
    for checkpoints in opened:
        checkpoints.close()


def save_steps(checkpoints, steps, losses=()):
    checkpoints.losses.update(losses)
    for step in steps:
        checkpoints.save(make_state(step), 10.0 * step)
    checkpoints.wait()


def test_state_and_seconds_come_back(open_checkpoints):
    assert open_checkpoints().restore_newest(make_state(0)) is None
    save_steps(open_checkpoints(), [3, 7])
    restored, seconds = open_checkpoints().restore_newest(make_state(0))
    assert seconds == 70.0
    for actual, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(make_state(7))):
        assert actual.dtype == expected.dtype
        assert (actual == expected).all()


def test_a_step_is_saved_once(open_checkpoints):
    checkpoints = open_checkpoints()
    save_steps(checkpoints, [3, 3])
    assert checkpoints.steps == [3]


def test_newest_and_best_are_kept(open_checkpoints):
    losses = {2: 0.5, 4: 0.1, 6: 0.3, 8: 0.2}
    save_steps(open_checkpoints(), [2, 4, 6], losses)
    assert open_checkpoints().steps == [4, 6]
    reopened = open_checkpoints()
    # A step without a validation loss, as after a signal, is none of the best.
    save_steps(reopened, [8, 9, 10], losses)
    assert open_checkpoints().steps == [4, 9, 10]


def test_best_step():
    assert best_step([1, 2, 3, 4], {1: 0.5, 3: 0.2, 4: 0.2, 7: 0.0}) == 3
    assert best_step([1, 2], {7: 0.0}) is None


def damage(folder, how):
    if how == "half a file":
        for file in (folder / "params").glob("**/d/*"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "no parameters":
        shutil.rmtree(folder / "params")
    elif how == "no digest":
        (folder / "about" / "metadata").write_text('{"data": "data"}')
    elif how == "another digest":
        about = folder / "about" / "metadata"
        about.write_text(about.read_text().replace('"rest": ', '"rest": 1'))
    else:
        (folder / "about" / "metadata").write_text("{")


@pytest.mark.parametrize(
    "how", ["half a file", "no parameters", "no digest", "another digest", "half a line"]
)
def test_the_one_before_a_bad_one_is_used(how, open_checkpoints, tmp_path, caplog):
    save_steps(open_checkpoints(), [3, 7])
    damage(tmp_path / "saved" / "7", how)
    checkpoints = open_checkpoints()
    restored, seconds = checkpoints.restore_newest(make_state(0))
    assert int(restored.step) == 3
    assert seconds == 30.0
    assert "saved/7 cannot be used" in caplog.text
    # It makes room, and nothing is lost.
    assert checkpoints.steps == [3]
    assert (tmp_path / "bad_checkpoints" / "7").is_dir()
    save_steps(checkpoints, [7])
    assert int(open_checkpoints().restore_newest(make_state(0))[0].step) == 7


def test_none_good_is_an_error(open_checkpoints, tmp_path):
    save_steps(open_checkpoints(), [3, 7])
    for step in ("3", "7"):
        damage(tmp_path / "saved" / step, "no parameters")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*saved is good: 7: .*; 3: "):
        open_checkpoints().restore_newest(make_state(0))
    assert open_checkpoints().steps == [3, 7]


def test_other_data_is_an_error(open_checkpoints):
    save_steps(open_checkpoints(), [3])
    with pytest.raises(CheckpointError, match="has changed since the checkpoint of step 3"):
        open_checkpoints(data="other").restore_newest(make_state(0))


def test_a_write_that_was_killed_is_cleaned_up(open_checkpoints, tmp_path):
    save_steps(open_checkpoints(), [3])
    half = tmp_path / "saved" / "5.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "saved" / "3", half)
    checkpoints = open_checkpoints()
    assert checkpoints.steps == [3]
    save_steps(checkpoints, [7])
    assert checkpoints.steps == [3, 7]
    assert not half.exists()


def test_find_step(open_checkpoints, tmp_path):
    save_steps(open_checkpoints(), [3, 7])
    folder = tmp_path / "saved"
    assert find_step(folder, None, {3: 0.1}) == find_step(folder, "last", {3: 0.1}) == 7
    assert find_step(folder, 3, {}) == 3
    assert find_step(folder, "best", {3: 0.1, 7: 0.2}) == 3
    with pytest.raises(CheckpointError, match="no checkpoint 'best'; it holds 3, 7"):
        find_step(folder, "best", {})
    for wrong in ("banana", "3", 3.0, True):
        with pytest.raises(ValueError, match=f"checkpoint is {wrong!r}; it must be a step, 'best'"):
            find_step(folder, wrong, {3: 0.1, 7: 0.2})
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        find_step(tmp_path / "missing", None, {})

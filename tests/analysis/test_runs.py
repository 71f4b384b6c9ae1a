import json

import numpy as np
import pytest

from rbf_jax.analysis.runs import read_run, read_runs
from tests.harness.synthetic import make_config, write_run


def train_row(step, **values):
    return {"step": step, "split": "train", **values}


def valid_row(step, **values):
    return {"step": step, "split": "valid", **values}


def test_columns(tmp_path):
    rows = [
        train_row(10, loss=3.0, grad_norm=1.0, seconds=1.0, **{"gamma/block_0": [0.1, 0.2]}),
        train_row(20, loss=2.0, seconds=5.0, **{"gamma/block_0": [0.3, 0.4]}),
        valid_row(20, loss=2.5),
    ]
    run = read_run(write_run(tmp_path / "a", rows))
    assert run.name == "a"
    assert run.last_step == 20
    assert run.finished
    np.testing.assert_array_equal(run.train["step"], [10, 20])
    np.testing.assert_array_equal(run.train["loss"], [3.0, 2.0])
    np.testing.assert_array_equal(run.train["grad_norm"], [1.0, np.nan])
    np.testing.assert_array_equal(run.train["gamma/block_0"], [[0.1, 0.2], [0.3, 0.4]])
    np.testing.assert_array_equal(run.valid["loss"], [2.5])


def test_a_head_metric_missing_in_a_line_is_nan(tmp_path):
    rows = [train_row(1, gamma=[0.1, 0.2]), train_row(2, loss=1.0), train_row(3, gamma=None)]
    run = read_run(write_run(tmp_path / "a", rows))
    np.testing.assert_array_equal(run.train["gamma"], [[0.1, 0.2], [np.nan] * 2, [np.nan] * 2])


def test_validation_gets_the_training_time_of_its_step(tmp_path):
    rows = [train_row(10, seconds=4.0), train_row(20, seconds=8.0)]
    rows += [valid_row(step, loss=1.0) for step in (0, 5, 15, 20)]
    run = read_run(write_run(tmp_path / "a", rows))
    np.testing.assert_allclose(run.valid["seconds"], [0.0, 2.0, 6.0, 8.0])


def test_of_two_lines_of_one_step_the_later_counts(tmp_path):
    rows = [train_row(1, loss=9.0), train_row(2, loss=8.0), train_row(1, loss=7.0)]
    run = read_run(write_run(tmp_path / "a", rows))
    np.testing.assert_array_equal(run.train["loss"], [7.0, 8.0])


@pytest.mark.parametrize(
    "rest", ['{"step": 3, "spl', '{"step": 3, "split": "train", "loss": "\xe4']
)
def test_a_truncated_last_line_is_left_out(tmp_path, rest):
    folder = write_run(tmp_path / "a", [train_row(1, loss=3.0), train_row(2, loss=2.0)])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(rest.encode()[:-1])
    np.testing.assert_array_equal(read_run(folder).train["step"], [1, 2])


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    folder = write_run(tmp_path / "a", [train_row(1, loss=3.0)])
    metrics = folder / "metrics.jsonl"
    metrics.write_text('{"step": 1, "sp\n' + metrics.read_text())
    with pytest.raises(ValueError, match=r"metrics.jsonl line 1 is not JSON"):
        read_run(folder)
    metrics.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match=r"line 1 must be a JSON object with a step"):
        read_run(folder)


def test_a_run_of_before_there_were_sinks(tmp_path):
    config = make_config()
    config["model"]["attention"]["origin_sink"] = True
    del config["model"]["attention"]["sink"]
    model = read_run(write_run(tmp_path / "a", config=config)).config["model"]
    assert (model["attention"]["sink"], model["num_registers"]) == ("origin", 1)
    assert "origin_sink" not in model["attention"]


def test_a_run_without_summary_has_not_finished(tmp_path):
    run = read_run(write_run(tmp_path / "a", summary=False))
    assert not run.finished
    assert run.summary == {}


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run folder .*/a does not exist"):
        read_run(tmp_path / "a")
    folder = tmp_path / "a"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        read_run(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json must hold a JSON object, not list"):
        read_run(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        read_run(folder)
    (folder / "config.json").write_text('{"seed": 0, "data": {}, "train": {}}')
    with pytest.raises(ValueError, match=r"config.json must hold 'model'"):
        read_run(folder)
    (folder / "config.json").write_text(json.dumps(make_config()))
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl does not exist"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl holds no metrics yet"):
        read_run(folder)


def test_names_are_the_shortest_ends_that_differ(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("x/one/rbf", "x/two/rbf", "x/two/dot")]
    assert [run.name for run in read_runs(folders[1:])] == ["rbf", "dot"]
    assert [run.name for run in read_runs(folders)] == ["one/rbf", "two/rbf", "two/dot"]


def test_two_different_runs_are_needed(tmp_path):
    folder = write_run(tmp_path / "a")
    with pytest.raises(ValueError, match=r"must name two or more run folders"):
        read_runs([folder])
    with pytest.raises(ValueError, match=r"names .*/a twice"):
        read_runs([folder, tmp_path / "b" / ".." / "a"])
    with pytest.raises(ValueError, match=r"must be paths of run folders"):
        read_runs([folder, ""])


def test_tokenizer_digest(tmp_path):
    a, b, c, d = (write_run(tmp_path / name) for name in "abcd")
    (b / "tokenizer.json").write_text("another")
    (c / "tokenizer.json").unlink()
    (d / "tokenizer.json").unlink()
    (d / "config.json").write_text(json.dumps(make_config(data__tokenizer="bpe")))
    digests = [read_run(folder).tokenizer for folder in (a, b, c, d)]
    assert len(set(digests)) == 4
    assert read_run(write_run(tmp_path / "e")).tokenizer == digests[0]

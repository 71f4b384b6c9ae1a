import math
import re

import numpy as np
import pytest

from rbf_jax.analysis.comparison import MISSING, compare, config_differences, steps_to_reach
from rbf_jax.analysis.runs import read_runs
from tests.harness.synthetic import STEPS, make_config, make_rows, write_run


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (3.0, 100.0),  # Exactly at a validation.
        (2.5, 150.0),  # Between two.
        (2.2, 180.0),
        (2.0, 200.0),
        (1.75, 350.0),  # Behind a validation that went up again.
        (4.0, 0.0),  # At once.
        (9.0, 0.0),
        (1.0, None),
        (math.nan, None),
    ],
)
def test_steps_to_reach(target, expected):
    steps, losses = np.array([0.0, 100, 200, 300, 400]), np.array([4.0, 3.0, 2.0, 2.0, 1.5])
    assert steps_to_reach(steps, losses, target) == expected


def test_steps_to_reach_takes_the_first_crossing():
    assert steps_to_reach(np.array([0.0, 10, 20, 30]), np.array([4.0, 2.0, 5.0, 1.0]), 3.0) == 5.0
    assert steps_to_reach(np.array([]), np.array([]), 3.0) is None


def test_config_differences_are_the_keys_that_differ_and_nothing_else():
    a = {"seed": 0, "model": {"x": 1, "attention": {"kind": "rbf", "gamma": None}}, "only": [1]}
    b = {"seed": 0, "model": {"x": 1, "attention": {"kind": "dot", "gamma": None}}}
    differences = config_differences([a, b])
    assert differences == {"model.attention.kind": ["rbf", "dot"], "only": [[1], MISSING]}
    assert config_differences([a, a]) == {}


@pytest.fixture
def twins(tmp_path):
    write_run(tmp_path / "rbf", make_rows(slope=0.015))
    config = make_config(model__attention__kind="dot")
    write_run(tmp_path / "dot", make_rows(slope=0.01), config)
    return tmp_path


def test_compare(twins):
    comparison = compare(read_runs([twins / "rbf", twins / "dot"]))
    assert comparison.metric == "loss"
    assert comparison.warnings == []
    assert comparison.differences == {"model.attention.kind": ["rbf", "dot"]}
    rbf, dot = comparison.results
    assert rbf["valid_loss"] == pytest.approx(1 + 2 * math.exp(-3))
    assert rbf["best_valid_loss"] == rbf["valid_loss"]
    assert rbf["best_step"] == STEPS
    assert rbf["valid_bits_per_byte"] == pytest.approx(rbf["valid_loss"] / math.log(2))
    assert rbf["valid_perplexity"] == pytest.approx(math.exp(rbf["valid_loss"]))
    assert rbf["tokens_per_second"] == 1234.5  # The summary's, not the metrics'.
    assert (rbf["parameters"], rbf["device"], rbf["seed"]) == (123_456, "cpu", 0)
    (own, other), (reached, last) = comparison.steps_to_reach
    # exp(−0.015 s) = exp(−0.01 · 200) at s = 133.3; between validations the chord lies above.
    assert 133.3 < other < 135
    assert reached is None
    assert own == last == STEPS
    assert dot["valid_loss"] > rbf["valid_loss"]


def test_best_is_not_last(tmp_path):
    rows = [{"step": s, "split": "valid", "loss": v} for s, v in ((1, 3.0), (2, 1.0), (3, 2.0))]
    folders = [write_run(tmp_path / name, rows) for name in "ab"]
    result = compare(read_runs(folders)).results[0]
    assert (result["best_valid_loss"], result["best_step"]) == (1.0, 2)
    assert result["valid_loss"] == 2.0
    assert result["valid_bits_per_byte"] is None


def test_a_run_that_goes_on_is_compared_as_far_as_it_is(twins):
    rows = [row for row in make_rows() if row["split"] == "train" and row["step"] <= 40]
    write_run(twins / "young", rows, summary=False)
    comparison = compare(read_runs([twins / "rbf", twins / "young"]))
    young = comparison.results[1]
    assert young["step"] == 40
    assert young["valid_loss"] is young["best_step"] is young["parameters"] is None
    assert young["tokens_per_second"] == 1000.0
    assert young["seconds"] == 20.0
    assert comparison.steps_to_reach[1] == [None, None]
    assert comparison.steps_to_reach[0][1] is None
    assert comparison.warnings == [
        "Run young has not ended: it is at step 40 of 200.",
        "Run young has no validation loss yet.",
    ]


def test_other_tokens_are_compared_by_bits_per_byte(twins):
    (twins / "dot" / "tokenizer.json").write_text("another")
    comparison = compare(read_runs([twins / "rbf", twins / "dot"]))
    assert comparison.metric == "bits_per_byte"
    assert "bits per byte are compared instead" in comparison.warnings[0]
    assert 133.3 < comparison.steps_to_reach[0][1] < 135


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"data__source": "text"}, "validated on different texts"),
        ({"data__train_files": ["other.txt"]}, "validated on different texts"),
        ({"data__context_length": 128}, "Context lengths differ"),
        ({"data__layout": "padded"}, "Data layouts differ"),
        ({"train__eval_batches": 4}, r"different numbers of rows.*\(rbf: all, other: 32\)"),
        ({"train__steps": 300}, "Numbers of steps differ"),
    ],
)
def test_what_limits_the_comparison_is_said(twins, changes, warning):
    write_run(twins / "other", config=make_config(**changes))
    warnings = compare(read_runs([twins / "rbf", twins / "other"])).warnings
    assert len(warnings) == 1
    assert re.search(warning, warnings[0])


def test_rows_evaluated_count_whatever_the_batches(tmp_path):
    for name, batches, size, micro in (("a", 4, 8, 1), ("b", 2, 32, 2)):
        config = make_config(train__eval_batches=batches, train__batch_size=size)
        config["optimizer"] = {"accumulate_steps": micro}
        write_run(tmp_path / name, config=config)
    assert compare(read_runs([tmp_path / "a", tmp_path / "b"])).warnings == []


def test_same_validation_files_are_the_same_text(tmp_path):
    for name in "ab":
        config = make_config(data__valid_files=["v.txt"], data__train_files=[name])
        write_run(tmp_path / name, config=config)
    assert compare(read_runs([tmp_path / "a", tmp_path / "b"])).warnings == []

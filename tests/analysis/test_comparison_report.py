import datetime
import json

import numpy as np
import pytest

from rbf_jax.analysis import comparison_report
from rbf_jax.analysis.comparison import compare
from rbf_jax.analysis.diagnostics import Inside
from rbf_jax.analysis.models import Findings
from rbf_jax.analysis.runs import read_runs
from tests.harness.synthetic import make_config, make_rows, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "rbf", make_rows(slope=0.015))
    write_run(folder / "dot", make_rows(slope=0.01), make_config(model__attention__kind="dot"))
    return read_runs([folder / "rbf", folder / "dot"])


@pytest.fixture(scope="module")
def comparison(runs):
    return compare(runs)


def findings():
    inside = Inside(np.full((1, 1, 1, 2, 3), 1 / 3), np.ones((1, 1, 3, 1)))
    norms = np.random.default_rng(0).normal(5, 1, (1, 50))
    return Findings(1200, inside, ["a", "b"], norms, np.ones((1, 1)))


def as_dict(rows):
    return {label: values for label, *values in rows}


def test_result_rows(runs, comparison):
    rows = comparison_report.result_rows(runs, comparison)
    assert rows[0] == ["", "rbf", "dot"]
    assert {len(row) for row in rows} == {3}
    table = as_dict(rows)
    assert table["attention"] == ["RBF", "dot product"]
    assert table["step"] == ["200", "200"]
    assert table["validation loss (nats per token)"] == ["1.0996", "1.2707"]
    assert table["minus that of rbf"] == ["", "+0.1711"]
    assert table["best at step"] == ["200", "200"]
    assert table["bits per byte"] == ["1.5864", "1.8332"]
    assert table["step that reaches rbf's final validation loss"] == ["200", "not reached"]
    assert table["step that reaches dot's final validation loss"] == ["134", "200"]
    assert table["tokens per second"] == ["1,234"] * 2
    assert table["training time (h:mm:ss)"] == ["0:01:40"] * 2
    assert table["parameters"] == ["123,456"] * 2
    assert table["versions"] == ["python 3.11, jax 0.10.2"] * 2
    assert table["date"] == ["2026-01-01 00:00 UTC"] * 2


def test_what_a_young_run_does_not_know_yet_is_left_open(tmp_path):
    rows = [{"step": s, "split": "valid", "loss": 2.0 - s / 200} for s in (100, 200)]
    write_run(tmp_path / "a", [*rows, {"step": 200, "split": "valid", "loss": 3.0}])
    write_run(tmp_path / "b", [{"step": 5, "split": "train", "loss": 9.0}], summary=False)
    write_run(tmp_path / "c", rows[:1])
    young = read_runs([tmp_path / name for name in "abc"])
    table = as_dict(comparison_report.result_rows(young, compare(young)))
    assert table["step"] == ["200", "5 of 200, not ended", "100"]
    assert table["validation loss (nats per token)"] == ["3.0000", "—", "1.5000"]
    assert table["minus that of a"] == ["", "—", "-1.5000"]
    assert table["parameters"][1] == table["date"][1] == table["versions"][1] == "—"
    # Run a was below its last loss from the start; run b has nothing to reach.
    assert table["step that reaches a's final validation loss"] == ["≤ 100", "—", "≤ 100"]
    assert "step that reaches b's final validation loss" not in table


def test_sections(runs, comparison):
    parts = comparison_report.sections(runs, comparison, [findings()] * 2, "the command")
    assert comparison_report.title(runs) == "rbf and dot, side by side"
    assert [part.title for part in parts] == [
        "Results",
        "What differs between the configurations",
        "Loss",
        "Stability",
        "Attention maps",
        "Key norms",
        "Written by",
    ]
    assert [name for part in parts for name in part.figures] == [
        "loss",
        "stability",
        "attention-rbf",
        "attention-dot",
        "key-norms",
    ]
    text = {part.title: part.text for part in parts}
    assert "**One seed is no proof.**" in text["Results"]
    assert '| model.attention.kind | "rbf" | "dot" |' in text[parts[1].title]
    assert text[parts[1].title].count("\n") == 2
    assert "`the command`" in text["Written by"]
    assert "step 1,200" in parts[4].figures["attention-rbf"].get_suptitle()


def test_sections_of_runs_without_checkpoints(runs, comparison):
    parts = comparison_report.sections(runs, comparison, ["no checkpoint", findings()], "")
    by_title = {part.title: part for part in parts}
    maps = by_title["Attention maps"]
    assert "* Not shown: rbf, because no checkpoint" in maps.text
    assert list(maps.figures) == ["attention-dot"]
    assert "Key norms" in by_title
    parts = comparison_report.sections(runs, comparison, ["none here", "none there"], "")
    part = next(part for part in parts if part.title == "Attention maps and key norms")
    assert "rbf, because none here" in part.text
    assert "dot, because none there" in part.text
    assert not part.figures


def test_what_limits_the_comparison_stands_above_the_table(tmp_path):
    folders = [write_run(tmp_path / name, summary=False) for name in "ab"]
    twice = read_runs(folders)
    results, differences, *_ = comparison_report.sections(twice, compare(twice), ["", ""], "")
    assert results.text.startswith("> **Note.** Run a has not ended: it is at step 200 of 200.")
    assert differences.text == "Nothing: the runs have one and the same configuration."


def test_numbers(runs, comparison):
    numbers = comparison_report.numbers(runs, comparison)
    json.dumps(numbers)
    assert numbers["runs"]["rbf"]["valid_loss"] == pytest.approx(1.0996, abs=1e-4)
    assert numbers["runs"]["dot"]["attention"] == "dot product"
    assert numbers["steps_to_reach_final_of"]["dot"]["rbf"] is None
    assert 133 < numbers["steps_to_reach_final_of"]["rbf"]["dot"] < 135
    assert numbers["differences"] == {"model.attention.kind": {"rbf": "rbf", "dot": "dot"}}
    assert datetime.datetime.fromisoformat(numbers["date"]).tzinfo is not None

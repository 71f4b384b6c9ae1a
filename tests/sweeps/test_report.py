import csv
import dataclasses
import json
import re

import optuna
import pytest
from matplotlib.figure import Figure

from configs import base
from experiments import config_files
from rbf_jax.sweeps import figures, report, results, space, table
from rbf_jax.sweeps.results import Group
from rbf_jax.sweeps.study import SweepStudy
from rbf_jax.sweeps.sweep import Sweep, SweepFolder

LR, KIND, NORM = "optimizer.learning_rate", "model.attention.kind", "model.attention.qk_norm"
SPACE = ({LR: (0.001, 0.01, 0.1)}, {KIND: ("rbf", "dot", "dot"), NORM: (False, False, True)})


def value(rate, kind, seed):
    return {0.001: 3.0, 0.01: 2.0, 0.1: 2.5}[rate] + (kind == "dot") + seed / 100


def make(path, given=SPACE, **settings):
    folder = SweepFolder(path)
    folder.settle(Sweep(base=base.get_config().to_dict(), parts=space.parse(given), **settings))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds; of the dot product at the largest rate one has failed and one was pruned."""
    folder = make(tmp_path_factory.mktemp("report") / "mine", seeds=2)
    study = SweepStudy(folder)
    while (claim := study.claim()) is not None:
        claim.lock.close()
        values = claim.point.values
        rate, kind = values[LR], values[KIND]
        claim.trial.report(9.0, 1)
        if (rate, kind, values[NORM]) == (0.1, "dot", False):
            if claim.seed == 0:
                claim.trial.set_user_attr("error", "not | finite")
                study.study.tell(claim.trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.study.tell(claim.trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.study.tell(claim.trial, value(rate, kind, claim.seed))
            summary = folder.trial(claim.trial.number) / "summary.json"
            summary.parent.mkdir(parents=True)
            summary.write_text(json.dumps({"device": "a CPU", "versions": {"jax": "1"}}))
    return folder


@pytest.fixture(scope="module")
def written(folder):
    paths = report.write(folder, base.get_config().to_dict(), "the command")
    return {path.name: path for path in paths}


def groups(folder):
    sweep = folder.read()
    return results.groups(sweep, sweep.parts[0], table.rows(SweepStudy(folder)))


def test_points_have_their_seeds_together(folder):
    found = {tuple(group.point.params.values()): group for group in groups(folder)}
    assert len(found) == 9
    assert found[0.01, "rbf, False"].values == {0: 2.0, 1: 2.01}
    assert found[0.01, "rbf, False"].mean == pytest.approx(2.005)
    assert found[0.01, "rbf, False"].deviation == pytest.approx(0.01 / 2**0.5)
    bad = found[0.1, "dot, False"]
    assert (bad.values, bad.pruned, bad.failed) == ({}, 1, 1)
    assert results.best(found.values()) is found[0.01, "rbf, False"]


def test_the_best_has_as_many_seeds_as_any():
    point = space.Point("", {}, {})
    lucky = Group(point, {0: 1.0}, pruned=0, failed=1)
    sound = Group(point, {0: 2.0, 1: 2.0}, pruned=0, failed=0)
    assert results.best([lucky, sound]) is sound
    assert results.best([]) is None


def test_the_csv_has_every_trial(written):
    rows = list(csv.DictReader(written["trials.csv"].read_text().splitlines()))
    assert len(rows) == 18
    assert {(row["state"], row["error"]) for row in rows} == {
        ("finished", ""),
        ("failed", "not | finite"),
        ("pruned", ""),
    }
    row = next(r for r in rows if (r[LR], r[KIND], r["seed"]) == ("0.01", "rbf", "1"))
    assert float(row["value (best)"]) == 2.01
    assert row["begun_at"] == "0"
    assert row["folder"] == f"trials/{int(row['trial']):04d}"


def test_the_csv_has_the_last_loss_and_the_best(folder):
    row = table.rows(SweepStudy(folder))[0]
    text = results.to_csv([dataclasses.replace(row, loss=1.5, best_loss=1.25)], "best")
    (line,) = csv.DictReader(text.splitlines())
    assert (line["last_valid_loss"], line["best_valid_loss"]) == ("1.5", "1.25")


def test_the_report_says_what_is_best_what_failed_and_how_sure_that_is(written):
    text = written["report.md"].read_text()
    assert "18 trials: " in text
    assert "16 finished" in text
    assert "Best: **2.0050** ± 0.0071 (2 seeds) with learning_rate 0.01, kind + qk_norm rbf" in text
    assert "| 0.1 | dot, False |  |  |  | 1 | 1 |" in text
    assert "not \\| finite" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (written["report.md"].parent / link).is_file(), link
    assert {"parameters.png", "parameters.pdf", "parallel.png", "parallel.pdf"} <= set(written)
    shares = re.findall(r"^\| (learning_rate|kind \+ qk_norm) \| (\d\.\d+) \|$", text, re.M)
    assert len(shares) == 2
    assert sum(float(share) for _, share in shares) == pytest.approx(1, abs=0.02)
    numbers = json.loads(written["numbers.json"].read_text())
    assert len(numbers["trials"]) == 18
    assert numbers["machines"] == [{"device": "a CPU", "versions": {"jax": "1"}}]


def test_the_best_config_runs(written, folder):
    config = config_files.read_config(str(written["best_config.py"]))
    assert (config.optimizer.learning_rate, config.model.attention.kind) == (0.01, "rbf")
    best = next(row for row in table.rows(SweepStudy(folder)) if row.value == 2.0)
    expected = folder.read().config(best.values, 0)
    assert json.loads(json.dumps(config.to_dict())) == expected


def test_lines_have_the_colours_of_their_attention_and_crosses_where_trials_failed(folder):
    sweep = folder.read()
    figure = figures.parameters_figure(sweep, sweep.parts[0], groups(folder), "loss")
    by_rate, by_kind = figure.axes
    labels = [text.get_text() for text in by_rate.get_legend().get_texts()]
    assert labels == ["RBF", "dot product", "dot product + QK-norm"]
    styles = [figures.PALETTE[name] for name in labels]
    bars = by_rate.containers
    assert [bar.lines[0].get_color() for bar in bars] == [style.color for style in styles]
    assert by_rate.get_xscale() == "log"
    assert list(bars[0].lines[0].get_ydata()) == pytest.approx([3.005, 2.005, 2.505])
    (segments,) = bars[0].lines[2]
    ends = [segment[:, 1] for segment in segments.get_segments()]
    assert ends[0] == pytest.approx([3.005 - 0.01 / 2**0.5, 3.005 + 0.01 / 2**0.5])
    crosses = [line for line in by_rate.lines if line.get_marker() == "x"]
    assert [(line.get_color(), list(line.get_xdata())) for line in crosses] == [
        (styles[1].color, [0.1])
    ]
    shades = {bar.lines[0].get_color() for bar in by_kind.containers}
    assert len(shades) == 3
    assert not shades & {style.color for style in figures.PALETTE.values()}
    ticks = [label.get_text() for label in by_kind.get_xticklabels()]
    assert ticks == ["rbf, False", "dot, False", "dot, True"]


def test_the_best_line_is_black_and_reaches_its_value(folder):
    sweep = folder.read()
    figure = figures.parallel_figure(sweep.parts[0], groups(folder), "loss")
    (best,) = [line for line in figure.axes[0].lines if line.get_color() == "black"]
    assert list(best.get_ydata()) == pytest.approx([0.5, 0.0, 0.0])


def test_a_sweep_not_yet_begun_or_of_one_parameter_has_its_report(tmp_path):
    folder = make(tmp_path / "new", {"rates": ({LR: (0.1, 0.2)},), "kinds": ({KIND: ("dot",)},)})
    paths = report.write(folder, base.get_config().to_dict(), "the command")
    text = paths[0].read_text()
    assert "No trial has finished yet." in text
    assert "Part 'rates'" in text
    assert "there is nothing to compare it with" in text
    assert "best_config.py" not in [path.name for path in paths]


def test_importance_needs_trials(folder):
    few = groups(folder)[:3]
    assert "are too few" in results.importances(folder.read().parts[0], few)


def test_a_drawn_space_has_its_figures(tmp_path):
    given = (
        {LR: {"low": 1e-3, "high": 1e-1, "log": True}},
        {"train.steps": (5, 6)},
        {KIND: ("rbf", "dot")},
    )
    folder = make(tmp_path / "drawn", given, sampler="random", trials=4)
    study = SweepStudy(folder)
    while (claim := study.claim()) is not None:
        claim.lock.close()
        study.study.tell(claim.trial, claim.point.values[LR])
    (part,) = folder.read().parts
    found = groups(folder)
    assert len(found) == 4
    for figure in (
        figures.parallel_figure(part, found, "loss"),
        figures.parameters_figure(folder.read(), part, found, "loss"),
    ):
        assert isinstance(figure, Figure)

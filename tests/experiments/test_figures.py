"""The program of the figures: trains what is missing, once, and draws."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from configs.figures import scales
from experiments import figures
from experiments.figure_runs import Experiment
from rbf_jax.analysis import claims, records
from rbf_jax.analysis.variants import Variant
from rbf_jax.training import TrainingStopped, ensemble, ensemble_programs
from tests.harness.runs import HANG, environment
from tests.harness.synthetic_records import make_record

REPOSITORY = Path(__file__).parents[2]


def main(*arguments):
    return figures.main(["figures", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--figure is missing"),
        (["--figure=regsters"], "did you mean 'registers'?"),
        (["--figure=dial", "--scale=huge"], "the scale is 'huge'; it must be one of"),
        (["--figure=dial", "--base.model.num_layrs=2"], "num_layrs"),
        (["--figure=dial", "--bogus=1"], "bogus"),
    ],
)
def test_wrong_commands(arguments, message, capsys):
    assert main(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_kept_draws_from_records_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ensemble, "train_ensemble", None)
    kept = tmp_path / "kept"
    config = scales.get_config("smoke").to_dict()
    for name, weight in (("base", 1.0), ("key_norm_weight=0", 0.0)):
        config["model"]["attention"]["key_norm_weight"] = weight
        records.write_record(make_record(name, config), kept / f"{name}{records.SUFFIX}")
    arguments = ["--figure=dial", "--scale=smoke", "--kept", f"--records={kept}"]
    assert main(*arguments, f"--out={tmp_path / 'out'}") == 0
    assert "no record of key_norm_weight=0," in capsys.readouterr().err
    numbers = json.loads((tmp_path / "out" / "dial.json").read_text())
    assert numbers.keys() == {"base", "key_norm_weight=0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(scope="module")
def experiment(folder, corpus):
    """The one that `draw` trains."""
    base = scales.get_config("smoke")
    base.data.source = "text"
    base.data.train_files = (str(corpus / "stories.txt"),)
    base.data.cache_dir = str(folder / "cache")
    return Experiment(base, (0, 1), folder / "out", folder / "kept")


def draw(folder, corpus, *spaces):
    """Draws the figure "dial" as the program does; returns its exit status and what it said."""
    trained = {"space": {str(i): (space,) for i, space in enumerate(spaces)}, "lengths": (1, 2)}
    command = [
        *("--figure=dial", "--scale=smoke", f"--out={folder / 'out'}", f"--records={folder}"),
        *("--base.data.source=text", f"--base.data.train_files={corpus / 'stories.txt'}"),
        f"--base.data.cache_dir={folder / 'cache'}",
    ]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(figures, "_trained", lambda *_: trained)
        return main(*command), said.getvalue()


DIAL = {"model.attention.key_norm_weight": (1.0, 0.0)}
# Positions need an even head dimension.
ODD = {"model.num_heads": (16,)}


@pytest.fixture(scope="module")
def drawn(folder, corpus):
    """Of two variants that can be trained and one that cannot: status, output and report."""
    status, said = draw(folder, corpus, ODD, DIAL)
    return status, said, (folder / "out" / "report.md").read_text()


def test_a_figure_is_trained_from_nothing_and_a_variant_that_fails_does_not_stop_it(drawn, folder):
    status, said, report = drawn
    assert status == 1
    assert "base: validation loss" in said
    assert "figures: num_heads=16 failed: " in said
    out = folder / "out"
    assert "Missing: num_heads=16: " in report
    assert all((out / f"dial.{kind}").stat().st_size > 0 for kind in ("png", "svg"))
    numbers = json.loads((out / "dial.json").read_text())
    assert numbers.keys() == {"base", "key_norm_weight=0"}
    member = out / "runs" / "base" / "seeds" / "1" / "summary.json"
    assert json.loads(member.read_text())["seeds"] == [1]


def test_a_second_call_trains_nothing_and_draws_the_same(drawn, folder, corpus, monkeypatch):
    monkeypatch.setattr(ensemble_programs, "compile_programs", None)

    def files():
        out = folder / "out"
        return {path: path.read_bytes() for path in [*out.glob("dial.*"), *out.glob("records/*")]}

    before = files()
    assert len(before) == 5
    status, said = draw(folder, corpus, DIAL)
    assert (status, "validation loss" in said) == (0, False)
    assert files() == before
    assert "Missing" not in (folder / "out" / "report.md").read_text()


@pytest.mark.usefixtures("drawn")
def test_lengths_asked_for_later_are_found_out_from_the_last_checkpoint(experiment, caplog):
    base = Variant("base", {}, (1, 2))
    found = experiment.find(base)
    assert found.seeds == (0, 1)
    assert set(found.lengths) == {32, 64}
    longer = dataclasses.replace(base, lengths=(1, 2, 4))
    with caplog.at_level("INFO"):
        assert experiment.find(longer) is None
    assert "was not evaluated at 128 tokens" in caplog.text
    # Too few tokens for a context so long.
    long = Variant("long", {}, (1, 100_000))
    failed = experiment.train([long, longer], compile_workers=2, keep_members=False)
    assert failed.keys() == {"long"}
    assert "too few for a row" in failed["long"]
    assert set(experiment.find(longer).lengths) == {32, 64, 128}
    np.testing.assert_array_equal(experiment.find(longer).train["loss"], found.train["loss"])


@pytest.mark.usefixtures("drawn")
def test_a_record_of_something_else_is_not_taken(experiment, tmp_path):
    """Of another configuration, of other seeds, or without the lengths."""
    base = Variant("base", {}, (1, 2))
    assert experiment.find(dataclasses.replace(base, lengths=(1, 8))) is None
    assert experiment.find(Variant("base", {"model.num_registers": 4})) is None
    other = dataclasses.replace(experiment, seeds=(0, 1, 2))
    assert other.find(base) is None
    assert other.find_kept(base) is None
    # Kept elsewhere, it is as good.
    elsewhere = dataclasses.replace(experiment, out=tmp_path, kept=experiment.out / "records")
    assert elsewhere.find(base).seeds == elsewhere.find_kept(base).seeds == (0, 1)


@pytest.mark.usefixtures("drawn")
def test_a_folder_of_another_configuration_is_noticed_before_compiling(experiment, monkeypatch):
    monkeypatch.setattr(ensemble_programs, "compile_programs", None)
    other = Variant("base", {"optimizer.learning_rate": 0.5})
    failed = experiment.train([other], compile_workers=1, keep_members=False)
    assert "holds a run of another configuration; choose another, or delete" in failed["base"]


def test_stopped_it_says_so(experiment, monkeypatch):
    def stop(*_, **__):
        raise TrainingStopped("stopped by a signal", 15)

    monkeypatch.setattr(ensemble, "train_ensemble", stop)
    variants = [Variant(str(i), {"model.num_registers": i}) for i in range(1, 5)]
    monkeypatch.setattr(ensemble_programs, "compile_programs", lambda *_, **__: None)
    with pytest.raises(TrainingStopped, match="stopped by a signal"):
        experiment.train(variants, compile_workers=1, keep_members=False)


@pytest.mark.parametrize("alone", [True, False])
def test_alone_nothing_is_compiled_beside_training(alone, experiment, monkeypatch):
    happened, written = [], []
    training = threading.Event()

    def prepare(self, variant, texts):
        if variant.name == "b":
            training.wait(0.5 if alone else 600)  # in vain, if alone
        happened.append(("compiled", variant.name))
        return None, variant.name

    def train(config, folder, texts, name, **_):
        happened.append(("trained", name))
        training.set()

    monkeypatch.setattr(Experiment, "_prepare", prepare)
    monkeypatch.setattr(ensemble, "train_ensemble", train)
    made = make_record("made", scales.get_config("smoke").to_dict())
    monkeypatch.setattr(records, "from_ensemble", lambda name, folder: made)
    monkeypatch.setattr(records, "write_record", lambda record, path: written.append(record))
    variants = [Variant("a", {}), Variant("b", {})]
    experiment.train(variants, compile_workers=1, keep_members=False, alone=alone)
    order = [("compiled", "a"), ("compiled", "b"), ("trained", "a"), ("trained", "b")]
    assert (happened == order) == alone
    assert {r.summary.get("timed_alone", False) for r in written} == {alone}


def test_a_broken_record_is_made_again(experiment, caplog):
    path = experiment.out / "records" / f"broken{records.SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half a re")
    assert experiment.find(Variant("broken", {})) is None
    assert "is no record" in caplog.text


def test_interrupted_it_says_so(monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ensemble_programs.Texts, "read", interrupted)
    command = ["--figure=dial", "--scale=smoke", f"--out={tmp_path}"]
    assert main(*command) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_all_at_the_smoke_scale(tmp_path):
    """Every figure from nothing, by the one command; a second one trains nothing."""
    command = [
        *(sys.executable, "-m", "experiments.figures", "--figure=all", "--scale=smoke"),
        *("--nomembers", f"--out={tmp_path}", f"--base.data.cache_dir={tmp_path / 'cache'}"),
    ]

    def run():
        return subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment(1),  # All seeds on one device: less to compile.
            capture_output=True,
            text=True,
            timeout=16 * HANG,
        )

    first = run()
    assert first.returncode == 0, first.stderr
    for name in claims.FIGURES:
        assert all((tmp_path / f"{name}.{kind}").is_file() for kind in ("png", "svg", "json"))
    report = (tmp_path / "report.md").read_text()
    assert "Missing" not in report
    assert "not measured:" not in report
    numbers = (tmp_path / "loss_curves.json").read_text()
    second = run()
    assert second.returncode == 0, second.stderr
    assert "validation loss" not in second.stderr
    assert (tmp_path / "loss_curves.json").read_text() == numbers

"""The program of the figures: trains what is missing, once, and draws."""

import dataclasses
import json
import os
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
from tests.harness.synthetic_records import make_record

REPOSITORY = Path(__file__).parents[2]


def test_all_at_the_smoke_scale(tmp_path):
    """The one command, from nothing; a second one trains nothing and draws the same."""
    command = [
        *(sys.executable, "-m", "experiments.figures", "--figure=all", "--scale=smoke"),
        *("--nomembers", f"--out={tmp_path}", f"--base.data.cache_dir={tmp_path / 'cache'}"),
    ]
    # All seeds on one: less to compile. The tests below have two.
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}

    def run():
        return subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900
        )

    first = run()
    assert first.returncode == 0, first.stderr
    assert "base: validation loss" in first.stderr
    for name in claims.FIGURES:
        assert {(tmp_path / f"{name}.{kind}").is_file() for kind in ("png", "svg", "json")} == {
            True
        }
    report = (tmp_path / "report.md").read_text()
    assert "Missing" not in report
    assert "not measured:" not in report
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()}
    numbers = (tmp_path / "loss_curves.json").read_text()
    second = run()
    assert second.returncode == 0, second.stderr
    assert "validation loss" not in second.stderr
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "records").iterdir()} == kept
    assert (tmp_path / "loss_curves.json").read_text() == numbers


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
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    base = scales.get_config("smoke")
    base.data.cache_dir = str(folder / "cache")
    return Experiment(base, (0, 1), folder / "out", folder / "kept")


def test_a_variant_that_fails_does_not_stop_the_others(experiment, caplog):
    # Dimensions that positions cannot have; too few tokens for a context so long.
    variants = [
        Variant("odd", {"model.num_heads": 16}),
        Variant("long", {}, (1, 100_000)),
        Variant("good", {"model.num_registers": 0}, (1, 2)),
    ]
    failed = experiment.train(variants, compile_workers=2, keep_members=True)
    assert failed.keys() == {"odd", "long"}
    assert "too few for a row" in failed["long"]
    found = experiment.find(variants[2])
    assert found.seeds == (0, 1)
    assert set(found.lengths) == {32, 64}
    member = experiment.out / "runs" / "good" / "seeds" / "1" / "summary.json"
    assert json.loads(member.read_text())["seeds"] == [1]

    # Lengths asked for later are found out from the last checkpoint.
    longer = dataclasses.replace(variants[2], lengths=(1, 2, 4))
    with caplog.at_level("INFO"):
        assert experiment.find(longer) is None
    assert "was not evaluated at 128 tokens" in caplog.text
    assert experiment.train([longer], compile_workers=1, keep_members=False) == {}
    assert set(experiment.find(longer).lengths) == {32, 64, 128}
    np.testing.assert_array_equal(experiment.find(longer).train["loss"], found.train["loss"])

    # A record of another configuration, of other seeds, or without the lengths is not taken.
    good = variants[2]
    assert experiment.find(dataclasses.replace(good, lengths=(1, 8))) is None
    assert experiment.find(Variant("good", {"model.num_registers": 4})) is None
    other = dataclasses.replace(experiment, seeds=(0, 1, 2))
    assert other.find(good) is None
    assert other.find_kept(good) is None
    # Kept elsewhere, it is as good.
    experiment.kept.mkdir()
    name = f"good{records.SUFFIX}"
    os.replace(experiment.out / "records" / name, experiment.kept / name)
    assert experiment.find(good).seeds == (0, 1)
    assert experiment.find_kept(good).seeds == (0, 1)


def test_a_folder_of_another_configuration_is_noticed_before_compiling(experiment, monkeypatch):
    variant = Variant("taken", {})
    assert experiment.train([variant], compile_workers=1, keep_members=False) == {}
    monkeypatch.setattr(ensemble_programs, "compile_programs", None)
    other = Variant("taken", {"optimizer.learning_rate": 0.5})
    failed = experiment.train([other], compile_workers=1, keep_members=False)
    assert "holds a run of another configuration; choose another, or delete" in failed["taken"]


def test_stopped_it_says_so(experiment, monkeypatch):
    def stop(*_, **__):
        raise TrainingStopped("stopped by a signal", 15)

    monkeypatch.setattr(ensemble, "train_ensemble", stop)
    variants = [Variant(str(i), {"model.num_registers": i}) for i in range(4)]
    monkeypatch.setattr(ensemble_programs, "compile_programs", lambda *_, **__: None)
    with pytest.raises(TrainingStopped, match="stopped by a signal"):
        experiment.train(variants, compile_workers=1, keep_members=False)


@pytest.mark.parametrize("alone", [True, False])
def test_alone_nothing_is_compiled_beside_training(alone, experiment, monkeypatch):
    happened, written = [], []
    training = threading.Event()

    def prepare(self, variant, texts):
        if variant.name == "b":
            training.wait(0.5)  # in vain, if alone
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

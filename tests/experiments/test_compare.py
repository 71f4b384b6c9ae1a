import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from experiments import compare
from tests.harness.synthetic import write_run


def run(*arguments):
    return compare.main(["compare", *map(str, arguments)])


def test_compare(sink_run, tmp_path, capsys):
    shutil.copytree(sink_run, tmp_path / "twin")
    shutil.copytree(sink_run, tmp_path / "young")
    shutil.rmtree(tmp_path / "young" / "checkpoints")
    (tmp_path / "young" / "summary.json").unlink()
    folders = (sink_run, tmp_path / "twin", tmp_path / "young")
    out = tmp_path / "report"
    assert run("--runs", ",".join(map(str, folders)), "--out", out) == 0

    printed = capsys.readouterr().out
    losses = json.loads((sink_run / "summary.json").read_text())
    assert f"{losses['valid_loss']:.4f}" in printed
    text = (out / "report.md").read_text()
    for path in re.findall(r"\]\(([^)]*)\)", text):
        assert (out / path).stat().st_size > 0
        assert str(out / path) in printed
    pictures = re.findall(r"!\[([^]]*)\]", text)
    names = ["loss", "stability", "learned", "attention-run", "attention-twin", "key-norms"]
    assert pictures == names
    assert "* Not shown: young, because" in text
    assert "Run young has not ended" in text
    images = [np.asarray(Image.open(out / "figures" / f"{name}.png")) for name in names]
    assert all(image.std() > 10 for image in images)
    numbers = json.loads((out / "numbers.json").read_text())
    assert numbers["runs"]["twin"]["valid_loss"] == pytest.approx(losses["valid_loss"])
    assert list(numbers["runs"]) == ["run", "twin", "young"]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("{a}", "must name two or more run folders."),
        ("{a},{a}", "twice"),
        ("{a},{a}/nowhere", "does not exist."),
        ("{a},{empty}", "config.json does not exist; is "),
        ("{a},", "must be paths of run folders."),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, runs, message):
    folder = write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    runs = runs.format(a=folder, empty=tmp_path / "empty")
    assert run("--runs", runs, "--out", tmp_path / "out") != 0
    error = capsys.readouterr().err
    assert error.startswith("compare: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_both_arguments_are_needed(capsys):
    with pytest.raises(SystemExit) as exit_:
        run("--runs", "a,b")
    assert exit_.value.code != 0
    assert "--out" in capsys.readouterr().err

import json
import shutil

import pytest

from experiments import evaluate
from rbf_jax import training


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def test_a_table_and_a_file(run, capsys):
    assert evaluate.main(["evaluate", f"--run={run}", "--checkpoint=best"]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert list(result) == ["step", "split", "loss", "bits_per_byte", "perplexity"]
    best = json.loads((run / "summary.json").read_text())["best_step"]
    assert (result["step"], result["split"]) == (best, "valid")
    rows = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert rows.keys() == result.keys()
    assert float(rows["loss"]) == pytest.approx(result["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--checkpoint=3"], "holds no checkpoint 3"), (["--run=nowhere"], "no config.json is in it")],
)
def test_errors_are_one_line(arguments, message, finished_run, capsys):
    assert evaluate.main(["evaluate", f"--run={finished_run}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", [OSError, ImportError, NotImplementedError])
def test_what_cannot_be_read_is_one_line(kind, monkeypatch, capsys):
    def fail(*arguments):
        raise kind("it is\nnot there")

    monkeypatch.setattr(training, "evaluate_run", fail)
    assert evaluate.main(["evaluate", "--run=x"]) == 2
    assert capsys.readouterr().err == "evaluate: it is not there\n"


@pytest.mark.parametrize("argument", ["--checkpoint=first", "--split=test", "--rnu=x"])
def test_wrong_arguments(argument, capsys):
    with pytest.raises(SystemExit) as exit_info:
        evaluate.main(["evaluate", "--run=x", argument])
    assert exit_info.value.code == 2
    assert argument.split("=")[-1] in capsys.readouterr().err

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from experiments import inspect

PICTURES = ["heads", "norms", "gamma-lambda", "attention"]


def run(*arguments):
    return inspect.main(["inspect", *map(str, arguments)])


def read(out, printed):
    """The report and its numbers; what it links to is there, printed and no empty picture."""
    text = (out / "report.md").read_text()
    links = [out / path for path in re.findall(r"\]\(([^)]*)\)", text)]
    pictures = [f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")]
    assert [path.name for path in links] == [*pictures, "numbers.json"]
    assert printed.split() == [str(out / "report.md"), str(links[-1]), *map(str, links[:-1])]
    for path in links[:-1]:
        if path.suffix == ".png":
            assert np.asarray(Image.open(path).convert("L")).std() > 10
        else:
            assert path.read_text().rstrip().endswith("</svg>")
    return text, json.loads((out / "numbers.json").read_text())


def test_a_report_into_the_run_folder(sink_run, tmp_path, capsys):
    trained = shutil.copytree(sink_run, tmp_path / "run")
    assert run("--run", trained, "--rows", 3) == 0
    text, found = read(trained / "inspect", capsys.readouterr().out)
    assert text.startswith("# Inside run at step 4\n")
    assert f"`python -m experiments.inspect --run {trained} --rows 3`" in text
    losses = json.loads((trained / "summary.json").read_text())
    assert f"| validation loss there | {losses['valid_loss']:.4f} nats per token |" in text
    for words in ("weight on registers", "weight on sink", "sink logit", "rows that need the gate"):
        assert words in text
    assert (found["step"], found["rows"], found["has_bound"]) == (4, 3, True)
    assert 0 < found["text_tokens"] <= 3 * 16
    numbers = {name: np.array(values) for name, values in found["numbers"].items()}
    # RBF weighs nearly evenly at the start, over one register, a sink and text.
    assert np.allclose(numbers["entropy"], found["uniform"]["entropy"], rtol=0.1)
    assert (numbers["sink_mass"] > 0.02).all()
    assert (numbers["register_mass"] > 0.02).all()
    assert numbers["register_value_norm"].shape == (1, 1)
    assert not np.allclose(numbers["gamma"], 1 / np.sqrt(8), atol=1e-7)
    assert (numbers["sink_logits"] != 0).all()
    lines = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    (last,) = (x["sink_logits/0"] for x in lines if (x["split"], x["step"]) == ("train", 4))
    assert np.shape(last) == (2,)


def test_another_model(train_tiny, tmp_path, capsys):
    changes = {"model__attention__kind": "dot", "model__num_registers": 4}
    folder = train_tiny(train__steps=4, data__layout="padded", **changes)
    assert run("--run", folder, "--out", tmp_path / "out", "--checkpoint", "best") == 0
    text, found = read(tmp_path / "out", capsys.readouterr().out)
    assert not (folder / "inspect").exists()
    assert "weight on registers" in text
    assert "weight on sink" not in text
    assert "rows that need the gate" not in text
    assert not found["has_bound"]
    assert np.shape(found["numbers"]["register_key_norm"]) == (1, 4)
    assert found["rows"] == 8
    assert found["text_tokens"] < 8 * 16


def test_a_step_without_evaluation(sink_run, tmp_path, capsys):
    assert run("--run", sink_run, "--out", tmp_path, "--checkpoint", "2", "--rows", 1) == 0
    text, found = read(tmp_path, capsys.readouterr().out)
    assert "| checkpoint | step 2 of 4 |" in text
    assert "| validation loss there | — |" in text
    assert found["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=3"], "holds no checkpoint 3; it holds"),
        (["--run={young}"], "holds no checkpoint yet"),
        (["--run=nowhere"], "no config.json is in it"),
        (["--out={file}"], "file"),
    ],
)
def test_errors_are_one_line(arguments, message, sink_run, tmp_path, capsys):
    young, file = tmp_path / "young", tmp_path / "file"
    shutil.copytree(sink_run, young)
    shutil.rmtree(young / "checkpoints")
    file.touch()
    arguments = [argument.format(young=young, file=file) for argument in arguments]
    assert run("--run", sink_run, "--rows=1", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("inspect: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("argument", ["--checkpoint=first", "--rows=0", "--rnu=x"])
def test_wrong_arguments(argument, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run("--run=x", argument)
    assert exit_info.value.code == 2
    assert argument.split("=")[-1] in capsys.readouterr().err

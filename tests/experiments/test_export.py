import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import export
from rbf_jax import training
from rbf_jax.inference import load_model


def run(*arguments):
    return export.main(["export", *map(str, arguments)])


def test_what_is_written_is_the_model(finished_run, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--checkpoint=best", "--prompt_length=9", "--capacity=30"]
    assert run(f"--run={finished_run}", f"--out={out}", *flags) == 0
    names = "config.json model.safetensors prefill.jax_export run.py step.jax_export tokenizer.json"
    assert sorted(path.name for path in out.iterdir()) == names.split()
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(str(path) for path in out.iterdir())

    loaded, saved = training.load_run(finished_run, "best"), load_model(out)
    assert saved.model == loaded.model
    tokens = np.arange(16, dtype=np.int32)[None]
    apply = jax.jit(loaded.model.apply)
    np.testing.assert_array_equal(apply(saved.variables, tokens), apply(loaded.variables, tokens))
    about = json.loads((out / "config.json").read_text())["about"]
    assert about == {"run": "run", "step": loaded.step, "prompt_length": 9, "capacity": 30}

    ended = subprocess.run(
        [sys.executable, "-I", str(out / "run.py"), "102,111", "--tokens=3"],
        capture_output=True,
        text=True,
        check=True,
    )
    row = [102, 111]
    for _ in range(3):
        logits = apply(saved.variables, np.array([row + [0] * (16 - len(row))], np.int32))
        row.append(int(np.argmax(logits[0, len(row) - 1])))
    assert ended.stdout == ",".join(map(str, row[2:])) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run=nowhere"], "no config.json is in it"),
        (["--checkpoint=3"], "holds no checkpoint 3"),
        (["--prompt_length=0"], "prompt_length=0 must be at least 1"),
        (["--prompt_length=9", "--capacity=8"], "at most capacity=8"),
    ],
)
def test_errors_are_one_line(finished_run, arguments, message, tmp_path, capsys):
    assert run(f"--run={finished_run}", f"--out={tmp_path / 'out'}", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("export: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()

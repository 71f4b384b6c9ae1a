import json
import re
import shlex
from pathlib import Path

import pytest

from experiments import config_files, convert
from tests.harness.gpt2_folder import write_folder


@pytest.fixture(scope="module")
def arguments(corpus, tmp_path_factory):
    """What converts a tiny GPT-2, two steps an arm."""
    folder = tmp_path_factory.mktemp("convert")
    write_folder(folder / "gpt2")
    return [
        "convert",
        f"--from={folder / 'gpt2'}",
        "--config=configs/convert.py",
        f"--run={folder / 'run'}",
        "--arms=annealed",
        "--config.data.source=text",
        f"--config.data.train_files={corpus / 'stories.txt'}",
        f"--config.data.cache_dir={corpus / 'cache'}",
        "--config.data.context_length=16",
        "--config.optimizer.warmup_steps=0",
        "--config.optimizer.anneal_steps=1",
        "--config.train.steps=2",
        "--config.train.batch_size=4",
        "--config.train.eval_batches=2",
        "--config.logging.tensorboard=false",
    ]


def test_a_gpt2_becomes_rbf_and_the_report_is_drawn(arguments, capsys):
    assert convert.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "dot product, λ = 0" in printed
    assert "annealed, trained" in printed
    run = arguments[3].removeprefix("--run=")
    report = json.loads(Path(run, "convert.json").read_text())
    assert report["command"].startswith("python -m experiments.convert --from=")
    assert report["arms"]["annealed"]["key_norm_weight"] == [[1, 1.0], [2, 1.0]]

    out, figure = f"{run}/all.json", f"{run}/all.png"
    assert convert.main(["convert", f"--report={run}", f"--out={out}", f"--figure={figure}"]) == 0
    merged = json.loads(Path(out).read_text())
    assert merged["mean"]["dot_product"] == pytest.approx(
        report["untrained"]["dot_product"], abs=1e-4
    )
    assert Path(figure).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--from=", "--from is missing"),
        ("--from=configs", "configs is no folder of a model: no config.json is in it"),
        ("--arms=anneal", "arm 'anneal' must be one of"),
        ("--out=x.json", "--out has no effect without --report"),
        ("--config.model.d_model=32", "d_model: 256 -> 32: the model is that of --from"),
        ("--config.data.tokenizer=bpe", "data.tokenizer are those of --from"),
        ("--config.data.context_length=32", "context_length is 32; .* has 20 positions"),
        ("--config.optimizer.anneal_steps=0", "anneal_steps is 0; the arm 'annealed' needs"),
        ("--config.optimizer.anneal_steps=3", "anneal_steps is 3; it must be at most train.steps"),
    ],
)
def test_wrong_commands_are_one_line(arguments, change, message, capsys):
    name = change.partition("=")[0]
    rest = [argument for argument in arguments if not argument.startswith(f"{name}=")]
    assert convert.main([*rest, change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_the_documented_command_is_understood(capsys):
    text = Path("docs/convert.md").read_text()
    command, source = re.findall(r"^    (python -m .*(?:(?<=\\)\n.*)*)", text, re.MULTILINE)
    argv = shlex.split(command.replace("\\\n", " "))[2:]
    assert convert.main(argv) == 2
    assert "FOLDER is no folder of a model" in capsys.readouterr().err
    config, _ = config_files.parse(shlex.split(source.replace("\\\n", " "))[2:])
    assert (config.model.norm, config.data.source) == ("layer", "text")

import io
import re
import shutil
import signal
import subprocess
import sys

import pytest

from experiments import export, generate
from rbf_jax import training
from rbf_jax.data import load_tokenizer
from rbf_jax.inference import Sampling, complete
from tests.experiments.conftest import REPOSITORY
from tests.harness.runs import HANG, environment

PROMPTS = ["fox ", "sun s"]


def run(*arguments):
    return generate.main(["generate", *map(str, arguments)])


@pytest.fixture(scope="module")
def expected(finished_run):
    """Greedy texts of 8 tokens after PROMPTS."""
    loaded, tokenizer = training.load_run(finished_run), load_tokenizer(finished_run)
    tokens = [tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = complete(
        loaded.model,
        loaded.variables,
        tokens,
        max_new_tokens=8,
        sampling=Sampling(temperature=0),
        eos_id=tokenizer.eos_id,
    )
    return [prompt + tokenizer.decode(text) for prompt, text in zip(PROMPTS, texts)]


def test_prompts_and_what_follows_them(finished_run, expected, capsys):
    flags = [f"--prompt={prompt}" for prompt in PROMPTS]
    assert run(f"--run={finished_run}", *flags, "--max_tokens=8", "--temperature=0") == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{text}\n" for text in expected)
    assert re.fullmatch(
        r"generate: \d+ tokens; the first after [\d.]+ s, compiling included, then "
        r"[\d,]+ tokens/s\.\n",
        captured.err,
    )


def test_the_rest_of_the_context_unless_told(finished_run, capsys):
    """16 tokens, of bytes; all of them come where no text ends."""
    flags = ["--checkpoint=best", "--temperature=0.01", "--seed=3"]
    assert run(f"--run={finished_run}", "--prompt=sun sun sun", *flags) == 0
    assert len(capsys.readouterr().out.encode()) <= 16 + 1


def test_exported_models_too(finished_run, expected, tmp_path, capsys):
    assert export.main(["export", f"--run={finished_run}", f"--out={tmp_path}"]) == 0
    capsys.readouterr()
    flags = [f"--prompt={PROMPTS[0]}", "--max_tokens=8", "--temperature=0"]
    assert run(f"--run={tmp_path}", *flags) == 0
    assert capsys.readouterr().out == f"{expected[0]}\n"
    assert run(f"--run={tmp_path}", "--checkpoint=best", *flags) == 2
    assert "--checkpoint=best is for runs" in capsys.readouterr().err


def test_interactive(finished_run, expected, monkeypatch, capsys):
    """A prompt that cannot be is said to be wrong, and the next one asked for."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n"))
    flags = ["--interactive", "--max_tokens=8", "--temperature=0"]
    assert run(f"--run={finished_run}", *flags) == 0
    captured = capsys.readouterr()
    assert captured.out == f"> {expected[0]}\n> > {expected[1]}\n> \n"
    assert "generate: prompts[0] is empty" in captured.err


def test_text_comes_piece_by_piece_and_in_order(capsys):
    rows = generate._Rows(["a", "b"])
    seen = []
    for act in (
        lambda: rows.add(1, "y"),
        lambda: rows.add(0, "x"),
        lambda: rows.end(0, "!"),
        lambda: rows.add(1, "z"),
        lambda: rows.end(1, ""),
    ):
        act()
        seen.append(capsys.readouterr().out)
    assert seen == ["a", "x", "!\nby", "z", "\n"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run=nowhere"], "no config.json is in it"),
        (["--checkpoint=3"], "holds no checkpoint 3"),
        (["--prompt="], "prompts[1] is empty"),
        (["--top_p=1.5"], "top_p=1.5 must be None or a number greater than 0 and at most 1"),
        (["--top_k=300"], "top_k=300 must be at most the vocabulary's size 257"),
        (["--max_tokens=0"], "max_new_tokens=0 must be at least 1"),
    ],
)
def test_errors_are_one_line(finished_run, arguments, message, capsys):
    assert run(f"--run={finished_run}", "--prompt=a", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("generate: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    "arguments", [[], ["--prompt=a", "--interactive"], ["--prompt=a", "--top_k=many"]]
)
def test_wrong_arguments(arguments):
    with pytest.raises(SystemExit) as exit_info:
        run("--run=x", *arguments)
    assert exit_info.value.code == 2


def test_ctrl_c_ends_cleanly(finished_run, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.generate", f"--run={folder}", "--prompt=fox"]
        + ["--max_tokens=1000000"],
        cwd=REPOSITORY,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.read(3) == "fox"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=HANG)
    assert process.returncode == 130, error
    assert error.endswith("\ngenerate: interrupted.\n")

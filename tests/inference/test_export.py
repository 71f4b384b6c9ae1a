"""Exported programs, in this process and in one that has JAX alone."""

import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

from rbf_jax.data.tokenizer import ByteTokenizer
from rbf_jax.inference import Sampling, complete, save_model
from rbf_jax.inference.export import export_programs, save_programs
from tests.harness.models import small_model

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6]]
SIZES = {"prompt_length": 6, "capacity": 12}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a model with registers, a window and a learned sink; and the model."""
    folder = tmp_path_factory.mktemp("exported")
    model, variables = small_model(
        {"window": 3, "sink": "learned"}, positions="rope", num_layers=1, dtype="bfloat16"
    )
    programs = export_programs(model, variables, **SIZES)
    save_model(folder, model, variables, ByteTokenizer(), SIZES)
    save_programs(folder, programs)
    return folder, model, variables, programs


_WITHOUT = """
import runpy, sys
import jax

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flax", "rbf_jax", "safetensors", "tokenizers"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    assert not error.code
assert not {"flax", "rbf_jax"} & {name.partition(".")[0] for name in sys.modules}
"""


def _run(program, *given):
    return subprocess.run(
        [sys.executable, "-I", *program, *given], capture_output=True, text=True, check=False
    )


def test_a_process_that_has_jax_alone(exported, tmp_path, monkeypatch):
    folder, model, variables, _ = exported
    monkeypatch.chdir(tmp_path)
    prompts = [",".join(map(str, prompt)) for prompt in PROMPTS]
    ended = _run(["-c", _WITHOUT, str(folder / "run.py")], *prompts, "--tokens=5")
    assert ended.returncode == 0, ended.stderr
    got = [[int(token) for token in line.split(",")] for line in ended.stdout.splitlines()]
    greedy = Sampling(temperature=0)
    assert got == complete(model, variables, PROMPTS, max_new_tokens=5, sampling=greedy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Once upon"], "'Once upon' must be the numbers of tokens, separated by commas"),
        ([",".join(["1"] * 99)], "a prompt has 99 tokens; the program takes at most 6."),
        (["1,2,3", "--tokens=11"], "--tokens=11 must be at least 1 and at most 10: the program"),
        (["1", "--tokens=0"], "--tokens=0 must be at least 1"),
        (["1,2", "3,17", "--tokens=2"], "token 17 must be at least 0 and less than 17."),
    ],
)
def test_what_is_wrong_is_one_line(exported, arguments, message, monkeypatch, capsys):
    program = str(exported[0] / "run.py")
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(program, run_name="__main__")
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


_NO_FLATBUFFERS = """
import runpy, sys

sys.modules["flatbuffers"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_flatbuffers_it_says_so_in_one_line(exported):
    ended = _run(["-c", _NO_FLATBUFFERS, str(exported[0] / "run.py")], "1,2", "--tokens=3")
    assert ended.returncode == 2
    assert "'flatbuffers'" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_programs_take_any_number_of_rows_and_run_on_gpus_too(exported):
    _, model, variables, programs = exported
    assert all(program.platforms == ("cpu", "cuda") for program in programs.values())
    params = {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(variables["params"])
    }
    tokens = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    lengths = np.full(2, 6, np.int32)
    logits, cache = programs["prefill"].call(params, tokens, lengths)
    following, cache = programs["step"].call(params, cache, tokens[:, :1])
    np.testing.assert_array_equal(cache["lengths"], lengths + 1)
    row = np.concatenate([tokens, tokens[:, :1]], axis=1)
    expected = np.asarray(jax.jit(model.apply)(variables, row))
    atol = 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected[:, 5], atol=atol)
    np.testing.assert_allclose(following[:, 0], expected[:, 6], atol=atol)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"prompt_length": 0, "capacity": 5}, "prompt_length=0 must be at least 1 and at most"),
        ({"prompt_length": 6, "capacity": 5}, "prompt_length=6 .* at most capacity=5"),
        ({"prompt_length": 6, "capacity": 13}, "capacity=13 must be at most 12, the number"),
    ],
)
def test_wrong_sizes_are_errors(sizes, message):
    model, variables = small_model(positions="learned")
    with pytest.raises(ValueError, match=message):
        export_programs(model, variables, **sizes)

import json
import os

import pytest

from experiments import plan_memory
from tests.experiments.conftest import SMOKE


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The program sets these; what JAX made of them is settled in this process: two devices."""
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ[name])


def test_a_line_for_each_mesh(tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = [SMOKE, "--meshes=1,1,1,1;1,2,1,1", "--vocab_size=4096", f"--out={out}"]
    assert plan_memory.main(["plan_memory", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:17] for line in lines[2:4]] == ["| 1 | 1 | 1 | 1 |", "| 1 | 2 | 1 | 1 |"]
    one, split = json.loads(out.read_text())["meshes"]
    # Parameters, two moments and the rows' five arrays, the last of booleans.
    batch = 4 * 32 * (4 * 4 + 1)
    assert one["argument_bytes"] == pytest.approx(12 * one["parameters"] + batch, rel=0.01)
    # Most of it is the embedding, which is split.
    assert split["argument_bytes"] == pytest.approx(one["argument_bytes"] / 2, rel=0.02)
    assert (one["accumulate_steps"], split["accumulate_steps"]) == (4, 2)
    assert one["temporary_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--meshes=8,1,1"], "--meshes has '8,1,1'; a mesh is data,fsdp,tensor,seq, four numbers."),
        (["--meshes=1,1,0,1"], "--meshes has '1,1,0,1'"),
        ([SMOKE, "--meshes=1,1,1,2", "--config.data.context_length=33"], "context_length is 33;"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments, message, capsys):
    assert plan_memory.main(["plan_memory", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("plan_memory: ")
    assert message in error
    assert error.count("\n") == 1


def test_the_default_has_a_billion_parameters_and_a_long_context():
    config = plan_memory.a_billion_parameters()
    matrices = 12 * config.model.num_layers * config.model.d_model**2
    assert 1e9 < matrices < 1.1e9
    assert config.data.context_length == 128 * 1024

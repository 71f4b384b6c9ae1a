"""What the README shows works: its Python runs, its commands parse, its links lead somewhere."""

import re
from pathlib import Path

import jax
import pytest

from experiments import config_files, figures, sweep
from rbf_jax.analysis import claims
from tests.harness.commands import PROGRAMS, arguments, commands_in

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = commands_in(README)


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.split("\n")[1])
def test_python(code):
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"):  # as a reader has it
        exec(compile(code, "README.md", "exec"), names)
    assert bool(jax.numpy.isfinite(names["out"]).all())


def test_there_are_commands():
    assert len(COMMANDS) >= 4
    assert len(PYTHON) == 3


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.split()[2])
def test_command_line_is_understood(command, tmp_path, monkeypatch):
    """Each program takes the line; folders that it names need not be there."""
    argv = arguments(command)
    if argv[0] == "experiments.train":
        config, run = config_files.parse(argv)
        if "--config.mesh.fsdp=8" in argv:
            assert config.mesh.fsdp == 8
            return
        assert config.data.source == "text"
        assert config.data.train_files == ("train.txt.xz",)
        assert run.name in ("mine_rbf", "mine_dot")
        return
    if argv[0] == "experiments.sweep" and "--report" not in argv:
        assert sweep.parse(argv)[0].num_trials == 84
        return
    if argv[0] == "experiments.figures":
        _, scale, options = figures.parse(argv)
        assert (scale, [c.name for c in claims.named(options.figure)]) == ("small", ["positions"])
        return
    monkeypatch.chdir(tmp_path)
    assert PROGRAMS[argv[0]](argv) == 2  # the run is missing, not the option misunderstood


def test_benchmark_table_is_the_measured_one():
    table = (ROOT / "docs" / "measurements" / "bench_attention_cpu.md").read_text()
    assert table in (ROOT / "docs" / "speed.md").read_text()


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w[\w-]*)|^    make (\w[\w-]*)", README, re.MULTILINE):
        name = target[0] or target[1]
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name

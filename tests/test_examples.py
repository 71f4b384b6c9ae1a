"""Every file of examples/ runs, in this process; each asserts what it shows."""

import runpy
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, capsys):
    with jax.numpy_dtype_promotion("standard"):  # as a user has it
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out

"""The pages of docs/ work: their Python runs and prints what they say, links lead to files."""

import contextlib
import io
import re
import shutil
from pathlib import Path

import jax
import pytest

from experiments import config_files
from tests.harness.commands import PROGRAMS, arguments, commands_in

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
LINK = re.compile(r"\]\((?!http)([^)#]+)")


def check_blocks(page):
    """Runs the page's Python, one block after another, and compares what each prints."""
    names: dict = {}
    blocks = BLOCK.findall((DOCS / page).read_text())
    assert blocks
    with jax.numpy_dtype_promotion("standard"):  # as a reader has it
        for code, expected in blocks:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, page, "exec"), names)
            if expected:
                compare(printed.getvalue(), expected)


def compare(printed, expected):
    """Words and integers must be the same, other numbers to 10 %: training differs by machine."""
    (words, numbers), (expected_words, expected_numbers) = parts(printed), parts(expected)
    assert words == expected_words
    assert numbers == pytest.approx(expected_numbers, rel=0.1)


def parts(text):
    """Words and fractions of a text; how wide its columns are is of no account."""
    found = re.split(r"(-?\d+(?:\.\d*(?:e-?\d+)?|e-?\d+))", " ".join(text.split()))
    return found[::2], [float(number) for number in found[1::2]]


@pytest.mark.parametrize("page", ["index.md", "mathematics.md", "operation.md", "tutorial.md"])
def test_python(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the tutorial keeps its tokens below .cache
    check_blocks(page)


@pytest.fixture(scope="module")
def folder(finished_run, tmp_path_factory):
    """Where runs/mine_rbf is, the run that pages on training speak of."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(finished_run, folder / "runs" / "mine_rbf")
    return folder


@pytest.mark.parametrize("page", ["training.md", "inspecting.md"])
def test_python_on_a_run(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    check_blocks(page)


@pytest.mark.parametrize(
    "command",
    [
        x
        for page in ("training", "inspecting", "scaling")
        for x in commands_in((DOCS / f"{page}.md").read_text())
        if "…" not in x and "bench_scaling" not in x  # which has a test of its own
    ],
    ids=lambda command: command.split()[2],
)
def test_command_is_understood(command, tmp_path, monkeypatch):
    argv = arguments(command)
    if argv[0] == "experiments.train":
        config_files.parse(argv)
        return
    monkeypatch.chdir(tmp_path)
    assert PROGRAMS[argv[0]](argv) == 2  # the run is missing, not the option misunderstood


PAGES = [DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    missing = [x for x in LINK.findall(page.read_text()) if not (page.parent / x).exists()]
    assert not missing

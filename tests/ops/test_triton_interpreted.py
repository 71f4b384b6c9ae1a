"""The Triton kernels by Triton's interpreter: tests/ops/interpreted, in processes of their own.

Triton is interpreted or compiled, by a variable that it reads when it is imported; this process
may have it compile.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path("tests/ops/interpreted")
RUNS = {
    "contract, even": ("contract_suite.py", "even"),
    "contract, odd": ("contract_suite.py", "odd"),
    "gate": ("gate.py", "test_gate"),
    "gate, other": ("gate.py", "not test_gate"),
    "phases": ("shapes.py", "test_phases"),
    "shapes, other": ("shapes.py", "not test_phases"),
    "transformations": ("transformations.py", ""),
}


def test_all_files_are_run():
    files = {path.name for path in (ROOT / FOLDER).glob("*.py")} - {"__init__.py"}
    assert files == {file for file, _ in RUNS.values()}


@pytest.mark.parametrize(("file", "selected"), RUNS.values(), ids=RUNS.keys())
def test_interpreted(file, selected):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", str(FOLDER / file), "-k", selected]
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(
        [*command, *plugins, "--override-ini=addopts=", "--quiet", "--tb=short"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    *_, last = run.stdout.strip().splitlines() or [""]
    # Not "1 skipped", "1 xfailed" or "1 warning" beside it.
    passed = re.fullmatch(r"[1-9]\d* passed(, \d+ deselected)? in .*", last)
    if not passed or run.returncode != 0:
        pytest.fail(f"{run.stdout[-20_000:]}\n{run.stderr[-2_000:]}", pytrace=False)

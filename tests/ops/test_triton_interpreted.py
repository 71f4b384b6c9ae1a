"""The Triton kernels by Triton's interpreter: tests/ops/interpreted, in processes of their own.

Triton is interpreted or compiled, by a variable that it reads when it is imported; this process
may have it compile.
"""

import pytest

from tests.harness import own_process

FOLDER = "tests/ops/interpreted"
RUNS = {
    "contract, even": ("contract_suite.py", "even"),
    "contract, odd": ("contract_suite.py", "odd"),
    "gate": ("gate.py", "test_gate"),
    "gate, other": ("gate.py", "not test_gate"),
    "decode": ("decode.py", ""),
    "phases": ("shapes.py", "test_phases"),
    "shapes, other": ("shapes.py", "not test_phases"),
    "transformations": ("transformations.py", ""),
}


def test_all_files_are_run():
    assert own_process.all_files(FOLDER) == {file for file, _ in RUNS.values()}


@pytest.mark.parametrize(("file", "selected"), RUNS.values(), ids=RUNS.keys())
def test_interpreted(file, selected):
    interpreter = {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    own_process.run(f"{FOLDER}/{file}", interpreter, "-k", selected)

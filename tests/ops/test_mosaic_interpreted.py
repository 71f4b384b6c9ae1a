"""Runs the tests of the Mosaic GPU kernel in a process that has a CPU thread for each warpgroup."""

from tests.ops import own_process

FOLDER = "tests/ops/mosaic_interpreted"


def test_all_files_are_run():
    assert own_process.all_files(FOLDER) == {"forward.py"}


def test_forward():
    # Where XLA has fewer threads than there are warpgroups, those wait for each other for ever.
    own_process.run(f"{FOLDER}/forward.py", {"NPROC": "8", "JAX_PLATFORMS": "cpu"})

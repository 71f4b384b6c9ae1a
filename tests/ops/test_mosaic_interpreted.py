"""Runs the tests of the Mosaic GPU kernels in a process with a CPU thread for each warpgroup."""

from tests.harness import own_process

FOLDER = "tests/ops/mosaic_interpreted"
# Where a warpgroup ends in an error, the others wait for it for ever.
LIMIT = ["faulthandler_timeout=240", "faulthandler_exit_on_timeout=true"]


def test_all_files_are_run():
    assert own_process.all_files(FOLDER) == {"kernels.py"}


def test_kernels():
    # Where XLA has fewer threads than there are warpgroups, they wait for each other for ever.
    environment = {"NPROC": "8", "JAX_PLATFORMS": "cpu"}
    own_process.run(f"{FOLDER}/kernels.py", environment, *[f"--override-ini={x}" for x in LIMIT])

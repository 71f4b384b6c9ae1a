"""All tests of this folder run the kernels by Pallas's interpreter.

A broken warpgroup ends the worker's process after 15 minutes, and with it what ran there: run a
suspect test alone, with -k and -n0.
"""

import faulthandler

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

from tests.harness import mosaic_interpreter
from tests.harness.runs import HANG


@pytest.fixture(autouse=True)
def _interpreter(h100, request):
    """Where a warpgroup ends in an error the others wait for it forever: then the process ends."""
    faulthandler.dump_traceback_later(
        HANG, exit=True, file=request.config.stash[fault_handler_stderr_fd_key]
    )
    with mosaic_interpreter.interpreted():
        yield
    faulthandler.cancel_dump_traceback_later()

"""Which parameters of a test the default run takes."""

from collections.abc import Iterable, Sequence

import pytest


def by_default(default: Sequence, runs: Iterable) -> list:
    """The parameters `runs` of a test; those that are not in `default` are exhaustive."""
    runs = list(runs)
    assert all(run in runs for run in default), default
    return [
        pytest.param(
            *(run if isinstance(run, tuple) else (run,)),
            marks=() if run in default else pytest.mark.exhaustive,
        )
        for run in runs
    ]

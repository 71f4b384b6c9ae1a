"""Fixtures that tests of several implementations share."""

import pytest

from rbf_jax.ops import nvidia


@pytest.fixture
def h100(monkeypatch):
    """Programs are traced and lowered as on a machine with an H100."""
    monkeypatch.setattr(nvidia, "unavailable", lambda: None)
    monkeypatch.setattr(nvidia, "target", lambda: nvidia.Target("NVIDIA H100 80GB HBM3", 90))

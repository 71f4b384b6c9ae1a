"""Fixtures that tests of several implementations share."""

import pytest

from rbf_jax.ops.gpu import device


@pytest.fixture
def h100(monkeypatch):
    """Programs are traced and lowered as on a machine with an H100."""
    monkeypatch.setattr(device, "unavailable", lambda: None)
    monkeypatch.setattr(device, "target", lambda: device.Target("NVIDIA H100 80GB HBM3", 90))

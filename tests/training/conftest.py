import numpy as np
import pytest

from tests.harness.tiny import tiny_config


@pytest.fixture
def config(corpus):
    return tiny_config(corpus)


@pytest.fixture(scope="package")
def batch():
    """Two packed rows and two with padding, of a vocabulary of 32; no two rows count alike."""
    rng = np.random.default_rng(1)
    shape = (4, 16)
    positions = np.tile(np.arange(16, dtype=np.int32), (4, 1))
    segment_ids = np.ones(shape, np.int32)
    positions[:2, 10:] = np.arange(6)
    segment_ids[:2, 10:] = 2
    loss_mask = np.ones(shape, bool)
    for row, length in ((2, 5), (3, 12)):
        loss_mask[row, length:] = False
        segment_ids[row, length:] = 0
    return {
        "inputs": rng.integers(0, 32, shape, np.int32),
        "targets": rng.integers(0, 32, shape, np.int32),
        "positions": positions,
        "segment_ids": segment_ids,
        "loss_mask": loss_mask,
    }

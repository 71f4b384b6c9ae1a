import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from rbf_jax.training import train
from tests.harness.compiling import without_optimizations
from tests.harness.tiny import tiny_config, write_corpus


@pytest.fixture(scope="package", autouse=True)
def compile_quickly():
    with without_optimizations():
        yield


@pytest.fixture(scope="package", autouse=True)
def compile_once(tmp_path_factory):
    """Runs that are stopped and taken up again compile the same functions: from a cache here."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="package")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def config(corpus):
    return tiny_config(corpus)


@pytest.fixture(scope="package")
def finished_run(corpus, tmp_path_factory):
    """The folder of a run that was never stopped. Only to be read."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_config(corpus), folder)
    return folder


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

"""Runs trained once in each pytest process, for the tests of all programs that read one.

A plugin of every test: what needs more than JAX is imported where it is used.
"""

import os
import re

import pytest

from tests.harness.compiling import QUICKLY

# Seconds that only a process that hangs needs, on a slow and busy machine too.
HANG = 900


def environment(devices=2, *, as_users_compile=False, **changes):
    """Returns this process's environment with another number of CPU devices."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    if as_users_compile:
        flags = " ".join(flag for flag in flags.split() if flag not in QUICKLY)
    return {**os.environ, "XLA_FLAGS": flags, **changes}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The folder of the small corpus."""
    from tests.harness.tiny import write_corpus

    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def train_tiny(corpus, tmp_path_factory):
    """Trains `tiny_config` with changes, given as `model__d_model=8`; returns the run folder."""
    from rbf_jax.training import train
    from tests.harness.tiny import tiny_config

    def train_tiny(**changes):
        config = tiny_config(corpus)
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
        folder = tmp_path_factory.mktemp("trained") / "run"
        train(config, folder)
        return folder

    return train_tiny


@pytest.fixture(scope="session")
def finished_run(train_tiny):
    """The folder of a run of 12 steps that was never stopped. Only to be read."""
    return train_tiny()


@pytest.fixture(scope="session")
def sink_run(train_tiny):
    """The folder of 4 steps with learned γ, a learned sink and a register. Only to be read."""
    model = {"attention__learn_gamma": True, "attention__sink": "learned", "num_registers": 1}
    return train_tiny(train__steps=4, **{f"model__{key}": value for key, value in model.items()})

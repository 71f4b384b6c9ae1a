"""How a process finds its environment; several processes are in tests/experiments."""

import jax
import numpy as np
import pytest

from rbf_jax.training import distributed

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_STEP_NODELIST", "SLURM_NTASKS")


@pytest.fixture
def calls(monkeypatch):
    """What jax.distributed.initialize is called with."""
    for name in (*NAMES, *SLURM):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs))
    )
    return calls


def set_environment(monkeypatch, names, values):
    for name, value in zip(names, values):
        monkeypatch.setenv(name, value)


def test_by_itself_a_process_is_alone(calls, monkeypatch):
    distributed.initialize()
    # A batch script that asked for eight tasks is not one of them.
    monkeypatch.setenv("SLURM_NTASKS", "8")
    distributed.initialize()
    # The one task of a step, as a trial of a sweep is.
    set_environment(monkeypatch, SLURM, ("node1", "1"))
    distributed.initialize()
    distributed.initialize("host:1", 1, 0)
    assert calls == []
    assert distributed.is_first()
    assert distributed.is_alone()


def test_slurm(calls, monkeypatch):
    set_environment(monkeypatch, SLURM, ("node[1-2]", "16"))
    distributed.initialize()
    assert calls == [
        ((), {"cluster_detection_method": "slurm", "heartbeat_timeout_seconds": 60}),
    ]


@pytest.mark.parametrize("by", ["arguments", "environment"])
def test_explicit(by, calls, monkeypatch):
    values = ("host:1234", "2", "1")
    # Explicit is stronger than Slurm.
    set_environment(monkeypatch, SLURM, ("node[1-2]", "16"))
    if by == "environment":
        set_environment(monkeypatch, NAMES, values)
        values = ()
    distributed.initialize(*values, heartbeat_timeout="7")
    options = {"cluster_detection_method": "deactivate", "heartbeat_timeout_seconds": 7}
    assert calls == [(("host:1234", 2, 1), options)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, 0), "JAX_NUM_PROCESSES is missing; .* or --coordinator"),
        (("host", 2, 0), "JAX_COORDINATOR_ADDRESS is 'host'; it must be HOST:PORT"),
        (("host:1", "two", 0), "JAX_NUM_PROCESSES is 'two'; it must be an integer of at least 1"),
        (("host:1", 2, 2), "JAX_PROCESS_ID is '2'; .* at least 0 and at most 1"),
        ((None, None, None, "soon"), "heartbeat_timeout is 'soon'; it must be an integer"),
    ],
)
def test_wrong_values_are_named(arguments, message, calls):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*arguments)
    assert calls == []


def test_what_another_process_could_not_do_is_an_error_here(monkeypatch):
    monkeypatch.setattr(distributed, "texts_of_all", lambda text: [text, "no such file"])
    with pytest.raises(ValueError, match="process 1: no such file"), distributed.together():
        pass
    # One's own comes first.
    with pytest.raises(OSError, match="the disk is full"), distributed.together():
        raise OSError("the disk is full")


@pytest.mark.parametrize("text", ["", "short", "ä long one, " * 1000])
def test_texts_are_whole(text, monkeypatch):
    monkeypatch.setattr(distributed, "is_alone", lambda: False)
    gather = distributed.multihost_utils
    monkeypatch.setattr(gather, "process_allgather", lambda x: np.stack([x, x]))
    assert distributed.texts_of_all(text) == [text, text]

import io
import logging
import sys

import pytest

from rbf_jax.training import progress

VALUES = {"loss": 1.5, "bits_per_byte": 0.75, "perplexity": 4.48}


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_stopwatch(clock):
    watch = progress.Stopwatch(10.0)
    watch.start()
    clock[0] += 5
    watch.stop()
    clock[0] += 100
    watch.start()
    clock[0] += 2
    watch.stop()
    assert watch.seconds == 17.0


def test_lines_now_and_then(clock, caplog):
    caplog.set_level(logging.INFO)
    with progress.Progress(0, 100) as shown:
        for step in range(10, 101, 10):
            shown.log(step, 2.0, 12_345.0, 75.0)
            clock[0] += 12
        shown.evaluated(100, VALUES)
    *steps, evaluation = caplog.messages
    assert steps[0] == "step 10 of 100: loss 2.000, 12,345 tokens/s, 01:15 left"
    # One in thirty seconds, and the last.
    assert [line.split()[1] for line in steps] == ["10", "40", "70", "100"]
    assert evaluation.startswith("step 100: validation loss 1.5000, 0.7500 bits per byte")


def test_a_bar_on_a_terminal(monkeypatch, caplog):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.Progress(20, 100) as shown:
        shown.evaluated(20, VALUES)
        shown.log(100, 2.0, 12_345.0, 0.0)
    text = terminal.getvalue()
    assert " 20%" in text
    assert "validation loss 1.5000" in text
    assert "100/100" in text
    assert "loss 2.000, 12,345 tokens/s" in text
    assert not caplog.messages

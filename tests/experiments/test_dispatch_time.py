"""The benchmark of host time, with as few calls as possible."""

import re

import pytest

from experiments.benchmarks import dispatch_time as program


@pytest.fixture(autouse=True)
def _few_calls(monkeypatch):
    monkeypatch.setattr(program, "_EAGER_CALLS", 1)
    monkeypatch.setattr(program, "_FIRST_CALLS", 1)
    # The compiled programs of other tests stay.
    monkeypatch.setattr(program.jax, "clear_caches", lambda: None)


def test_a_line_for_each_measurement(capsys):
    assert program.main(["dispatch_time", "--repeats=1"]) == 0
    pattern = r"(\w+) +(\w+) +(eager|trace|first|first gradient) +[0-9.]+ ms"
    found = [re.fullmatch(pattern, line).groups() for line in capsys.readouterr().out.splitlines()]
    assert len(set(found)) == len(found) == 2 * 2 * 4


def test_wrong_options(capsys):
    with pytest.raises(SystemExit):
        program.main(["dispatch_time", "--repeats=0"])
    assert "must be an integer of at least 1" in capsys.readouterr().err

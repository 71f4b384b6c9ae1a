"""The report of how long the tests took: normalized by the speed of the machine."""

from tests.harness import times

KEPT = {
    "date": "2026-11-30",
    "loop": 0.25,
    "tests": 3,
    "tests_total": 10.0,
    "total": 6.0,
    "workers": 2,
    "slowest": {"tests/a.py::slow": 8.0},
}
NOW = {
    "workers": 2,
    "loop": 0.5,
    "total": 14.0,
    "tests": 4,
    "tests_total": 23.0,
    "slowest": {"tests/a.py::slow": 18.0, "tests/b.py::new": 5.0},
}


def test_times_are_compared_at_this_machines_speed():
    text = "\n".join(times.report(NOW, KEPT))
    # Twice what it was where the loop took half as long.
    assert "3 tests in 12 s with 2 workers (20 s of tests)" in text
    assert "  18.0 s       16.0 s  tests/a.py::slow" in text
    assert "   5.0 s  under 2.0 s  tests/b.py::new" in text


def test_without_a_record_the_slowest_are_listed():
    assert times.report(NOW, None)[1] == "    18.0 s  tests/a.py::slow"

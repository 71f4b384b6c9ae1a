"""Reports how long a run of the tests took beside the last kept record; it never fails a run.

`pytest --keep-times` writes the record, tests/times.json. Machines differ in speed, so a record
holds the time of a calibration loop too, and is scaled by it before it is shown.
"""

import collections
import datetime
import json
import platform
import time
from pathlib import Path

import pytest

RECORD = Path(__file__).parents[1] / "times.json"
SLOWEST = 10
# Tests from this many seconds are kept.
KEPT = 1.0


def calibration() -> float:
    """Returns the seconds of a Python loop of 10⁷ turns, at its best of three shorter ones."""

    def loop():
        start = time.perf_counter()
        for _ in range(10**6):
            pass
        return time.perf_counter() - start

    return 10 * min(loop() for _ in range(3))


class Times:
    """A pytest plugin for the process that writes the summary."""

    def __init__(self, config):
        self.config = config
        self.keep = config.getoption("keep_times")
        if self.keep and (config.option.keyword or config.args != config.getini("testpaths")):
            raise pytest.UsageError("--keep-times keeps the times of all tests: select none.")
        self.start = time.monotonic()
        self.seconds: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report):
        """Adds up set-up, call and teardown of a test."""
        self.seconds[report.nodeid] += report.duration

    def pytest_terminal_summary(self, terminalreporter):
        """Writes the total, the slowest tests and what the record says of them."""
        if not self.seconds:
            return
        now = {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "workers": getattr(self.config.option, "numprocesses", None) or 1,
            "loop": round(calibration(), 3),
            "total": round(time.monotonic() - self.start, 1),
            "tests": len(self.seconds),
            "tests_total": round(self.seconds.total(), 1),
            "slowest": {name: round(s, 1) for name, s in self.seconds.most_common() if s >= KEPT},
        }
        kept = json.loads(RECORD.read_text()) if RECORD.exists() else None
        for line in report(now, kept):
            terminalreporter.write_line(line)
        if self.keep:
            RECORD.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n")


def report(now: dict, kept: dict | None) -> list[str]:
    """Returns the lines of the summary.

    Args:
      now: what was measured.
      kept: the record, if there is one.
    """
    summary = (
        f"{now['tests']} tests in {now['total']:.0f} s with {now['workers']} workers "
        f"({now['tests_total']:.0f} s of tests; calibration loop {now['loop']:.2f} s)."
    )
    slowest = list(now["slowest"].items())[:SLOWEST]
    if kept is None:
        return [summary, *(f"{s:8.1f} s  {name}" for name, s in slowest)]
    scale = now["loop"] / kept["loop"]
    kept_summary = (
        f"Kept on {kept['date']}: {kept['tests']} tests in {kept['total'] * scale:.0f} s with "
        f"{kept['workers']} workers ({kept['tests_total'] * scale:.0f} s of tests), scaled to this "
        f"machine's speed (loop {kept['loop']:.2f} s there)."
    )
    lines = [summary, kept_summary, "slowest  kept (at this machine's speed)"]
    for name, seconds in slowest:
        before = kept["slowest"].get(name)
        text = f"under {KEPT * scale:.1f}" if before is None else f"{before * scale:.1f}"
        lines.append(f"{seconds:6.1f} s {text:>10} s  {name}")
    return lines

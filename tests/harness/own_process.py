"""Tests that need a process of their own: what they are about cannot change in one that runs."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def all_files(folder: str) -> set[str]:
    """The test files of a folder, which pytest does not find by itself."""
    return {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}


def run(file: str, environment: Mapping[str, str], *arguments: str) -> None:
    """Fails unless all tests of a file pass, and there are some.

    Args:
      file: path from the repository's root.
      environment: variables beside those of this process.
      *arguments: of pytest.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", file, *arguments]
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    ended = subprocess.run(
        [*command, *plugins, "--override-ini=addopts=", "--quiet", "--tb=short"],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    *_, last = ended.stdout.strip().splitlines() or [""]
    # Not "1 skipped", "1 xfailed" or "1 warning" beside it.
    passed = re.fullmatch(r"[1-9]\d* passed(, \d+ deselected)? in .*", last)
    if not passed or ended.returncode != 0:
        pytest.fail(f"{ended.stdout[-20_000:]}\n{ended.stderr[-2_000:]}", pytrace=False)

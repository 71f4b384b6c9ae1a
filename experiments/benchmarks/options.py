"""What the benchmarks' command lines and files have in common."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence


def command_line(program: str, argv: Sequence[str]) -> str:
    """What runs a program of `experiments` again, as a shell reads it."""
    return shlex.join(["python", "-m", f"experiments.{program}", *argv[1:]])


def positive(text: str) -> int:
    """Reads an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def lengths(text: str) -> list[int]:
    """Reads positive integers between commas."""
    return [positive(part) for part in text.split(",")]


def json_file(text: str) -> str:
    """Reads the name of a JSON file, beside which others get their names from it."""
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .json")
    return text

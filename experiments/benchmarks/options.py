"""What the benchmarks' command lines and files have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from rbf_jax.data.files import replacing


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


def write_text(path: Path, text: str) -> None:
    """Writes beside `path` and renames, so that a killed program leaves a whole file."""
    with replacing(path) as file:
        file.write(text.encode())

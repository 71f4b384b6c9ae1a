"""Files written beside and renamed, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it that are missing.

    Raises:
      OSError: it cannot be made; one sentence that names it and says why.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"folder {path} cannot be made: {error.strerror}.") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path` that takes its place when the block ends well.

    Readers see the old file or the new one, never a part. Two writers do not disturb each other:
    the last to finish stays.

    Raises:
      OSError: its folder cannot be made, or the file not be written.
    """
    make_folder(path.parent)
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        opened = beside.open("wb")
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}.") from error
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8, beside `path` and renames it."""
    with replacing(path) as file:
        file.write(text.encode())


def hash_files(paths: Iterable[Path], *settings: str) -> str:
    """Returns the SHA-256 of the contents of `paths`, in order, and of `settings`, in hex."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

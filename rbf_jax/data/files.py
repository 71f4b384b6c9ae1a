"""Files written beside and renamed, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path` that takes its place when the block ends well.

    Readers see the old file or the new one, never a part. Two writers do not disturb each other:
    the last to finish stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("wb") as file:
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

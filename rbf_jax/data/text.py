"""Documents in text files, plain or compressed, read as a stream."""

from __future__ import annotations

import codecs
import functools
import glob
import gzip
import itertools
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rbf_jax.data.files import hash_files
from rbf_jax.data.hold_out import num_train

_BLOCK = 1 << 20
# How a file is opened, by the end of its name.
_OPEN: dict[str, Any] = {
    ".txt": functools.partial(open, mode="rb"),
    ".gz": gzip.open,
    ".xz": lzma.open,
}


class TextSource:
    """Documents in UTF-8 text files."""

    def __init__(
        self,
        train_files: str | Sequence[str],
        valid_files: str | Sequence[str],
        separator: str,
    ):
        """Looks the files up.

        Args:
          train_files: Paths or glob patterns of .txt, .gz or .xz files.
          valid_files: The same; none for the last 5 % of the training documents.
          separator: The string that ends a document; "" for one document a file.

        Raises:
          ValueError: if there is no such file, or one is both for training and for validation.
        """
        train = _expand("train_files", train_files)
        valid = _expand("valid_files", valid_files)
        if not train:
            raise ValueError("data.train_files is empty; data.source='text' needs at least one.")
        resolved = {path.resolve() for path in train}
        if both := [path for path in valid if path.resolve() in resolved]:
            raise ValueError(f"{both[0]} is in both data.train_files and data.valid_files.")
        self._files = {"train": train, "valid": valid}
        self._separator = separator
        self.fingerprint = hash_files([*train, *valid], "text", separator, str(len(train)))

    def documents(self, split: str) -> Iterator[str]:
        """Yields the documents of a split.

        Raises:
          ValueError: with the name of the file, if one is damaged or not UTF-8, or if the
            separator is in none of the split's files.
        """
        if self._files["valid"]:
            return self._read(split)
        if split == "train":
            return itertools.islice(self._read("train"), self._num_train)
        return itertools.islice(self._read("train"), self._num_train, None)

    @functools.cached_property
    def _num_train(self) -> int:
        return num_train(sum(1 for _ in self._read("train")))

    def _read(self, split: str) -> Iterator[str]:
        pieces = 0
        for path in self._files[split]:
            for text in split_file(path, self._separator):
                pieces += 1
                if document := text.strip():
                    yield document
        # A file without a separator is one piece.
        if self._separator and pieces == len(self._files[split]):
            raise ValueError(
                f"data.separator {self._separator!r} is not in data.{split}_files "
                f"({', '.join(map(str, self._files[split]))}); '' means one document a file."
            )


def split_file(path: Path, separator: str) -> Iterator[str]:
    """Yields the pieces of a text file between separators; "" for the whole file.

    Raises:
      ValueError: with the name of the file, if it is damaged or not UTF-8.
    """
    return _split_stream(_decode(path), separator)


def _expand(key: str, patterns: str | Sequence[str]) -> list[Path]:
    if isinstance(patterns, str | os.PathLike):
        patterns = [patterns]
    paths: list[Path] = []
    for pattern in patterns or ():
        found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not found:
            raise ValueError(f"data.{key}: no file matches {str(pattern)!r}.")
        paths.extend(map(Path, found))
    for path in paths:
        if not path.is_file() or path.suffix not in _OPEN:
            raise ValueError(
                f"data.{key}: {path} must be a file whose name ends in {', '.join(_OPEN)}."
            )
    return paths


def _decode(path: Path) -> Iterator[str]:
    """Yields the text of a file in blocks."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    at_start = True
    try:
        with _OPEN[path.suffix](path) as file:
            while True:
                block = file.read(_BLOCK)
                pending = len(decoder.getstate()[0])
                text = decoder.decode(block, final=not block)
                if at_start and text:
                    text, at_start = text.removeprefix("\ufeff"), False  # A byte order mark.
                yield text
                done += len(block)
                if not block:
                    return
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: {error.reason} at byte {done - pending + error.start}."
        ) from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not a {path.suffix} file: {error}.") from error


def _split_stream(blocks: Iterable[str], separator: str) -> Iterator[str]:
    """Splits text that comes in blocks, as `"".join(blocks).split(separator)` would."""
    if not separator:
        yield "".join(blocks)
        return
    rest = ""
    for block in blocks:
        # A separator may begin in the last block: what came before it has been searched.
        searched = max(0, len(rest) - len(separator) + 1)
        rest += block
        start = 0
        while (end := rest.find(separator, max(start, searched))) >= 0:
            yield rest[start:end]
            start = end + len(separator)
        rest = rest[start:]
    yield rest

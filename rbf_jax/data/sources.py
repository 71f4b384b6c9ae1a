"""Where documents come from. Every source gives the documents of a split, in a fixed order."""

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
from typing import Any, Protocol

from rbf_jax.data.files import hash_files

SOURCES = ("embedded", "text", "tinystories", "tfds:NAME")
SPLITS = ("train", "valid")
# Of the training documents, where there are no validation documents: the last of so many.
HOLD_OUT = 20
_BLOCK = 1 << 20


class Source(Protocol):
    """Documents: strings without white space around them, none empty."""

    fingerprint: str
    """Changes where a document of either split does."""

    def documents(self, split: str) -> Iterator[str]:
        """Yields the documents of "train" or "valid"."""


def open_source(config: Any) -> Source:
    """Returns the source that `config.source` names.

    Args:
      config: As `configs.base.data()`.

    Raises:
      ValueError: if there is no such source, if it cannot be read, or if a key is set that it
        does not use.
    """
    name = config.source
    used: tuple[str, ...] = ()
    make: Any
    if name == "embedded":
        make = EmbeddedSource
    elif name == "text":
        used = ("train_files", "valid_files")
        make = functools.partial(
            TextSource, config.train_files, config.valid_files, config.separator
        )
    else:
        raise ValueError(f"data.source is {name!r}; it must be one of {', '.join(SOURCES)}.")
    for key in ("train_files", "valid_files", "tfds_dir", "manual_dir"):
        if key not in used and getattr(config, key):
            raise ValueError(
                f"data.{key} is {getattr(config, key)!r}, but data.source={name!r} does not use it."
            )
    return make()


class EmbeddedSource:
    """Stories made on the spot by `rbf_jax.data.stories`."""

    def __init__(self):
        from rbf_jax.data import stories

        self.fingerprint = stories.CORPUS_SHA256
        self._stories = stories

    def documents(self, split: str) -> Iterator[str]:
        """Yields the stories of a split."""
        return self._stories.generate(split)


class TextSource:
    """UTF-8 text files, plain or compressed, read as a stream."""

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
        if both := sorted(set(train) & set(valid)):
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
        return held_out(self._read("train"), self._num_train_documents, split)

    @functools.cached_property
    def _num_train_documents(self) -> int:
        return sum(1 for _ in self._read("train"))

    def _read(self, split: str) -> Iterator[str]:
        pieces = 0
        for path in self._files[split]:
            for text in _split_stream(_decode(path), self._separator):
                pieces += 1
                if document := text.strip():
                    yield document
        # A file without a separator is one piece.
        if self._separator and pieces == len(self._files[split]):
            raise ValueError(
                f"data.separator {self._separator!r} is not in data.{split}_files "
                f"({', '.join(map(str, self._files[split]))}); '' means one document a file."
            )


def held_out(documents: Iterable[str], count: int, split: str) -> Iterator[str]:
    """Cuts `count` documents: the last 5 %, at least one, are "valid", the others "train".

    Raises:
      ValueError: if there are fewer than two documents.
    """
    if count < 2:
        raise ValueError(
            f"the source holds {count} documents: no validation split can be cut off; "
            "at least 2 are needed, or validation files."
        )
    num_train = count - max(1, count // HOLD_OUT)
    if split == "train":
        return itertools.islice(documents, num_train)
    return itertools.islice(documents, num_train, None)


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


_OPEN: dict[str, Any] = {
    ".txt": functools.partial(open, mode="rb"),
    ".gz": gzip.open,
    ".xz": lzma.open,
}


def _decode(path: Path) -> Iterator[str]:
    """Yields the text of a file in blocks."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    try:
        with _OPEN[path.suffix](path) as file:
            while True:
                block = file.read(_BLOCK)
                pending = len(decoder.getstate()[0])
                yield decoder.decode(block, final=not block)
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

"""Token arrays of a split, memory-mapped, cached by content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rbf_jax.data.files import replacing, write_text
from rbf_jax.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Part of the key: raise it when what is written changes.
_FORMAT = 1
# Documents are tokenised in batches of about so many characters.
_BATCH_CHARACTERS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of all documents of a split, one after another.

    Attributes:
      path: The file of `tokens`, opened again where a worker process unpickles this.
      dtype: "uint16" or "uint32".
      offsets: (documents + 1,) int64; document i is tokens[offsets[i]:offsets[i + 1]], the
        end-of-document token last.
      num_bytes: UTF-8 bytes of the documents.
    """

    path: Path
    dtype: str
    offsets: np.ndarray
    num_bytes: int
    tokens: np.ndarray = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "tokens", np.memmap(self.path, self.dtype, mode="r"))

    def __reduce__(self):
        return Tokens, (self.path, self.dtype, self.offsets, self.num_bytes)

    @property
    def num_targets(self) -> int:
        """Tokens that have a predecessor in their document: all but the first of each."""
        return len(self.tokens) - (len(self.offsets) - 1)


def cached_tokens(
    cache_dir: Path,
    name: str,
    key: tuple[str, ...],
    documents: Callable[[], Iterable[str]],
    tokenizer: Tokenizer,
) -> Tokens:
    """Returns the tokens of `documents`, from the cache if they are there and whole.

    Args:
      cache_dir: Where the arrays are kept; made if missing.
      name: Of the documents, for messages.
      key: What the content depends on besides the tokenizer.
      documents: Gives the documents, not empty; called only if the cache does not hold them.
      tokenizer: Of the documents.

    Raises:
      ValueError: if there is no text.
    """
    described = json.dumps([_FORMAT, *key, tokenizer.fingerprint])
    digest = hashlib.sha256(described.encode()).hexdigest()[:32]
    stem = cache_dir.absolute() / digest
    files = _Files(*(stem.with_suffix(f".{kind}") for kind in ("tokens", "offsets", "json")))
    found = _read(files)
    if found is None:
        _write(files, name, documents(), tokenizer)
        found = _read(files)
        if found is None:
            raise OSError(f"token cache {stem} cannot be read back after it was written.")
    return found


@dataclasses.dataclass(frozen=True)
class _Files:
    """`about` is written last and holds the checksums of the others."""

    tokens: Path
    offsets: Path
    about: Path


def _read(files: _Files) -> Tokens | None:
    """Returns the cached tokens, or None (after a warning) where they are missing or damaged."""
    if not files.about.is_file():
        return None
    try:
        about = json.loads(files.about.read_bytes())
        for path, expected in ((files.tokens, about["tokens"]), (files.offsets, about["offsets"])):
            actual = _checksum(path)
            if actual != expected:
                raise ValueError(f"{path.name} has (size, CRC-32) {actual}, not {expected}")
        offsets = np.fromfile(files.offsets, np.int64)
        return Tokens(files.tokens, about["dtype"], offsets, about["num_bytes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("Token cache %s is damaged and made anew: %s.", files.about, error)
        return None


def _write(files: _Files, name: str, documents: Iterable[str], tokenizer: Tokenizer) -> None:
    # Two processes may do this at once: what they write is the same, byte for byte, so it does
    # not matter whose file is renamed last.
    from tqdm import tqdm

    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
    lengths: list[int] = []
    num_bytes = 0
    logger.info("Tokenising %s into %s.", name, files.tokens)
    with replacing(files.tokens) as file, tqdm(unit=" documents", disable=None) as progress:
        for batch in _batches(documents):
            for tokens in tokenizer.encode_batch(batch):
                file.write(np.append(tokens, tokenizer.eos_id).astype(dtype).tobytes())
                lengths.append(len(tokens) + 1)
            num_bytes += sum(len(text.encode()) for text in batch)
            progress.update(len(batch))
        if sum(lengths) == len(lengths):
            raise ValueError(f"{name}: there is no text; at least one document is needed.")
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    with replacing(files.offsets) as file:
        file.write(offsets.tobytes())
    about: dict[str, Any] = {
        "tokens": _checksum(files.tokens),
        "offsets": _checksum(files.offsets),
        "dtype": dtype.name,
        "num_bytes": num_bytes,
    }
    write_text(files.about, json.dumps(about))
    logger.info("Tokenised %d documents, %d tokens.", len(lengths), offsets[-1])


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _checksum(path: Path) -> list[int]:
    """Returns size and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return [size, crc]

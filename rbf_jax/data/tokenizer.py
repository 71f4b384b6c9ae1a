"""Tokenizers: bytes, byte-level BPE, any tokenizer.json; each one file, kept in the run folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rbf_jax.data.files import write_text

logger = logging.getLogger(__name__)

FILE_NAME = "tokenizer.json"
END_OF_DOCUMENT = "<|endoftext|>"
# What other people's tokenizer.json files call the end of a document, most specific first.
_END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
_BYTES_FILE = {"type": "rbf_jax.bytes"}
_GPT2_FILES = ("vocab.json", "merges.txt")
# 256 bytes and the end of a document.
_SMALLEST_BPE = 257


class Tokenizer(Protocol):
    """Text to token numbers and back. Text never yields `eos_id`; decoding leaves it out."""

    vocab_size: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of `text`, without the end-of-document token."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the tokens of each text, (length,) of an unsigned integer dtype."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    def save(self, path: str | Path) -> None:
        """Writes the file that `load_tokenizer` reads."""


class ByteTokenizer:
    """One token a byte of UTF-8, and 256 for the end of a document."""

    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        """Returns the bytes of `text`."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the bytes of each text, (length,) uint8."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, ends of documents left out."""
        return bytes(i for i in ids if i != self.eos_id).decode(errors="replace")

    def save(self, path: str | Path) -> None:
        """Writes the file that `load_tokenizer` reads."""
        write_text(Path(path), json.dumps(_BYTES_FILE))


class SubwordTokenizer:
    """A tokenizer of the Hugging Face `tokenizers` library."""

    def __init__(self, tokenizer: Any, origin: str):
        """Takes a `tokenizers.Tokenizer`; `origin` names it in errors.

        Raises:
          ValueError: if its vocabulary has no end-of-document token.
        """
        vocabulary = tokenizer.get_vocab()
        name = next((name for name in _END_NAMES if name in vocabulary), None)
        if name is None:
            raise ValueError(
                f"tokenizer {origin} has no end-of-document token: its vocabulary must hold one of "
                f"{', '.join(_END_NAMES)}."
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._json = tokenizer.to_str()
        # A document may spell a special token out: that is text like any other.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eos_id: int = vocabulary[name]
        self.fingerprint = hashlib.sha256(self._json.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of `text`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the tokens of each text, (length,) uint32; on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: str | Path) -> None:
        """Writes the file that `load_tokenizer` reads, an ordinary tokenizer.json."""
        write_text(Path(path), self._json)


def train_bpe(texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Trains a byte-level BPE of `vocab_size` tokens, 256 bytes and the special token included.

    Raises:
      ValueError: if `vocab_size` is below 257.
    """
    if vocab_size < _SMALLEST_BPE:
        raise ValueError(
            f"data.vocab_size is {vocab_size}; byte-level BPE needs at least {_SMALLEST_BPE}."
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = SubwordTokenizer(tokenizer, "bpe")
    if trained.vocab_size < vocab_size:
        logger.warning(
            "The text holds no more than %d tokens for BPE; data.vocab_size asks for %d.",
            trained.vocab_size,
            vocab_size,
        )
    return trained


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer from its file, or from the folder that it was kept in.

    A folder without a tokenizer.json may hold GPT-2's two files, vocab.json and merges.txt.

    Raises:
      ValueError: if the file is missing, or is no tokenizer.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if not (path / FILE_NAME).exists() and all((path / name).is_file() for name in _GPT2_FILES):
            return _load_gpt2_files(path)
        path = path / FILE_NAME
    if not path.is_file():
        raise ValueError(f"tokenizer file {path} does not exist.")
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"tokenizer file {path} is not JSON: {error}.") from error
    if content == _BYTES_FILE:
        return ByteTokenizer()
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    try:
        tokenizer = HuggingFaceTokenizer.from_str(text)
    except Exception as error:  # The library raises plain `Exception`.
        raise ValueError(f"tokenizer file {path} is not a tokenizer.json: {error}.") from error
    return SubwordTokenizer(tokenizer, str(path))


def _load_gpt2_files(folder: Path) -> SubwordTokenizer:
    """Reads GPT-2's byte-level BPE, as it was before there was a tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary, merges = (str(folder / name) for name in _GPT2_FILES)
    try:
        tokenizer = Tokenizer(models.BPE.from_file(vocabulary, merges))
    except Exception as error:  # The library raises plain `Exception`.
        raise ValueError(f"{vocabulary} and {merges} are no tokenizer: {error}.") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_DOCUMENT) is not None:  # A new one would be another model's.
        tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return SubwordTokenizer(tokenizer, str(folder))

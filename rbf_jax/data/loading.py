"""`load_data`: from a configuration to batches."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbf_jax.data import rows, sources, tokenizer
from rbf_jax.data.tokens import cached_tokens

if TYPE_CHECKING:
    import grain

logger = logging.getLogger(__name__)

# As in configs/base.py: where only "bpe" has a use for it, to set another is an error.
DEFAULT_VOCAB_SIZE = 4096
# More rows than anybody will ever read.
_FOREVER = 1 << 60


@dataclasses.dataclass(frozen=True)
class Data:
    """Both splits of a corpus, tokenised, ready to be batched.

    Attributes:
      tokenizer: Of the text.
      bytes_per_token: Per split, "train" and "valid": UTF-8 bytes of the text over its targets. A
        loss in nats a target is loss / (ln 2 · bytes_per_token) bits a byte. The first token of
        a document is given, not a target; its end is. Whole documents count, also where the
        layout "padded" cuts them.
      num_targets: Per split: targets in whole documents.
      fingerprint: Hash of documents and tokenizer: a run that goes on should find the same.
    """

    tokenizer: tokenizer.Tokenizer
    bytes_per_token: Mapping[str, float]
    num_targets: Mapping[str, int]
    fingerprint: str
    _rows: Mapping[str, rows.Rows]
    _seed: int
    _context_length: int
    _num_workers: int

    def num_rows(self, split: str) -> int:
        """Returns the rows of an epoch of "train" or "valid"."""
        return len(self._split(split))

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        shuffle: bool,
        repeat: bool,
        process_index: int = 0,
        process_count: int = 1,
        start: int = 0,
    ) -> grain.IterDataset:
        """Returns the batches of one process.

        The batches of all processes, one after another, are those of a single process with
        `process_count` times the batch size.

        Args:
          split: "train" or "valid".
          batch_size: Rows of a batch of this process, B.
          shuffle: Shuffle the rows by the seed, each epoch otherwise.
          repeat: Go on for ever, a batch may span two epochs; or one epoch, whose last batches
            are filled up with rows whose loss mask is False everywhere.
          process_index: Of this process.
          process_count: Number of processes; each has the same number of batches.
          start: Batches of each process to begin behind: those of an iterator that has yielded so
            many. It does not depend on `process_count` or the workers.

        Returns:
          A dataset whose iterators have get_state and set_state and yield dicts of (B, T) arrays:
          inputs, targets, positions (in the piece of a document, from 0), segment_ids (from 1;
          0 is padding), all int32, and loss_mask, bool (True: the target counts).

        Raises:
          ValueError: if an argument is out of its range.
        """
        import grain

        source = self._split(split)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        if not 0 <= process_index < process_count:
            raise ValueError(
                f"process_index is {process_index}; it must be between 0 and "
                f"process_count - 1 = {process_count - 1}."
            )
        if start < 0:
            raise ValueError(f"start is {start}; it must be at least 0.")
        dataset = grain.MapDataset.source(source)
        if shuffle:
            dataset = dataset.shuffle(self._seed)
        if repeat:
            # Without a number grain counts to sys.maxsize, which batches of 1 overflow.
            dataset = dataset.repeat(_FOREVER // len(source))
        elif missing := -len(source) % (batch_size * process_count):
            padding = grain.MapDataset.source([rows.empty_row(self._context_length)] * missing)
            dataset = grain.MapDataset.concatenate([dataset, padding])
        dataset = dataset.batch(batch_size)[start * process_count + process_index :: process_count]
        # Rows are in memory: one thread that works ahead of the training step is enough.
        batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        if self._num_workers:
            _parse_absl_flags()
            options = grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=2)
            batches = batches.mp_prefetch(options)
        return batches

    def _split(self, split: str) -> rows.Rows:
        if split not in self._rows:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(self._rows)}.")
        return self._rows[split]


def load_data(config: Any, *, seed: int, tokenizer_dir: str | Path | None = None) -> Data:
    """Reads, tokenises and plans a corpus; the second time from the cache.

    Args:
      config: With the attributes of `configs.base.data()`.
      seed: Of the order of the rows, 0 to 2**32 - 1.
      tokenizer_dir: A run folder: the tokenizer is kept there, and read from there if it is there
        already. None keeps none.

    Raises:
      ValueError: naming the key, its value and what is allowed.
    """
    _validate(config, seed)
    source = sources.open_source(config)
    cache_dir = Path(config.cache_dir).expanduser()
    made = _tokenizer(config, source, cache_dir, tokenizer_dir)
    tokens = {
        split: cached_tokens(
            cache_dir,
            f"data.source={config.source!r}, split {split!r}",
            (source.fingerprint, split),
            lambda split=split: source.documents(split),  # type: ignore[misc]
            made,
        )
        for split in sources.SPLITS
    }
    fingerprint = f"{source.fingerprint} {made.fingerprint}"
    return Data(
        tokenizer=made,
        bytes_per_token={
            name: split.num_bytes / split.num_targets for name, split in tokens.items()
        },
        num_targets={name: split.num_targets for name, split in tokens.items()},
        fingerprint=hashlib.sha256(fingerprint.encode()).hexdigest(),
        _rows={
            name: rows.Rows(split, config.context_length, config.layout)
            for name, split in tokens.items()
        },
        _seed=seed,
        _context_length=config.context_length,
        _num_workers=config.num_workers,
    )


def _validate(config: Any, seed: int) -> None:
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed is {seed}; it must be between 0 and 2**32 - 1.")
    if config.layout not in rows.LAYOUTS:
        raise ValueError(
            f"data.layout is {config.layout!r}; it must be one of {', '.join(rows.LAYOUTS)}."
        )
    for key, least in (("context_length", 1), ("num_workers", 0)):
        value = getattr(config, key)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"data.{key} is {value!r}; it must be an integer of at least {least}.")
    if not config.cache_dir:
        raise ValueError(f"data.cache_dir is {config.cache_dir!r}; it must name a folder.")
    made_already = config.tokenizer == "bytes" or Path(config.tokenizer).expanduser().is_file()
    if made_already and config.vocab_size != DEFAULT_VOCAB_SIZE:
        raise ValueError(
            f"data.vocab_size is {config.vocab_size}; data.tokenizer={config.tokenizer!r} has no "
            f"use for it: leave it at its default, {DEFAULT_VOCAB_SIZE}."
        )


def _tokenizer(
    config: Any, source: sources.Source, cache_dir: Path, tokenizer_dir: str | Path | None
) -> tokenizer.Tokenizer:
    """Returns the tokenizer kept in the run folder, or makes it and keeps it there."""
    kept = None if tokenizer_dir is None else Path(tokenizer_dir) / tokenizer.FILE_NAME
    if kept is not None and kept.is_file():
        return _kept_tokenizer(config, kept)
    made: tokenizer.Tokenizer
    if config.tokenizer == "bytes":
        made = tokenizer.ByteTokenizer()
    elif config.tokenizer == "bpe":
        trained = cache_dir / f"bpe-{config.vocab_size}-{source.fingerprint[:32]}.json"
        if trained.is_file():
            made = tokenizer.load_tokenizer(trained)
        else:
            logger.info("Training a BPE of %d tokens.", config.vocab_size)
            made = tokenizer.train_bpe(source.documents("train"), config.vocab_size)
            made.save(trained)
    elif Path(config.tokenizer).expanduser().is_file():
        made = tokenizer.load_tokenizer(config.tokenizer)
    else:
        raise ValueError(
            f"data.tokenizer is {config.tokenizer!r}; it must be 'bytes', 'bpe' or the path of a "
            "tokenizer.json."
        )
    if kept is not None:
        made.save(kept)
    return made


def _kept_tokenizer(config: Any, path: Path) -> tokenizer.Tokenizer:
    """Reads the tokenizer of a run, and refuses one that the configuration did not ask for."""
    kept = tokenizer.load_tokenizer(path)
    same = isinstance(kept, tokenizer.ByteTokenizer) == (config.tokenizer == "bytes")
    # The file that it was copied from may be gone, but if it is there it must be the same.
    if same and config.tokenizer not in ("bytes", "bpe"):
        original = Path(config.tokenizer).expanduser()
        same = not original.is_file() or (
            tokenizer.load_tokenizer(original).fingerprint == kept.fingerprint
        )
    if not same:
        raise ValueError(
            f"data.tokenizer is {config.tokenizer!r}, but {path} is another tokenizer: a run keeps "
            "the one that it started with; start another run."
        )
    return kept


def _parse_absl_flags() -> None:
    # grain hands absl's flags to its workers, and absl refuses to read flags before `app.run`,
    # as in a notebook.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

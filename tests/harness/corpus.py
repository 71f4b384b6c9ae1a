"""A small corpus and its configuration, shared by the tests of rbf_jax.data."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
# Of all lengths, with characters of one to four bytes.
DOCUMENTS = [f"{i}:" + "aé☃🐻 bc"[: i % 7] * (i % 23) + "end" for i in range(120)]
VALID = ["first of two", "the second document"]


def write(path: Path, documents: list[str], separator: str = "<|endoftext|>") -> str:
    path.write_text("".join(f"{text}\n{separator}\n" for text in documents), encoding="utf-8")
    return str(path)


def config(folder: Path, **changes) -> types.SimpleNamespace:
    """Returns a configuration of the corpus, whose files are written into `folder`."""
    values = {
        "source": "text",
        "train_files": (write(folder / "train.txt", DOCUMENTS),),
        "valid_files": (write(folder / "valid.txt", VALID),),
        "separator": "<|endoftext|>",
        "tfds_dir": "",
        "manual_dir": "",
        "tokenizer": "bytes",
        "vocab_size": 300 if changes.get("tokenizer") == "bpe" else 4096,
        "context_length": 32,
        "layout": "packed",
        "cache_dir": str(folder / "cache"),
        "num_workers": 0,
    }
    return types.SimpleNamespace(**{**values, **changes})


def segments(batch: dict[str, np.ndarray]):
    """Yields inputs, targets and positions of every segment, checking what is around it."""
    for row in range(len(batch["inputs"])):
        ids = batch["segment_ids"][row]
        np.testing.assert_array_equal(batch["loss_mask"][row], ids > 0)
        # 1, 2, … without gaps, then padding.
        present = ids[ids > 0]
        assert (np.diff(present) >= 0).all()
        assert set(present) == set(range(1, len(set(present)) + 1))
        assert not ids[len(present) :].any()
        for segment in range(1, len(set(present)) + 1):
            here = ids == segment
            yield tuple(batch[key][row][here] for key in ("inputs", "targets", "positions"))

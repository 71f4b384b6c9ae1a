"""Which pieces of which documents make up each row of a batch.

Rows are planned once, before training, so that any row can be made at any time: resuming is a
number, every process has as many batches as the others, and workers change nothing. Documents of
one row do not see each other (segment ids), so it does not matter who shares a row with whom; the
order of the rows is what an epoch shuffles.
"""

from __future__ import annotations

import numpy as np

from rbf_jax.data.tokens import Tokens

LAYOUTS = ("packed", "padded")


class Rows:
    """Random access to the rows of a split, each a dict of (T,) arrays; see `Data.batches`."""

    def __init__(self, tokens: Tokens, context_length: int, layout: str):
        """Plans the rows.

        Args:
          tokens: Of the split.
          context_length: T.
          layout: "packed": pieces of up to T tokens of every document, as many in a row as fit.
            "padded": the first T tokens of every document, one document a row.
        """
        # The end-of-document token is a target only, so each document has one input less.
        starts = tokens.offsets[:-1]
        lengths = np.diff(tokens.offsets) - 1
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        if layout == "packed":
            starts, lengths = _split(starts, lengths, context_length)
            row_of_piece = best_fit(lengths, context_length)
        else:
            lengths = np.minimum(lengths, context_length)
            row_of_piece = np.arange(len(lengths))
        order = np.argsort(row_of_piece, kind="stable")
        self._starts, self._lengths = starts[order], lengths[order]
        self._first_piece = np.searchsorted(
            row_of_piece[order], np.arange(row_of_piece.max() + 2), side="left"
        )
        self._tokens = tokens
        self._context_length = context_length

    def __len__(self) -> int:
        return len(self._first_piece) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = empty_row(self._context_length)
        tokens = self._tokens.tokens
        at = 0
        pieces = range(self._first_piece[index], self._first_piece[index + 1])
        for segment, piece in enumerate(pieces, start=1):
            start, length = self._starts[piece], self._lengths[piece]
            here = slice(at, at + length)
            row["inputs"][here] = tokens[start : start + length]
            row["targets"][here] = tokens[start + 1 : start + length + 1]
            row["positions"][here] = np.arange(length)
            row["segment_ids"][here] = segment
            row["loss_mask"][here] = True
            at += length
        return row


def empty_row(context_length: int) -> dict[str, np.ndarray]:
    """Returns a row of padding: zeros of shape (T,), and a loss mask that counts nothing."""
    names = ("inputs", "targets", "positions", "segment_ids")
    row = {name: np.zeros(context_length, np.int32) for name in names}
    row["loss_mask"] = np.zeros(context_length, bool)
    return row


def _split(starts: np.ndarray, lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts documents into pieces of `most` tokens; the last piece of each has what is left."""
    pieces = -(-lengths // most)
    document = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return starts[document] + number * most, np.minimum(lengths[document] - number * most, most)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assigns pieces to rows by best fit, longest first (Ding et al. 2024, arXiv:2404.10830).

    Args:
      lengths: (pieces,) integers between 1 and `capacity`.
      capacity: Tokens of a row, T.

    Returns:
      (pieces,) int64, the row of each piece. Rows are numbered such that those before any number
      are spread evenly over the lengths: part of the rows is a fair sample of the whole.
    """
    rows = np.empty(len(lengths), np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    num_rows = 0
    # Rows by the tokens still free in them.
    free: dict[int, np.ndarray] = {}

    def put_back(taken: np.ndarray, room: int) -> None:
        if len(taken) and room:
            free[room] = np.append(free.get(room, taken[:0]), taken)

    # All pieces of one length are placed at once.
    for left in np.split(by_length, np.flatnonzero(np.diff(lengths[by_length])) + 1):
        length = int(lengths[left[0]])
        while len(left):
            room = min((room for room in free if room >= length), default=capacity)
            each = room // length
            needed = -(-len(left) // each)
            if room in free:
                available = free.pop(room)
                taken = available[:needed]
                put_back(available[needed:], room)
            else:
                taken = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            here, left = np.split(left, [each * len(taken)])
            rows[here] = np.repeat(taken, each)[: len(here)]
            in_last = len(here) - each * (len(taken) - 1)
            put_back(taken[:-1], room - length * each)
            put_back(taken[-1:], room - length * in_last)
    # Fibonacci hashing: sorted fractional parts of multiples of the golden ratio.
    spread = np.arange(num_rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.argsort(np.argsort(spread))[rows]

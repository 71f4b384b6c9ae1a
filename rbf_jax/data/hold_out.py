"""A validation split for corpora that have none."""

from __future__ import annotations

# One document of so many.
_PART = 20


def num_train(count: int) -> int:
    """Returns how many of `count` documents are for training; the last 5 %, at least 1, are not.

    Raises:
      ValueError: if there are fewer than two documents.
    """
    if count < 2:
        raise ValueError(
            f"the source holds {count} documents; without validation documents of its own it "
            "needs at least 2, to hold one out."
        )
    return count - max(1, count // _PART)

"""How a verdict follows from intervals, the same for what speaks for the article and against it.

A claim has parts, each of which says that a number lies above a threshold. A part is confirmed
(True) where all of the number's 95 % interval lies above the threshold, refuted (False) where all
of it lies below, and open (None) where the threshold is inside: one threshold for both, so that
what is too small to count refutes, and what is too uncertain decides nothing. Numbers without an
interval, as times at several lengths, have their range instead.

A claim holds where all its parts are confirmed, does not hold where all are refuted, and holds in
part where some are confirmed and some refuted. It is not decided where it depends on an open part
which of these it is. So the opposite of a claim gets the opposite verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HOLDS, IN_PART, NOT, OPEN = "holds", "holds in part", "does not hold", "not decided"
# Nats per token of validation loss that count.
MARGIN = 0.01
# Of the logarithm of a ratio of gradient norms.
GRADIENT_MARGIN = 0.05
# Spikes a run.
SPIKE_MARGIN = 1.0
# Ratios of times and of memory: what counts between implementations of attention, and between
# layers or whole training steps.
KERNEL_MARGIN, STEP_MARGIN = 1.2, 1.02

Estimate = Mapping[str, Any]


def rises(value: Estimate, margin: float) -> bool | None:
    """Whether a difference is above the margin.

    Args:
      value: as `paired.as_numbers` has it.
      margin: that counts.

    Raises:
      LookupError: all seeds diverged.
    """
    if not value["n"]:
        raise LookupError("all seeds diverged")
    return _above(value["low"], value["high"], margin)


def falls(value: Estimate, margin: float) -> bool | None:
    """Whether a difference is below −margin; as `rises`."""
    if not value["n"]:
        raise LookupError("all seeds diverged")
    return _above(-value["high"], -value["low"], margin)


def exceeds(values: Sequence[float], margin: float) -> bool | None:
    """Whether numbers without intervals are above the margin, all of them."""
    return _above(min(values), max(values), margin)


def both(parts: Iterable[bool | None]) -> bool | None:
    """One part that is confirmed where all these are, and refuted where any is."""
    parts = list(parts)
    if False in parts:
        return False
    return None if None in parts else True


def no(part: bool | None) -> bool | None:
    """The opposite of a part."""
    return None if part is None else not part


def verdict(parts: Iterable[bool | None]) -> str:
    """Of a claim with these parts."""
    parts = list(parts)
    if True in parts and False in parts:
        return IN_PART
    if None in parts:
        return OPEN
    return HOLDS if True in parts else NOT


def _above(low: float, high: float, margin: float) -> bool | None:
    if math.isnan(low) or math.isnan(high):
        return None
    if low > margin:
        return True
    return False if high < margin else None

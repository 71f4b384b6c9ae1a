"""Statistics of few seeds: intervals, paired differences, steps saved, loss spikes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from rbf_jax.analysis.comparison import steps_to_reach
from rbf_jax.analysis.records import Record

# A step is a spike where its training loss is so many nats above the median of those before it: of
# few, since a loss that falls hides spikes from the median of many.
SPIKE_NATS = 0.3
SPIKE_WINDOW = 10


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over n seeds and its 95 % interval, by Student's t.

    Attributes:
      mean: of the finite values; NaN where there is none.
      low: lower end; −inf for fewer than two values.
      high: upper end.
      n: finite values.
      missing: values that are not finite: diverged seeds.
    """

    mean: float
    low: float
    high: float
    n: int
    missing: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if not self.n:
            return "diverged"
        text = f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"
        return text if not self.missing else f"{text}, {self.missing} diverged"


def estimate(values: np.ndarray) -> Estimate:
    """The mean of values (n,) and its interval."""
    values = np.asarray(values, np.float64)
    good = values[np.isfinite(values)]
    n, missing = len(good), len(values) - len(good)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, missing)
    mean = float(good.mean())
    if n == 1:
        return Estimate(mean, -math.inf, math.inf, 1, missing)
    half = float(stats.t.ppf(0.975, n - 1) * good.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n, missing)


def difference(record: Record, reference: Record, which: str = "final") -> Estimate:
    """Validation loss of a record less that of a reference, paired by seed, in nats a token.

    Raises:
      ValueError: they were not trained with the same seeds.
    """
    if record.seeds != reference.seeds:
        raise ValueError(
            f"{record.name} has seeds {record.seeds} and {reference.name} {reference.seeds}; "
            "differences are paired by seed."
        )
    return estimate(loss(record, which) - loss(reference, which))


def loss(record: Record, which: str = "final") -> np.ndarray:
    """Validation loss (n,) after the last step ("final"), or the least of all ("best")."""
    losses = record.valid["loss"]
    if which == "final":
        return losses[-1]
    filled = np.where(np.isfinite(losses), losses, np.inf).min(0)
    return np.where(np.isfinite(filled), filled, np.nan)


def steps_saved(record: Record, reference: Record) -> Estimate:
    """How many steps earlier each seed reaches the worse of the two final validation losses.

    Both reach it, so that no seed is left out, a record saves nothing against itself even where its
    curve ends flat, and two records swapped change the sign alone. A diverged seed counts as
    missing.
    """
    steps = record.valid["step"].astype(np.float64)
    pairs = zip(record.valid["loss"].T, reference.valid["loss"].T)
    return estimate(np.array([_steps_saved(steps, own, other) for own, other in pairs]))


def _steps_saved(steps: np.ndarray, own: np.ndarray, other: np.ndarray) -> float:
    worse = float(np.maximum(own[-1], other[-1]))  # NaN where either diverged.
    if not math.isfinite(worse):
        return math.nan
    theirs, mine = (steps_to_reach(steps, losses, worse) for losses in (other, own))
    if theirs is None or mine is None:
        return math.nan
    return theirs - mine


def spikes(record: Record) -> np.ndarray:
    """(n,) steps whose training loss is `SPIKE_NATS` above the median of the `SPIKE_WINDOW` before;
    NaN for seeds that diverged."""
    losses = record.train["loss"]
    finite = np.isfinite(losses).all(0)
    # Before the first step there is nothing: NaN.
    padded = np.pad(losses[:, finite], ((SPIKE_WINDOW, 0), (0, 0)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, SPIKE_WINDOW, axis=0)
    before = np.nanmedian(windows[3:-1], axis=-1)  # Of the first three steps there are too few.
    counts = np.full(losses.shape[1], np.nan)
    counts[finite] = (losses[3:, finite] > before + SPIKE_NATS).sum(0)
    return counts


def first_steps(record: Record) -> int:
    """How many steps count as the first: a fifth of all."""
    return max(len(record.train["step"]) // 5, 4)


def largest_gradient_norm(record: Record) -> np.ndarray:
    """(n,) over the first steps, before clipping; NaN for seeds that diverged there."""
    return record.train["grad_norm"][: first_steps(record)].max(0)


def mean_log_gradient_norm(record: Record) -> np.ndarray:
    """(n,) the mean over the first steps of the logarithm of the gradient norm, before clipping."""
    return np.log(record.train["grad_norm"][: first_steps(record)]).mean(0)


def interval(value: Mapping[str, Any], digits: int) -> str:
    """The mean and the interval of `as_numbers`, with signs."""
    mean, low, high = (f"{value[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def as_numbers(value: Estimate) -> dict[str, float | int]:
    """For JSON."""
    return dataclasses.asdict(value)

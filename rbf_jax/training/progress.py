"""Telling how far training is, and how fast it goes."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0


class Stopwatch:
    """Adds up the time between starts and stops.

    Attributes:
      seconds: so far.
    """

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self._since = 0.0

    def start(self) -> None:
        """Goes on."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stands still."""
        self.seconds += time.perf_counter() - self._since


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, first_step: int, steps: int, *, shown: bool = True):
        """Starts behind `first_step` of `steps`; no bar unless `shown`."""
        self._steps = steps
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            unit=" steps",
            dynamic_ncols=True,
            disable=not (shown and sys.stderr.isatty()),
        )
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._bar.close()

    def log(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Shows where training is."""
        if not self._bar.disable:
            self._bar.set_postfix_str(
                f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False
            )
            self._bar.update(step - self._bar.n)
        elif step == self._steps or time.monotonic() > self._last_line + _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            logger.info(
                "step %d of %d: loss %.3f, %s tokens/s, %s left",
                step,
                self._steps,
                loss,
                f"{tokens_per_second:,.0f}",
                tqdm.format_interval(seconds_left),
            )

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Shows an evaluation."""
        text = (
            f"step {step}: validation loss {values['loss']:.4f}, "
            f"{values['bits_per_byte']:.4f} bits per byte, perplexity {values['perplexity']:.2f}"
        )
        if self._bar.disable:
            logger.info("%s", text)
        else:
            self._bar.write(text, file=sys.stderr)

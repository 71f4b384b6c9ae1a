"""The trials of a sweep as a table: live on a terminal, elsewhere a line when something changes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rbf_jax.sweeps.study import SweepStudy

_MOST_ROWS = 30
_TAIL_BYTES = 16_384
_STATES = {
    TrialState.WAITING: "waiting",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a trial.

    Attributes:
      number: of the trial.
      state: waiting, running, interrupted, finished, pruned or failed.
      part: of the space.
      params: choice by name of axis, of those that vary.
      values: value by key of the configuration.
      seed: of parameters and data.
      step: of the newest line of metrics.
      steps: of the whole training.
      loss: latest validation loss.
      best_loss: best validation loss.
      value: of the objective, if it has finished.
      error: why it failed.
      begun_at: steps at which a worker took it up.
      folder: of the run.
    """

    number: int
    state: str
    part: str
    params: dict[str, Any]
    values: dict[str, Any]
    seed: int
    step: int
    steps: int
    loss: float
    best_loss: float
    value: float
    error: str
    begun_at: list[int]
    folder: Path


def rows(study: SweepStudy) -> list[Row]:
    """Returns one row a trial, by number."""
    alive = study.alive()
    return [_row(study, trial, trial.number in alive) for trial in study.trials()]


def _row(study: SweepStudy, trial: FrozenTrial, alive: bool) -> Row:
    point = study.point(trial)
    values = {} if point is None else point.values
    folder = study.folder.trial(trial.number)
    losses = trial.intermediate_values
    state = _STATES.get(trial.state) or ("running" if alive else "interrupted")
    finished = trial.state == TrialState.COMPLETE and trial.value is not None
    return Row(
        number=trial.number,
        state=state,
        part="" if point is None else point.part,
        params={} if point is None else point.params,
        values=values,
        seed=trial.user_attrs.get("seed", 0),
        step=_last_step(folder),
        steps=values.get("train.steps", study.sweep.base["train"]["steps"]),
        loss=losses[max(losses)] if losses else math.nan,
        best_loss=min(losses.values()) if losses else math.nan,
        value=float(trial.value) if finished and trial.value is not None else math.nan,
        error=trial.user_attrs.get("error", ""),
        begun_at=trial.user_attrs.get("starts", []),
        folder=folder,
    )


def _last_step(folder: Path) -> int:
    """Step of the newest whole line of metrics, from the end of the file."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # Half a line, at either end.
            continue
    return 0


def best(found: list[Row]) -> Row | None:
    """The finished trial of the least value."""
    done = [row for row in found if not math.isnan(row.value)]
    return min(done, key=lambda row: (row.value, row.number), default=None)


def number(value: float) -> str:
    """A loss as text; "" for none."""
    return "" if math.isnan(value) else f"{value:.4f}"


def text(value: Any) -> str:
    """A choice as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_table(found: list[Row], num_trials: int) -> Table:
    """The table; of many trials, those that run or failed, the best, and the newest."""
    top = best(found)
    names = list(dict.fromkeys(name for row in found for name in row.params))
    title = headline(found, num_trials) + ("" if top is None else " (*)")
    table = Table(title=title, title_justify="left")
    for heading in ("trial", "state"):
        table.add_column(heading)
    for heading in (*names, "seed", "step", "loss", "value"):
        table.add_column(heading, justify="right")
    table.add_column("why", overflow="fold")
    for row in _shown(found):
        table.add_row(
            f"{row.number}{' *' if row is top else ''}",
            row.state,
            *(text(row.params[name]) if name in row.params else "" for name in names),
            str(row.seed),
            f"{row.step}/{row.steps}",
            number(row.loss),
            number(row.value),
            Text(row.error),
            style={"failed": "red", "running": "bold"}.get(row.state),
        )
    return table


def headline(found: list[Row], num_trials: int) -> str:
    """How many trials are in which state, and the best value."""
    counts = Counter(row.state for row in found)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    top = best(found)
    value = "" if top is None else f"; best {top.value:.4f}, trial {top.number}"
    return f"{num_trials} trials: {states or 'none begun'}{value}"


def _shown(found: list[Row]) -> list[Row]:
    if len(found) <= _MOST_ROWS:
        return found
    chosen = {row.number for row in found if row.state in ("running", "interrupted", "failed")}
    done = sorted((r for r in found if not math.isnan(r.value)), key=lambda row: row.value)
    chosen |= {row.number for row in done[: _MOST_ROWS // 3]}
    for row in [*reversed([r for r in found if r.state != "waiting"]), *found]:
        if len(chosen) >= _MOST_ROWS:
            break
        chosen.add(row.number)
    return [row for row in found if row.number in chosen]


class Display:
    """Shows the table as it changes."""

    def __init__(self, study: SweepStudy):
        self._study = study
        self._console = Console()
        self._live: Live | None = None
        self._states: dict[int, str] = {}

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False).__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, where)

    def show(self) -> None:
        """Shows what is new."""
        found, trials = rows(self._study), self._study.sweep.num_trials
        if self._live is not None:
            self._live.update(Group(to_table(found, trials)), refresh=True)
            return
        for row in found:
            before = self._states.get(row.number, "waiting")
            if row.state != before:
                print(_line(row), flush=True)
            self._states[row.number] = row.state


def _line(row: Row) -> str:
    params = ", ".join(f"{name} {text(value)}" for name, value in row.params.items())
    parts = [f"trial {row.number} ({params}, seed {row.seed})" if params else f"trial {row.number}"]
    parts.append(f"{row.state} at step {row.step}/{row.steps}")
    if row.state == "finished":
        parts.append(f"value {row.value:.4f}")
    if row.error:
        parts.append(row.error)
    return ": ".join(parts)

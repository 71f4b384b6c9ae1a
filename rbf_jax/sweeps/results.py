"""What a sweep found: trials as CSV, points with their seeds, the best as a config file."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from rbf_jax.sweeps import space
from rbf_jax.sweeps.study import distribution
from rbf_jax.sweeps.sweep import Sweep
from rbf_jax.sweeps.table import Row

# Of finished trials; with fewer, an importance says more of chance than of the parameter.
FEWEST_FOR_IMPORTANCE = 12
# PED-ANOVA compares the best trials with all of them; its own 0.1 of a few dozen are too few.
_BEST_QUANTILE = 0.25


@dataclasses.dataclass(frozen=True)
class Group:
    """The trials of one point, which differ in their seeds.

    Attributes:
      point: what they train.
      values: of those that have finished, by seed.
      pruned: how many were.
      failed: how many have.
    """

    point: space.Point
    values: Mapping[int, float]
    pruned: int
    failed: int

    @property
    def mean(self) -> float:
        """Of the values; NaN if there is none."""
        return statistics.fmean(self.values.values()) if self.values else float("nan")

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; 0 if there are fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else 0.0


def groups(sweep: Sweep, part: space.Part, rows: Iterable[Row]) -> list[Group]:
    """Returns the points of a part that have ended trials, in the order of the space.

    Args:
      sweep: what was trained.
      part: of its space.
      rows: all trials; those that another part trained for this one are found, too.
    """
    ended: dict[str, list[Row]] = {}
    points: dict[str, space.Point] = {}
    for row in rows:
        point = space.Point(row.part, row.params, row.values)
        key = sweep.identity(point)
        if row.state in ("finished", "pruned", "failed") and row.values:
            ended.setdefault(key, []).append(row)
            points.setdefault(key, point)
    if sweep.is_grid:
        points = {sweep.identity(point): point for point in part.points()}
    return [_group(point, ended[key]) for key, point in points.items() if key in ended]


def _group(point: space.Point, rows: Sequence[Row]) -> Group:
    return Group(
        point,
        {row.seed: row.value for row in rows if row.state == "finished"},
        sum(row.state == "pruned" for row in rows),
        sum(row.state == "failed" for row in rows),
    )


def best(found: Iterable[Group]) -> Group | None:
    """The point of the least mean, among those of which the most seeds have finished."""
    done = [group for group in found if group.values]
    most = max((len(group.values) for group in done), default=0)
    complete = [group for group in done if len(group.values) == most]
    return min(complete, key=lambda group: group.mean, default=None)


def importances(part: space.Part, found: Iterable[Group]) -> dict[str, float] | str:
    """Returns the share of each axis by PED-ANOVA, or why there is none."""
    if len(part.varying) < 2:
        return "One parameter varies; there is nothing to compare it with."
    found = list(found)
    trials = sum(len(group.values) for group in found)
    if trials < FEWEST_FOR_IMPORTANCE:
        return (
            f"{trials} finished trials are too few to tell importance from chance; it takes "
            f"{FEWEST_FOR_IMPORTANCE}."
        )
    study = optuna.create_study()
    distributions = {axis.name: distribution(axis, axis.choices) for axis in part.varying}
    for group in found:
        for value in group.values.values():
            study.add_trial(
                optuna.create_trial(
                    params=dict(group.point.params), distributions=distributions, value=value
                )
            )
    return get_param_importances(
        study, evaluator=PedAnovaImportanceEvaluator(target_quantile=_BEST_QUANTILE)
    )


def to_csv(rows: Sequence[Row], objective: str) -> str:
    """Returns one line a trial: what it was, how it ended, and every key that the space sets."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    fixed = ("trial", "state", "part", "seed", "step", "steps", "last_valid_loss")
    header = [
        *fixed,
        "best_valid_loss",
        f"value ({objective})",
        "begun_at",
        "error",
        "folder",
        *keys,
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        losses = ["" if loss != loss else repr(loss) for loss in (row.loss, row.best_loss)]
        value = "" if row.value != row.value else repr(row.value)
        place = f"trials/{row.folder.name}"
        settings = [row.values.get(key, "") for key in keys]
        begun_at = " ".join(map(str, row.begun_at))
        writer.writerow(
            [row.number, row.state, row.part, row.seed, row.step, row.steps]
            + [*losses, value, begun_at, row.error, place, *settings]
        )
    return text.getvalue()


def config_file(config: Mapping[str, Any], defaults: Mapping[str, Any], docstring: str) -> str:
    """Returns a config file for experiments.train.

    Args:
      config: the whole configuration, nested.
      defaults: what configs.base.get_config() returns, nested; what equals it is left out.
      docstring: what the file opens with.
    """
    known = space.flat(defaults)
    lines = [
        f"    config.{key} = {_literal(value)}\n"
        for key, value in space.flat(config).items()
        if _tuples(value) != _tuples(known.get(key))
    ]
    return (
        f'"""{docstring}"""\n\nfrom configs import base\n\n\ndef get_config():\n'
        '    """Returns the configuration."""\n    config = base.get_config()\n'
        f"{''.join(lines)}    return config\n"
    )


def _literal(value: Any) -> str:
    """A value as Python has it, with the quotes that formatters want."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(_tuples(value))


def _tuples(value: Any) -> Any:
    """JSON has lists where configurations have tuples."""
    return tuple(value) if isinstance(value, list) else value

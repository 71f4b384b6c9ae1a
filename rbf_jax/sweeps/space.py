"""The space of a sweep: named parts, each a product of axes, each of values or a range.

Knows neither Optuna nor the configuration's schema; a space is plain data that goes to JSON and
back: ``{part: [{key: [value, …] or {"low": …, "high": …, "log": …}}, …]}``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Plain = dict[str, list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
      low: least.
      high: largest.
      log: sampled evenly in the logarithm.
      integer: whole numbers only.
    """

    low: float
    high: float
    log: bool
    integer: bool


@dataclasses.dataclass(frozen=True)
class Axis:
    """Keys that change together.

    Attributes:
      keys: of the configuration, dotted.
      rows: what they become, a value per key in each; empty for a range.
      range: of the one key, or None.
    """

    keys: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...] = ()
    range: Range | None = None

    @property
    def name(self) -> str:
        """What Optuna, tables and figures call the axis: last parts of the keys."""
        return " + ".join(key.rpartition(".")[2] for key in self.keys)

    @property
    def varies(self) -> bool:
        """Whether there is more than one value."""
        return self.range is not None or len(self.rows) > 1

    @property
    def choices(self) -> list[Any]:
        """Of the rows, one scalar each: the value itself, or the values of several keys as text."""
        return [self.choice(row) for row in self.rows]

    @staticmethod
    def choice(row: Sequence[Any]) -> Any:
        """What stands for one row among `choices`."""
        if len(row) == 1 and isinstance(row[0], bool | int | float | str | None):
            return row[0]
        return ", ".join(map(str, row))

    def values(self, choice: Any) -> dict[str, Any]:
        """What a choice, or a number of the range, sets: a value by key."""
        if self.range is not None:
            return {self.keys[0]: choice}
        return dict(zip(self.keys, self.rows[self.choices.index(choice)]))


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of all axes of a part.

    Attributes:
      part: its name.
      params: choice by name of axis, of those that vary.
      values: value by key of the configuration.
    """

    part: str
    params: dict[str, Any]
    values: dict[str, Any]

    def identity(self, base: Mapping[str, Any]) -> str:
        """The same text for points that make the same configuration of the flat `base`."""
        changes = {k: v for k, v in self.values.items() if k not in base or base[k] != v}
        return json.dumps(changes, sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Part:
    """A product of axes.

    Attributes:
      name: "" if the space has only this part.
      axes: of different keys.
    """

    name: str
    axes: tuple[Axis, ...]

    @property
    def varying(self) -> tuple[Axis, ...]:
        """The axes of more than one value."""
        return tuple(axis for axis in self.axes if axis.varies)

    def points(self) -> Iterator[Point]:
        """Yields all points, the last axis changing fastest.

        Raises:
          ValueError: an axis is a range.
        """
        for axis in self.axes:
            if axis.range is not None:
                raise ValueError(
                    f"space: {axis.keys[0]} is a range; sampler 'grid' needs its values, or take "
                    "'random' or 'tpe'."
                )
        for choices in itertools.product(*(axis.choices for axis in self.varying)):
            yield self.point({axis.name: choice for axis, choice in zip(self.varying, choices)})

    def corners(self) -> Iterator[Point]:
        """Yields points that together hold each value, and each end of a range, at least once."""
        ends = {
            axis.name: [axis.range.low, axis.range.high] if axis.range else axis.choices
            for axis in self.varying
        }
        for i in range(max(map(len, ends.values()), default=1)):
            yield self.point({name: some[min(i, len(some) - 1)] for name, some in ends.items()})

    def point(self, params: Mapping[str, Any]) -> Point:
        """Returns the point of a choice per axis that varies."""
        values: dict[str, Any] = {}
        for axis in self.axes:
            values |= axis.values(params[axis.name] if axis.varies else axis.choices[0])
        return Point(self.name, {axis.name: params[axis.name] for axis in self.varying}, values)


def parse(space: Any) -> tuple[Part, ...]:
    """Reads a space: a sequence of axes, or a mapping from names to such.

    Raises:
      ValueError: it is malformed.
    """
    if isinstance(space, Mapping) or hasattr(space, "items"):
        parts = tuple(_part(str(name), axes) for name, axes in space.items())
    else:
        parts = (_part("", space or ()),)
    if not parts or not all(part.axes for part in parts):
        raise ValueError("space is empty; it must hold at least one axis {key: values}.")
    return parts


def to_plain(parts: Sequence[Part]) -> Plain:
    """Returns what `parse` reads, ready for JSON."""
    return {part.name: [_plain_axis(axis) for axis in part.axes] for part in parts}


def all_choices(parts: Sequence[Part]) -> dict[str, list[Any]]:
    """The choices of each axis over all parts: Optuna wants them to be always the same."""
    found: dict[str, list[Any]] = {}
    for axis in (axis for part in parts for axis in part.axes if axis.range is None):
        known = found.setdefault(axis.name, [])
        known += [choice for choice in axis.choices if choice not in known]
    return found


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"model.num_layers": value, …} of nested mappings."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else None
        result |= {f"{prefix}{name}": value} if inner is None else inner
    return result


def _plain_axis(axis: Axis) -> dict[str, Any]:
    if axis.range is not None:
        low, high = axis.range.low, axis.range.high
        return {axis.keys[0]: {"low": low, "high": high, "log": axis.range.log}}
    return {key: [row[i] for row in axis.rows] for i, key in enumerate(axis.keys)}


def _part(name: str, axes: Any) -> Part:
    where = f"space {name!r}" if name else "space"
    if isinstance(axes, str) or not isinstance(axes, Sequence):
        raise ValueError(f"{where} is {axes!r}; it must be a tuple of axes {{key: values}}.")
    read = tuple(_axis(axis, where) for axis in axes)
    keys = [key for axis in read for key in axis.keys]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{where} sets {key} in two axes; it must be in one.")
        if key == "seed":
            raise ValueError(f"{where} holds the key seed; give config.seeds instead.")
    names = [axis.name for axis in read]
    for axis in read:
        if names.count(axis.name) > 1:
            raise ValueError(f"{where} has two axes that end in {axis.name}; join them into one.")
    return Part(name, read)


def _axis(axis: Any, where: str) -> Axis:
    if not isinstance(axis, Mapping) or not axis:
        raise ValueError(f"{where}: an axis is {axis!r}; it must be a dictionary {{key: values}}.")
    keys = tuple(axis)
    if isinstance(first := axis[keys[0]], Mapping):
        if len(keys) > 1:
            raise ValueError(f"{where}: a range must be alone in its axis, not with {keys[1]}.")
        return Axis(keys, range=_range(first, f"{where}: {keys[0]}"))
    for key, values in axis.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(
                f"{where}: {key} is {values!r}; it must be a tuple of values or a range."
            )
        if len(values) != len(first):
            raise ValueError(
                f"{where}: {keys[0]} has {len(first)} values and {key} {len(values)}; keys of one "
                "axis go together and must have the same number."
            )
    rows = tuple(zip(*(map(_tuples, values) for values in axis.values())))
    result = Axis(keys, rows)
    for i, choice in enumerate(choices := result.choices):
        if choice in choices[:i]:
            raise ValueError(f"{where}: {result.name} has the value {choice!r} twice.")
    return result


def _tuples(value: Any) -> Any:
    """JSON has lists where configurations have tuples."""
    return tuple(value) if isinstance(value, list) else value


def _range(given: Mapping[str, Any], where: str) -> Range:
    if set(given) != {"low", "high", "log"}:
        raise ValueError(f"{where} is {dict(given)!r}; make ranges with linear_range or log_range.")
    low, high, log = given["low"], given["high"], given["log"]
    for value in (low, high):
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(f"{where}: an end of the range is {value!r}; it must be a number.")
    if not low < high:
        raise ValueError(f"{where}: the range is from {low} to {high}; it must go upwards.")
    if log and low <= 0:
        raise ValueError(f"{where}: the range begins at {low}; a log_range must begin above 0.")
    return Range(low, high, bool(log), isinstance(low, int) and isinstance(high, int))

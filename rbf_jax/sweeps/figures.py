"""The figures of a sweep: one function each, results in, ``matplotlib.figure.Figure`` out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from rbf_jax.analysis.style import PALETTE, STYLE, LineStyle, variant
from rbf_jax.sweeps import results, space
from rbf_jax.sweeps.results import Group
from rbf_jax.sweeps.sweep import Sweep
from rbf_jax.sweeps.table import text

_WIDTH = 10.0  # Inches.
_COLUMNS = 3
_MOST_SERIES = 6
_MOST_TICKS = 9
_MOST_LETTERS = 36
# The best is darkest; the worst can still be seen.
_VALUES = LinearSegmentedColormap.from_list("values", ["#08306b", "#4d8fc4", "#c9d6e4"])


@dataclasses.dataclass(frozen=True)
class Scale:
    """Where choices lie on an axis of a figure."""

    axis: space.Axis
    numeric: bool
    log: bool
    shift: float = 0.0

    @classmethod
    def of(cls, axis: space.Axis) -> Scale:
        """Numbers lie at their values, logarithmic where they span a decade; the rest in order."""
        if axis.range is not None:
            return cls(axis, True, axis.range.log)
        choices = axis.choices
        if any(isinstance(c, bool) or not isinstance(c, int | float) for c in choices):
            return cls(axis, False, False)
        return cls(axis, True, min(choices) > 0 and max(choices) >= 10 * min(choices))

    def position(self, choice: Any) -> float:
        """Of a choice, for axes of matplotlib that know about the logarithm."""
        if not self.numeric:
            return self.axis.choices.index(choice) + 0.12 * self.shift
        return choice * 1.04**self.shift if self.log else choice + self.shift * self._span / 80

    def beside(self, shift: float) -> Scale:
        """The same, a little to the right, so that series do not lie on each other."""
        return dataclasses.replace(self, shift=shift)

    def fraction(self, choice: Any) -> float:
        """Of a choice, from 0 to 1."""
        low, high = self._ends
        here = self.position(choice)
        if self.log:
            low, high, here = math.log(low), math.log(high), math.log(here)
        return (here - low) / (high - low)

    def limits(self) -> tuple[float, float]:
        """The ends, and a little room."""
        low, high = self._ends
        if self.log:
            room = (high / low) ** 0.05
            return low / room, high * room
        return low - 0.05 * self._span, high + 0.05 * self._span

    def text(self, tick: Any) -> str:
        """Of a choice, or of a number of a range, which need not be exact."""
        return f"{tick:.2g}" if self.axis.range is not None and self.log else text(tick)

    @property
    def _ends(self) -> tuple[float, float]:
        if self.axis.range is not None:
            return self.axis.range.low, self.axis.range.high
        numbers = self.axis.choices if self.numeric else [0, len(self.axis.choices) - 1]
        return min(numbers), max(numbers)

    @property
    def _span(self) -> float:
        low, high = self._ends
        return high - low

    def ticks(self) -> list[Any]:
        """Choices, or numbers of a range, to be labelled."""
        if self.axis.range is None:
            return self.axis.choices[:: math.ceil(len(self.axis.choices) / _MOST_TICKS)]
        low, high = self.axis.range.low, self.axis.range.high
        spaced = np.geomspace(low, high, 5) if self.log else np.linspace(low, high, 5)
        return [int(x) for x in spaced] if self.axis.range.integer else [float(x) for x in spaced]


@mpl.rc_context(STYLE)
def parallel_figure(part: space.Part, groups: Sequence[Group], label: str) -> Figure | None:
    """A line a point through all parameters to its value; None with fewer than two parameters.

    Args:
      part: of the space.
      groups: its points.
      label: of the value.
    """
    done = sorted((g for g in groups if g.values), key=lambda group: -group.mean)
    if len(part.varying) < 2 or len(done) < 2:
        return None
    scales = [Scale.of(axis) for axis in part.varying]
    means = [group.mean for group in done]
    norm = Normalize(min(means), max(means) if max(means) > min(means) else min(means) + 1)
    figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for group in done:
        heights = [scale.fraction(group.point.params[scale.axis.name]) for scale in scales]
        heights.append(float(norm(group.mean)))
        axes.plot(heights, color=_VALUES(norm(group.mean)), linewidth=1.3, alpha=0.9)
    top = results.best(groups)
    if top is not None:
        heights = [scale.fraction(top.point.params[scale.axis.name]) for scale in scales]
        axes.plot(
            [*heights, float(norm(top.mean))], color="black", linewidth=2.6, marker="o", zorder=5
        )
    for x, scale in enumerate(scales):
        _labels(axes, x, [(scale.fraction(tick), scale.text(tick)) for tick in scale.ticks()])
    shown = np.linspace(norm.vmin or 0.0, norm.vmax or 1.0, 5)
    _labels(axes, len(scales), [(float(norm(value)), f"{value:.4f}") for value in shown])
    axes.set_xticks(range(len(scales) + 1), [*(s.axis.name for s in scales), label])
    axes.set(xlim=(-0.1, len(scales) + 0.25), ylim=(-0.05, 1.1), yticks=[])
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    return figure


def _labels(axes: Axes, x: float, labels: Sequence[tuple[float, str]]) -> None:
    """A vertical line with ticks and their names."""
    axes.plot([x, x], [0, 1], color="0.3", linewidth=0.8, zorder=3)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    for height, name in labels:
        axes.plot([x - 0.015, x + 0.015], [height] * 2, color="0.3", linewidth=0.8, zorder=3)
        axes.text(x + 0.03, height + 0.02, name, va="bottom", fontsize=8, bbox=box, zorder=6)


@mpl.rc_context(STYLE)
def parameters_figure(
    sweep: Sweep, part: space.Part, groups: Sequence[Group], label: str
) -> Figure | None:
    """A panel a parameter: mean value over the seeds, standard deviation as bars.

    With two parameters, the other one of few choices makes the lines. A cross at the upper edge
    marks a point of which a trial has failed, such as one that diverged.

    Args:
      sweep: what was trained.
      part: of its space.
      groups: its points.
      label: of the value.
    """
    axes_of_space = part.varying
    if not axes_of_space or not any(group.values for group in groups):
        return None
    columns = min(_COLUMNS, len(axes_of_space))
    rows = math.ceil(len(axes_of_space) / columns)
    figure = Figure(figsize=(_WIDTH * columns / _COLUMNS + 1.5, 3.6 * rows), layout="constrained")
    first = None
    for i, axis in enumerate(axes_of_space):
        panel = figure.add_subplot(rows, columns, i + 1, sharey=first)
        first = first or panel
        others = [other for other in axes_of_space if other is not axis]
        _panel(panel, sweep, axis, others, groups)
        panel.set_xlabel(axis.name)
        panel.set_ylabel(label if i % columns == 0 else "")
    return figure


def _panel(
    axes: Axes,
    sweep: Sweep,
    axis: space.Axis,
    others: Sequence[space.Axis],
    groups: Sequence[Group],
) -> None:
    scale = Scale.of(axis)
    other = others[0] if len(others) == 1 and 0 < len(others[0].rows) <= _MOST_SERIES else None
    lines = _lines(sweep, other, groups)
    for i, line in enumerate(lines):
        mine = [g for g in groups if other is None or g.point.params[other.name] == line.choice]
        mine.sort(key=lambda group: scale.position(group.point.params[axis.name]))
        joined = scale.numeric and axis.range is None and (other is not None or not others)
        _series(axes, scale.beside(i - (len(lines) - 1) / 2), mine, line, joined)
    if scale.log:
        axes.set_xscale("log")
    ticks = scale.ticks()
    axes.set_xticks([scale.position(tick) for tick in ticks], [scale.text(tick) for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.08)
    if axis.range is not None:
        axes.set_xlim(*scale.limits())
    if sum(len(scale.text(tick)) for tick in ticks) > _MOST_LETTERS:
        axes.tick_params(axis="x", rotation=30)
    if other is not None:
        # Above, where it hides no point.
        axes.legend(title=other.name, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def _series(axes: Axes, scale: Scale, groups: Sequence[Group], line: _Line, joined: bool) -> None:
    done = [group for group in groups if group.values]
    axes.errorbar(
        [scale.position(group.point.params[scale.axis.name]) for group in done],
        [group.mean for group in done],
        yerr=[group.deviation for group in done] if any(g.deviation for g in done) else None,
        color=line.style.color,
        linestyle=line.style.linestyle if joined else "none",
        marker=line.style.marker,
        capsize=2.5,
        elinewidth=1.0,
        label=line.label,
    )
    if failed := [group for group in groups if group.failed]:
        axes.plot(
            [scale.position(group.point.params[scale.axis.name]) for group in failed],
            [0.98] * len(failed),
            transform=axes.get_xaxis_transform(),
            color=line.style.color,
            linestyle="none",
            marker="x",
            markersize=6,
        )


@dataclasses.dataclass(frozen=True)
class _Line:
    """The points of one choice of another parameter, or all."""

    choice: Any
    label: str
    style: LineStyle


def _lines(sweep: Sweep, other: space.Axis | None, groups: Sequence[Group]) -> list[_Line]:
    """Kinds of attention have the project's names and colours; the rest is in shades of grey.

    Args:
      sweep: what was trained.
      other: the parameter that makes the lines, or None for one line.
      groups: the points.
    """
    choices = [None] if other is None else other.choices
    shades = np.linspace(0.1, 0.6, len(choices))
    greys = [
        dataclasses.replace(style, color=f"{shade:.2f}")
        for style, shade in zip(PALETTE.values(), shades)
    ]
    if other is None:
        return [_Line(None, "", greys[0])]
    kinds: list[set[str]] = []
    for choice in other.choices:
        mine = [g for g in groups if g.point.params[other.name] == choice]
        kinds.append({variant(sweep.config(g.point.values, 0)) for g in mine})
    names = [next(iter(kind)) for kind in kinds if len(kind) == 1]
    if len(set(names)) == len(kinds) > 1:
        return [_Line(c, name, PALETTE[name]) for c, name in zip(other.choices, names)]
    return [_Line(c, text(c), style) for c, style in zip(other.choices, greys)]

"""Parts of figures that several claims share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rbf_jax.analysis import paired
from rbf_jax.analysis.records import Record
from rbf_jax.analysis.style import PALETTE, STYLE, LineStyle, variant
from rbf_jax.nn.config import VIRTUAL_SINKS
from rbf_jax.nn.config import num_registers as registers_of

POSITIONS = {
    "none": "none",
    "learned": "learned",
    "rope": "RoPE",
    "susie": "SuSiE",
    "alibi": "ALiBi",
}


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """In the style of the project, whatever the user's is."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


def figure(rows: int, columns: int, width: float = 7.2, height: float = 2.6) -> tuple[Figure, Any]:
    """A figure and its axes, (rows, columns)."""
    made = Figure(figsize=(width, height * rows), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False)


def legend_above(made: Figure, axes: Axes, columns: int) -> None:
    """One legend for all panels, above them, of what one of them shows."""
    made.legend(
        *axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns, fontsize=7
    )


def kind(record: Record) -> str:
    """RBF, dot product, …: the key of the palette."""
    return variant(record.config)


def line_style(record: Record) -> LineStyle:
    """Of the record's kind."""
    return PALETTE[kind(record)]


def positions(record: Record) -> str:
    """As people write it."""
    return POSITIONS[record.config["model"]["positions"]]


def num_registers(record: Record) -> int:
    """R of the record's model."""
    return registers_of(record.config["model"])


def has_virtual_sink(record: Record) -> bool:
    """Whether the record's model has a virtual key with value 0, "origin" or "learned"."""
    return record.config["model"]["attention"]["sink"] in VIRTUAL_SINKS


def where(records: Sequence[Record], **wanted: Any) -> list[Record]:
    """Those whose model has these values, by the last part of the key; attention's too."""

    def value(record: Record, name: str) -> Any:
        model: Mapping[str, Any] = record.config["model"]
        if name == "num_registers":  # as it is counted, not as it is written
            return num_registers(record)
        return model[name] if name in model else model["attention"][name]

    return [r for r in records if all(value(r, k) == v for k, v in wanted.items())]


def the(records: Sequence[Record], **wanted: Any) -> Record | None:
    """The first of `where`, or None."""
    return next(iter(where(records, **wanted)), None)


def band(axes: Axes, x: np.ndarray, y: np.ndarray, style: LineStyle, label: str) -> None:
    """The mean over seeds of y (m, n) and the range of the seeds; diverged seeds are left out.

    Of many points some ten bear the marker, in each variant others, so that none hides another's.
    """
    alive = np.isfinite(y).all(0)
    lost = int((~alive).sum())
    if lost:
        label += f" ({lost} of {y.shape[1]} diverged)"
    y = y[:, alive]
    look = {"color": style.color, "linestyle": style.linestyle, "marker": style.marker}
    if not y.shape[1]:
        axes.plot([], [], **look, label=label)
        return
    every = max(1, len(x) // 10)
    places = list(PALETTE.values())
    first = every * places.index(style) // len(places) if style in places else 0
    axes.plot(x, y.mean(1), **look, markevery=(first, every), label=label)
    axes.fill_between(x, y.min(1), y.max(1), color=style.color, alpha=0.18, linewidth=0)


def rows(axes: Axes, labels: Sequence[str]) -> None:
    """A row for each label, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)


def forest(
    axes: Axes,
    labels: Sequence[str],
    estimates: Sequence[paired.Estimate],
    styles: Sequence[LineStyle],
    *,
    zero: bool = True,
) -> None:
    """A row for each estimate: the mean, its 95 % interval, and how many seeds diverged."""
    for row, (value, style) in enumerate(zip(estimates, styles)):
        if not value.n:
            axes.annotate("diverged", (0.5, row), xycoords=("axes fraction", "data"), va="center")
            continue
        if value.n > 1:
            axes.plot([value.low, value.high], [row, row], color=style.color, linewidth=1.3)
        axes.plot(value.mean, row, marker=style.marker, color=style.color, linestyle="")
        if value.missing:
            axes.annotate(
                f"{value.missing} diverged",
                (value.mean, row),
                xytext=(0, 4),
                textcoords="offset points",
                fontsize=6.5,
                ha="center",
            )
    if zero:
        axes.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    rows(axes, labels)
    axes.grid(axis="y", visible=False)


def limit_to_most(axes: Axes, estimates: Sequence[paired.Estimate]) -> None:
    """Keeps means and most intervals in sight: one ten times as wide as the median runs out."""
    known = [e for e in estimates if e.n > 1]
    most = 10 * float(np.median([e.high - e.low for e in known] or [0]))
    ends = [x for e in known if e.high - e.low <= most for x in (e.low, e.high)]
    ends += [e.mean for e in known]
    low, high = min(ends, default=0), max(ends, default=0)
    if low < high:
        axes.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def result_numbers(records: Sequence[Record], reference: Record | None) -> dict[str, Any]:
    """What a text quotes of each record: losses, differences to the reference, spikes."""
    found: dict[str, Any] = {}
    for record in records:
        numbers: dict[str, Any] = {
            "final_loss": paired.as_numbers(paired.estimate(paired.loss(record))),
            "best_loss": paired.as_numbers(paired.estimate(paired.loss(record, "best"))),
            "spikes": paired.as_numbers(paired.estimate(paired.spikes(record))),
            "seeds": list(record.seeds),
        }
        if reference is not None and record is not reference:
            numbers["reference"] = reference.name
            for which in ("final", "best"):
                value = paired.difference(record, reference, which)
                numbers[f"{which}_difference"] = paired.as_numbers(value)
            numbers["steps_saved"] = paired.as_numbers(paired.steps_saved(record, reference))
        found[record.name] = numbers
    return found

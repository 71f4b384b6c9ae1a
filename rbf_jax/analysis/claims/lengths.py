"""Contexts longer than those trained at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator

from rbf_jax.analysis import paired
from rbf_jax.analysis.claims import panels
from rbf_jax.analysis.claims.panels import band, figure, kind, line_style, styled, the, where
from rbf_jax.analysis.records import Record
from rbf_jax.analysis.style import PALETTE, LineStyle

# Positions that have a panel for themselves, with all kinds of attention.
_OWN = ("susie", "rope")
# The others share one: the line and the marker say which positions, the colour which attention.
_SHARED: dict[str, tuple[Any, str]] = {
    "none": ("-", "o"),
    "learned": ((0, (1, 1)), "s"),
    "alibi": ((0, (5, 1.5)), "v"),
}


@styled
def lengths(records: Sequence[Record]) -> tuple[Figure, dict[str, Any]]:
    """Loss at longer contexts: SuSiE and RoPE with all kinds of attention, other positions."""
    made, axes = figure(1, 3, height=3.0)
    evaluated = sorted((record for record in records if record.lengths), key=_place)
    for axis, positions in zip(axes[0], _OWN):
        for record in where(evaluated, positions=positions):
            _curve(axis, record, line_style(record))
        axis.set_title(panels.POSITIONS[positions])
    others = [r for name in _SHARED for r in where(evaluated, positions=name)]
    for record in others:
        line, marker = _SHARED[record.config["model"]["positions"]]
        color = line_style(record).color
        _curve(axes[0, 2], record, LineStyle(color, line, marker, ""))
    axes[0, 2].set_title("Other positions")
    for axis in axes[0]:
        axis.set_xscale("log", base=2)
        axis.set(xlabel="context, tokens", yscale="log")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_locator(MultipleLocator(1))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    axes[0, 0].set_ylabel("validation loss, nats per token")
    _limit(axes[0], evaluated)
    _legends(made, axes[0], evaluated, others)
    return made, {record.name: _numbers(record, evaluated) for record in evaluated}


def lengths_table(numbers: Mapping[str, Any]) -> str:
    """Markdown: a row for each variant of `lengths`."""
    at = sorted({int(n) for row in numbers.values() for n in row["losses"]})
    if len(at) < 2:
        return ""
    span = f"{at[0]:,} to {at[-1]:,}"
    lines = [
        f"| | {' | '.join(f'loss at {n:,}' for n in at)} | lost from {span} | RBF's less that |",
        "|---|" + "---:|" * (len(at) + 2),
    ]
    for row in numbers.values():
        if "lost" not in row:
            continue
        losses = " | ".join(f"{row['losses'][str(n)]['mean']:.3f}" for n in at)
        against = row.get("rbf_less")
        cells = [
            paired.interval(value, 3) if value and value["n"] else ""
            for value in (row["lost"], against)
        ]
        lines.append(f"| {row['label']} | {losses} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _place(record: Record) -> tuple[int, int]:
    """In the table: by positions, then by kind of attention."""
    order = [*_OWN, *_SHARED]
    return order.index(record.config["model"]["positions"]), list(PALETTE).index(kind(record))


def _curve(axis: Axes, record: Record, style: LineStyle) -> None:
    at = sorted(record.lengths)
    values = np.array([record.lengths[length] for length in at])  # (lengths, n)
    band(axis, np.array(at), values, style, kind(record))


def _limit(axes: Sequence[Axes], records: Sequence[Record]) -> None:
    """The same for all; those that have no longer contexts may run out of the picture."""
    goes_on = [np.array([*r.lengths.values()]) for r in records if len(r.lengths) > 1]
    finite = [v[np.isfinite(v)] for v in goes_on if np.isfinite(v).any()]
    if finite:
        low, high = min(v.min() for v in finite), max(v.max() for v in finite)
        for axis in axes:
            axis.set_ylim(low * 0.97, high * 1.03)


def _legends(
    made: Figure, axes: Sequence[Axes], records: Sequence[Record], others: Sequence[Record]
) -> None:
    """Kinds of attention above; in the last panel its kinds of positions."""
    kinds = {kind(r): line_style(r) for r in records}
    if kinds:
        handles = [
            Line2D([], [], color=s.color, linestyle=s.linestyle, marker=s.marker, label=name)
            for name, s in kinds.items()
        ]
        made.legend(handles=handles, loc="outside upper center", ncols=len(kinds), fontsize=7)
    shown = dict.fromkeys(r.config["model"]["positions"] for r in others)
    if shown:
        handles = [
            Line2D([], [], color="0.3", linestyle=line, marker=marker, label=panels.POSITIONS[name])
            for name, (line, marker) in _SHARED.items()
            if name in shown
        ]
        axes[-1].legend(handles=handles, fontsize=7, loc="upper left")


def _numbers(record: Record, records: Sequence[Record]) -> dict[str, Any]:
    losses = {
        str(length): paired.as_numbers(paired.estimate(record.lengths[length]))
        for length in sorted(record.lengths)
    }
    where_from = panels.positions(record)
    label = f"{kind(record)}, {'no positions' if where_from == 'none' else where_from}"
    found: dict[str, Any] = {"label": label, "losses": losses}
    if len(record.lengths) < 2:
        return found
    found["lost"] = paired.as_numbers(paired.estimate(_lost(record)))
    model = record.config["model"]
    rbf = the(records, kind="rbf", qk_norm=False, positions=model["positions"])
    if rbf is not None and rbf is not record and len(rbf.lengths) > 1:
        found["rbf_less"] = paired.as_numbers(paired.estimate(_lost(rbf) - _lost(record)))
    return found


def _lost(record: Record) -> np.ndarray:
    """Loss (n,) at the longest context less that at the shortest."""
    return record.lengths[max(record.lengths)] - record.lengths[min(record.lengths)]

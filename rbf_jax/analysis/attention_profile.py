"""The profile of attention: time and memory against T, of the GPU suite's JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

from rbf_jax.analysis.style import PALETTE, STYLE, LineStyle

# Names as the JSON file and its tables have them. RBF is blue and the dot product orange, as
# everywhere, and their implementations shades of that, in no colour of another variant.
STYLES: Mapping[str, LineStyle] = {
    "dot product, cuDNN": PALETTE["dot product"],
    "RBF mosaic": PALETTE["RBF"],
    "RBF triton": LineStyle("#2b5c99", (0, (1, 1.2)), "h", ""),
    "RBF cudnn": LineStyle("#5b9bd5", (0, (7, 1.5)), "d", ""),
    "RBF xla": LineStyle("#2171b5", (0, (6, 1.5, 1, 1.5)), "<", ""),
    "RBF FlexAttention": LineStyle("#8fbfe0", (0, (3, 1.3, 1, 1.3)), "p", ""),
    "dot product, jax.nn xla": LineStyle("#9a5200", (0, (1, 1.2)), ">", ""),
    "RBF reference": LineStyle("0.45", (0, (2, 1)), "X", ""),
}
_OTHER = LineStyle("0.2", "-", "*", "")
_SIZE = (10.0, 3.5)
_LIMIT = "_limit"  # The underscore keeps it out of the legend.


def group(content: Mapping[str, Any], head_dim: int, causal: bool) -> list[Mapping[str, Any]]:
    """The timed rows of one head dimension and causality.

    Raises:
      ValueError: there are none.
    """
    rows = [
        row
        for row in content["results"]
        if (row["head_dim"], row["causal"]) == (head_dim, causal) and row["milliseconds"]
    ]
    if not rows:
        there = sorted({(row["head_dim"], row["causal"]) for row in content["results"]})
        raise ValueError(
            f"no time was measured at H = {head_dim}, causal = {causal}; measured (H, causal): "
            f"{there}."
        )
    return rows


@mpl.rc_context(STYLE)
def profile_figure(content: Mapping[str, Any], head_dim: int = 64, causal: bool = True) -> Figure:
    """Time of forward and backward, and memory, against T; all axes logarithmic.

    Args:
      content: of the JSON file that `experiments.bench_attention --suite=gpu` writes.
      head_dim: H of the times.
      causal: of the times.

    Raises:
      ValueError: there is no such measurement.
    """
    rows = group(content, head_dim, causal)
    figure = Figure(figsize=_SIZE, layout="constrained")
    forward, backward, memory = figure.subplots(1, 3)
    forward_times = times(rows, "forward")
    both = times(rows, "forward+backward")
    for name, by_length in forward_times.items():
        _line(forward, by_length, name)
    for name, by_length in both.items():
        before = forward_times.get(name, {})
        rest = {T: ms - before[T] for T, ms in by_length.items() if T in before}
        # Two medians' difference may come out negative where both are tiny.
        _line(backward, {T: ms for T, ms in rest.items() if ms > 0}, name)
    _memory(memory, content["memory"])
    kind = "causal" if causal else "full"
    settings = content["settings"]
    where = f"H {head_dim}, {kind}, B·T = {settings['tokens']:,}, N·H = {settings['width']:,}"
    forward.set(title="Forward", ylabel="device time (ms)")
    backward.set(title="Backward", ylabel="device time (ms)")
    memory.set(title="Memory, forward + backward", ylabel="temporaries (MiB)")
    for axes in (forward, backward, memory):
        axes.set_xlabel("T")
        _logarithmic(axes)
    handles = {str(h.get_label()): h for axes in (forward, backward, memory) for h in axes.lines}
    handles.pop(_LIMIT, None)
    labels = list(dict.fromkeys(name for name in [*STYLES, *handles] if name in handles))
    figure.legend([handles[name] for name in labels], labels, loc="outside upper center", ncols=4)
    figure.supxlabel(
        f"Times: {where}, {content['dtype']}; memory: B 1, N 8, H 64, causal. "
        f"{content['device']}, jax {content['versions'].get('jax', '?')}, {content['date'][:10]}",
        fontsize=7.5,
        color="0.3",
    )
    return figure


def times(rows: Sequence[Mapping[str, Any]], direction: str) -> dict[str, dict[int, float]]:
    """Milliseconds by implementation and T."""
    found: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["length"]):
        if row["direction"] == direction:
            found.setdefault(row["implementation"], {})[row["length"]] = row["milliseconds"]
    return found


def _memory(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line per implementation, with a note where it needs more than there is."""
    below = 0
    for name in dict.fromkeys(row["implementation"] for row in rows):
        own = [row for row in rows if row["implementation"] == name]
        # A program without temporaries has no place on a logarithmic axis.
        sizes = {
            row["length"]: row["temporary_bytes"] / 2**20
            for row in own
            if row["error"] is None and row["temporary_bytes"] > 0
        }
        _line(axes, sizes, name)
        if sizes and (note := _end(own)):
            axes.annotate(
                note,
                max(sizes.items()),
                xytext=(5, 4 if below else -10),
                textcoords="offset points",
                fontsize=7,
                color=STYLES.get(name, _OTHER).color,
            )
            below += 1
    for limit in {row["bytes_limit"] for row in rows} - {None}:
        axes.axhline(limit / 2**20, color="0.5", linewidth=0.8, linestyle=":", label=_LIMIT)
        place: Any = {"xytext": (2, 2), "textcoords": "offset points", "fontsize": 7}
        across = axes.get_yaxis_transform()
        axes.annotate("this GPU", (0, limit / 2**20), xycoords=across, color="0.3", **place)


def _end(rows: Sequence[Mapping[str, Any]]) -> str:
    """Why an implementation's line ends where it does; "" if it does not end early."""
    if any("RESOURCE_EXHAUSTED" in (row["error"] or "") for row in rows):
        return "runs out beyond"
    return "runs out" if any(row.get("runs_out") for row in rows) else ""


def _line(axes: Axes, by_length: Mapping[int, float], name: str) -> None:
    if by_length:
        style = STYLES.get(name, _OTHER)
        axes.plot(
            list(by_length),
            list(by_length.values()),
            color=style.color,
            linestyle=style.linestyle,
            marker=style.marker,
            label=name,
        )


def _logarithmic(axes: Axes) -> None:
    """Ticks at the lengths that were measured, some of them if there are many."""
    axes.set(xscale="log", yscale="log")
    lines = [line for line in axes.lines if line.get_label() != _LIMIT]
    lengths = sorted({int(T) for line in lines for T in np.asarray(line.get_xdata())})
    shown = lengths[:: 1 + len(lengths) // 5]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticklabels([f"{T:,}" if T < 10_000 else f"{T // 1024}k" for T in shown])

"""The figures of one trained model: what its heads do, and how large its keys and values are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rbf_jax.analysis.diagnostics import QUANTILES
from rbf_jax.analysis.figures import WIDTH
from rbf_jax.analysis.style import REGISTER_COLOR, STYLE, WEIGHTS_COLORMAP, LineStyle

# Heads that a heat table of a third, of half, of all of a figure's width has room for.
_HEADS = {3: 8, 2: 16, 1: math.inf}
# Of all layers; the numbers of more would not be legible.
_NUMBERED_HEADS = 48
# Of no variant's colour.
_FIRST_TOKEN_COLOR = "0.15"


@dataclasses.dataclass(frozen=True)
class HeadTable:
    """A number for each head of each layer.

    Attributes:
      values: (L, N).
      form: how a number is written, for `format`.
      top: what is drawn darkest, at least.
    """

    values: np.ndarray
    form: str
    top: float

    @property
    def is_share(self) -> bool:
        """Whether it is a part of 1."""
        return self.form.endswith("%")


@mpl.rc_context(STYLE)
def heads_figure(tables: Mapping[str, HeadTable]) -> Figure:
    """Heat tables, a row a layer and a column a head; from 0, the darker the larger.

    Shares are shaded by their square root, as weights in `rbf_jax.analysis.figures`: a tenth shows.

    Args:
      tables: by title.
    """
    layers, heads = next(iter(tables.values())).values.shape
    columns = min(len(tables), next(n for n, most in _HEADS.items() if heads <= most))
    rows = math.ceil(len(tables) / columns)
    height = 0.75 + max(0.2, 0.34 - 0.01 * layers) * layers
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    cell = 0.85 * WIDTH / columns / heads
    for i, (title, table) in enumerate(tables.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        norm = PowerNorm(0.5 if table.is_share else 1.0, 0.0, max(table.top, table.values.max()))
        axes.imshow(table.values, cmap=WEIGHTS_COLORMAP, norm=norm, aspect="auto")
        for (layer, head), value in np.ndenumerate(table.values):
            axes.text(
                head,
                layer,
                format(value, table.form),
                ha="center",
                va="center",
                # A character is some 0.6 of its size wide, and a number has up to five.
                fontsize=min(8.0, 72 * cell / (0.6 * 5.5)),
                color="white" if norm(value) > 0.55 else "0.1",
            )
        axes.set(title=title, xlabel="head", ylabel="layer")
        axes.set(xticks=range(heads), yticks=range(layers))
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    return figure


@mpl.rc_context(STYLE)
def norms_figure(numbers: Mapping[str, np.ndarray], style: LineStyle) -> Figure:
    """Norms of keys and of values by layer: text's quantiles, and what may be a sink beside them.

    Args:
      numbers: what `diagnose` says.
      style: the colour of the text's.
    """
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    registers: dict[str, Any] = {"marker": "D", "color": REGISTER_COLOR, "linestyle": ""}
    registers |= {"markerfacecolor": "none", "markersize": 4.5}
    first: dict[str, Any] = {"marker": "X", "color": _FIRST_TOKEN_COLOR, "linestyle": ""}
    first |= {"markersize": 5.5}
    for axes, name, symbol in zip(panels, ("key", "value"), ("‖k‖", "‖v‖")):
        quantiles = numbers[f"{name}_norm_quantiles"]
        x = np.arange(len(quantiles))
        _quantile_bars(axes, x - 0.12, quantiles, style)
        first_norms = numbers[f"first_token_{name}_norm"]
        axes.plot(x + 0.06, first_norms, **first)
        register_norms = numbers[f"register_{name}_norm"]
        axes.plot(x + 0.2, register_norms, **registers, clip_on=False)
        axes.set(title=f"Norms of {name}s", xlabel="layer", ylabel=symbol)
        axes.set(xticks=x, xlim=(-0.5, len(x) - 0.5))
        axes.grid(visible=False, axis="x")
        _scale(axes, np.concatenate([a.ravel() for a in (quantiles, first_norms, register_norms)]))
    text: dict[str, Any] = {"color": style.color, "solid_capstyle": "butt"}
    handles = [
        Line2D([], [], linewidth=0.9, label="text, 1 to 99 %", **text),
        Line2D([], [], linewidth=5, alpha=0.5, label="quartiles", **text),
        Line2D([], [], marker="o", linestyle="", label="median", **text),
        Line2D([], [], marker="_", linestyle="", label="least, largest", **text),
        Line2D([], [], label="first tokens, mean", **first),
    ]
    if numbers["register_key_norm"].size:
        handles.append(Line2D([], [], label="registers, each", **registers))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _quantile_bars(axes: Axes, x: np.ndarray, quantiles: np.ndarray, style: LineStyle) -> None:
    """(L, 9) quantiles, a bar a layer."""
    by = dict(zip(QUANTILES, quantiles.T))
    axes.vlines(x, by[0.01], by[0.99], color=style.color, linewidth=0.9)
    axes.vlines(x, by[0.25], by[0.75], color=style.color, linewidth=5, alpha=0.5)
    axes.plot(x, by[0.5], marker="o", color=style.color, linestyle="")
    for end in (0.0, 1.0):
        axes.plot(x, by[end], marker="_", color=style.color, linestyle="")


def _scale(axes: Axes, values: np.ndarray) -> None:
    """From 0, or logarithmic where most would be squeezed into the bottom."""
    values = values[np.isfinite(values)]
    low, high = values.min(initial=math.inf), values.max(initial=0.0)
    if high > 30 * low > 0:
        axes.set(yscale="log", ylim=(low / 1.3, high * 1.3))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, 1.08 * high or 1.0)


@mpl.rc_context(STYLE)
def gamma_figure(panels: Mapping[str, tuple[np.ndarray, float, str]], style: LineStyle) -> Figure:
    """γ and λ of every head, by layer.

    Args:
      panels: by symbol, (L, N) values, that at the start, and how it went on from there.
      style: the colour of the heads.
    """
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    for axes, (symbol, (values, start, how)) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels.items()
    ):
        layers, heads = values.shape
        offsets = 0.7 * ((np.arange(heads) + 0.5) / heads - 0.5)
        axes.axhline(start, color="0.35", linestyle=(0, (4, 2)), linewidth=1.0)
        for layer, row in enumerate(values):
            axes.plot(layer + offsets, row, marker=style.marker, color=style.color, linestyle="")
            if values.size <= _NUMBERED_HEADS:
                _number_heads(axes, layer + offsets, row)
        axes.set(title=f"{symbol}, {how}", xlabel="layer")
        axes.set(ylabel=symbol, xticks=range(layers), xlim=(-0.5, layers - 0.5))
        low, high = min(values.min(), start), max(values.max(), start)
        margin = 0.18 * (high - low) or 0.5 * abs(high) or 0.5
        axes.set_ylim(low - margin, high + margin)
        axes.grid(visible=False, axis="x")
        for border in np.arange(layers - 1) + 0.5:
            axes.axvline(border, color="0.85", linewidth=0.6)
    handles = [
        Line2D([], [], color=style.color, marker=style.marker, linestyle="", label="a head"),
        Line2D([], [], color="0.35", linestyle=(0, (4, 2)), linewidth=1.0, label="at the start"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def _number_heads(axes: Axes, x: Sequence[float] | np.ndarray, y: np.ndarray) -> None:
    """Writes each head's number above its mark."""
    for head, place in enumerate(zip(x, y)):
        axes.annotate(
            str(head),
            place,
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=6.5,
            color="0.3",
        )

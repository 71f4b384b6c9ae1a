"""The figures of a comparison: one function each, data in, ``matplotlib.figure.Figure`` out.

Only matplotlib's object interface is used, so that no figure lives in global state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from rbf_jax.analysis.runs import Columns, Run
from rbf_jax.analysis.style import (
    MASKED_COLOR,
    REGISTER_COLOR,
    STYLE,
    WEIGHTS_COLORMAP,
    LineStyle,
    line_styles,
)

METRIC_LABELS = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte"}
_WIDTH = 10.0  # Inches; a report shows a figure at about 900 pixels.


@mpl.rc_context(STYLE)
def loss_figure(runs: Sequence[Run], metric: str = "loss") -> Figure:
    """Training and validation loss against steps and time, and the difference to the first run.

    Args:
      runs: the runs; the first is the one that differences refer to.
      metric: "loss", or "bits_per_byte" where losses per token cannot be compared.
    """
    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    by_step, by_time, difference = figure.subplots(1, 3)
    unit, unit_name = _time_unit(runs)
    for run, style in _styled(runs):
        for axes, x, scale in ((by_step, "step", 1.0), (by_time, "seconds", unit)):
            if metric in run.train and x in run.train:
                _line(axes, run.train[x] / scale, smooth(run.train[metric]), style, thin=True)
            if metric in run.valid and x in run.valid:
                _line(axes, run.valid[x] / scale, run.valid[metric], style)
        if run is not runs[0]:
            _line(difference, *_difference(run.valid, runs[0].valid, metric), style)
    first = _styled(runs)[0][1]
    difference.axhline(0.0, color=first.color, linestyle=first.linestyle, linewidth=1.5)
    label = METRIC_LABELS[metric]
    for axes, x_label in ((by_step, "step"), (by_time, f"training time ({unit_name})")):
        axes.set(xlabel=x_label, ylabel=label, xlim=(0, None))
        _limit_to_validation(axes, runs, metric)
    by_step.set_title("Loss by step")
    by_time.set_title("Loss by wall time")
    difference.set(title=f"Validation, minus {plain(runs[0].name)}", xlabel="step", xlim=(0, None))
    difference.set_ylabel(f"difference in {label}")
    marks = {"validation": {"linewidth": 1.5}, "training, smoothed": {"linewidth": 0.8, "alpha": 0.6}}
    extra = [Line2D([], [], color="0.3", label=name, **mark) for name, mark in marks.items()]
    _legend(figure, runs, extra)
    return figure


_STABILITY = (
    ("grad_norm", "Gradient norm", "norm of the gradient", "log"),
    ("logit_max", "Largest logit", "largest logit (nats)", "linear"),
    ("key_norm_max", "Largest key norm", "largest ‖k‖", "linear"),
    ("register_norm", "Norm of the registers", "‖register embeddings‖", "linear"),
)


@mpl.rc_context(STYLE)
def stability_figure(runs: Sequence[Run]) -> Figure | None:
    """What shows instability early, against steps; None if no run has logged any of it."""
    panels = [panel for panel in _STABILITY if any(_has(run.train, panel[0]) for run in runs)]
    if not panels:
        return None
    figure = Figure(figsize=(_WIDTH, 0.5 + 2.6 * ((len(panels) + 1) // 2)), layout="constrained")
    for i, (key, title, label, scale) in enumerate(panels):
        axes = figure.add_subplot((len(panels) + 1) // 2, 2, i + 1)
        for run, style in _styled(runs):
            if _has(run.train, key):
                _line(axes, run.train["step"], run.train[key], style)
        axes.set(title=title, xlabel="step", ylabel=label, xlim=(0, None))
        axes.set_yscale(scale)
    _legend(figure, runs)
    return figure


_LEARNED = (("gamma", "γ", "learn_gamma"), ("key_norm_weight", "λ", "learn_key_norm_weight"))


@mpl.rc_context(STYLE)
def learned_figure(runs: Sequence[Run]) -> Figure | None:
    """γ and λ of each layer against steps, one thin line a head; None if no run learns them."""
    rows = []
    for key, symbol, flag in _LEARNED:
        learning = [run for run in runs if run.config["model"]["attention"].get(flag)]
        layers = dict.fromkeys(name for run in learning for name in run.train if name.startswith(f"{key}/"))
        if layers:
            rows.append((key, symbol, learning, sorted(layers)))
    if not rows:
        return None
    columns = max(len(layers) for *_, layers in rows)
    figure = Figure(figsize=(_WIDTH, 0.5 + 2.3 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey="row")
    for axes_row, (key, symbol, learning, layers) in zip(grid, rows):
        for axes, layer in zip(axes_row, layers):
            for run, style in _styled(runs):
                if run in learning and layer in run.train:
                    values = run.train[layer].reshape(len(run.train["step"]), -1)
                    for head in values.T:
                        _line(axes, run.train["step"], head, style, thin=values.shape[1] > 1)
                    if values.shape[1] > 1:
                        _line(axes, run.train["step"], values.mean(1), style)
            axes.set_title(f"{symbol}, {layer.removeprefix(f'{key}/')}")
        axes_row[0].set_ylabel(symbol)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    _legend(figure, runs)
    return figure


@mpl.rc_context(STYLE)
def key_norm_figure(
    runs: Sequence[Run], text: Sequence[np.ndarray], registers: Sequence[np.ndarray]
) -> Figure:
    """Distribution of the key norms of text tokens per layer, and the registers' norms beside it.

    Args:
      runs: n runs.
      text: n arrays (L, samples), ‖k‖ of text tokens.
      registers: n arrays (L, R · K), ‖k‖ of register tokens; (L, 0) without registers.
    """
    layers = max(len(norms) for norms in text)
    width = 0.8 / len(runs)
    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, ((_, style), norms, register_norms) in enumerate(zip(_styled(runs), text, registers)):
        x = np.arange(len(norms)) + (i - (len(runs) - 1) / 2) * width
        _violins(axes, x, norms, 0.85 * width, style)
        for position, row in zip(x, register_norms):
            axes.plot(
                np.full(len(row), position), row, "D", color=REGISTER_COLOR, markeredgecolor="white",
                markeredgewidth=0.6, markersize=5, clip_on=False, zorder=4,
            )  # fmt: skip
    axes.set(xlabel="layer", ylabel="key norm ‖k‖", xticks=range(layers), ylim=(0, None))
    axes.grid(visible=False, axis="x")
    handles: list[Any] = [
        Patch(facecolor=_lighter(style), edgecolor=style.color, hatch=style.hatch, label=plain(run.name))
        for run, style in _styled(runs)
    ]
    handles.append(Line2D([], [], color="0.2", linewidth=1.2, label="median, quartiles"))
    if any(row.size for row in registers):
        mark = {"marker": "D", "color": REGISTER_COLOR, "linestyle": "", "markeredgecolor": "white"}
        handles.append(Line2D([], [], label="register tokens, one a head", **mark))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """Attention weights of one model for one text.

    Attributes:
      weights: (L, N, T, R + T), columns of registers first.
      sink: (L, N, T), weight of the origin sink; None without one.
      tokens: T strings, how the tokens are written.
    """

    weights: np.ndarray
    sink: np.ndarray | None
    tokens: Sequence[str]

    @property
    def num_registers(self) -> int:
        """R."""
        return self.weights.shape[-1] - self.weights.shape[-2]

    @property
    def columns(self) -> list[str]:
        """Labels of the columns: sink, registers, tokens."""
        sink = [] if self.sink is None else ["sink"]
        return [*sink, *(f"r{i}" for i in range(self.num_registers)), *self.tokens]

    def panel(self, layer: int, head: int) -> np.ndarray:
        """(T, columns) weights; NaN where a later token would be."""
        panel = np.array(self.weights[layer, head], np.float64)
        later = np.triu(np.ones((len(panel), len(panel)), bool), 1)
        panel[:, self.num_registers :][later] = np.nan
        if self.sink is not None:
            panel = np.concatenate([self.sink[layer, head][:, None], panel], axis=1)
        return panel


@mpl.rc_context(STYLE)
def attention_figure(attention: AttentionMap, title: str) -> Figure:
    """Attention weights, a panel a layer (row) and head (column); rows of a panel are queries."""
    layers, heads, length, _ = attention.weights.shape
    side = float(np.clip(9.2 / heads, 1.1, 3.0))
    figure = Figure(figsize=(side * heads + 1.3, side * layers + 1.0), layout="constrained")
    grid = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    special = len(attention.columns) - length
    image = None
    for layer, head in np.ndindex(layers, heads):
        axes = grid[layer, head]
        colors = mpl.colormaps[WEIGHTS_COLORMAP].with_extremes(bad=MASKED_COLOR)
        image = axes.imshow(
            attention.panel(layer, head), cmap=colors, norm=PowerNorm(0.5, 0.0, 1.0), aspect="auto",
            interpolation="none",
        )  # fmt: skip
        if special:
            axes.axvline(special - 0.5, color=REGISTER_COLOR, linewidth=0.8)
        axes.set_title(f"layer {layer}, head {head}")
        axes.grid(visible=False)
        axes.spines[:].set_visible(True)
    _label_tokens(grid, attention, side)
    figure.colorbar(image, ax=grid, label="attention weight", ticks=[0, 0.05, 0.25, 0.5, 1], aspect=40)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    figure.supxlabel("key" + (" (red: registers and sink)" if special else ""), fontsize=8.5)
    figure.supylabel("query", fontsize=8.5)
    return figure


def _label_tokens(grid: np.ndarray, attention: AttentionMap, side: float) -> None:
    """Writes the tokens along the outer panels if there is room for them, else counts them."""
    columns = attention.columns
    special = len(columns) - len(attention.tokens)
    size = min(7.0, 0.85 * 72 * 0.9 * side / len(columns))
    if size >= 3.2:
        x_ticks, y_ticks = range(len(columns)), range(len(attention.tokens))
        x_labels, y_labels = [plain(c) for c in columns], [plain(t) for t in attention.tokens]
    else:
        size, marks = 7.0, range(0, len(attention.tokens), max(1, len(attention.tokens) // 4))
        x_ticks = [*range(special), *(special + mark for mark in marks)]
        y_ticks = list(marks)
        x_labels, y_labels = [*columns[:special], *map(str, marks)], [str(mark) for mark in marks]
    rotation = 90 if max(map(len, x_labels)) > 1 else 0
    for axes in grid[-1]:
        axes.set_xticks(x_ticks, x_labels, fontsize=size, rotation=rotation)
        for label in axes.get_xticklabels()[:special]:
            label.set(color=REGISTER_COLOR, fontweight="bold", rotation=90)
    for axes in grid[:, 0]:
        axes.set_yticks(y_ticks, y_labels, fontsize=size)
    for axes in grid.flat:
        axes.tick_params(length=0 if size < 7 else 2, pad=1)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean of (n,) over about a fortieth of the points, narrower at the ends."""
    half = len(values) // 80
    valid = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(valid, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(valid)])
    i = np.arange(len(values))
    reach = np.minimum(half, np.minimum(i, len(values) - 1 - i))
    low, high = i - reach, i + reach + 1
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: no mathematics, no label hidden by its underscore."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _styled(runs: Sequence[Run]) -> list[tuple[Run, LineStyle]]:
    return list(zip(runs, line_styles([run.config for run in runs])))


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, style: LineStyle, thin: bool = False) -> None:
    """A curve with some markers along it; a thin one without."""
    marks = {"linewidth": 0.8, "alpha": 0.6}
    if not thin:
        marks = {"marker": style.marker, "markevery": max(1, len(x) // 12), "zorder": 3}
    axes.plot(x, y, color=style.color, linestyle="-" if thin else style.linestyle, **marks)


def _legend(figure: Figure, runs: Sequence[Run], extra: Iterable[Line2D] = ()) -> None:
    handles = [
        Line2D([], [], color=s.color, linestyle=s.linestyle, marker=s.marker, label=plain(run.name))
        for run, s in _styled(runs)
    ]
    handles.extend(extra)
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6))


def _has(columns: Columns, key: str) -> bool:
    return key in columns and bool(np.isfinite(columns[key]).any())


def _difference(curve: Columns, base: Columns, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a curve minus another one, where the other one reaches."""
    if metric not in curve or metric not in base:
        return np.array([]), np.array([])
    steps = curve["step"]
    inside = (steps >= base["step"][0]) & (steps <= base["step"][-1])
    return steps[inside], (curve[metric] - np.interp(steps, base["step"], base[metric]))[inside]


def _limit_to_validation(axes: Axes, runs: Sequence[Run], metric: str) -> None:
    """Keeps the first steps, where training losses fall from log V, from squeezing all the rest."""
    values = [run.valid[metric] for run in runs if _has(run.valid, metric)]
    shown = [smooth(run.train[metric])[-1:] for run in runs if _has(run.train, metric)]
    if values:
        both = np.concatenate([*values, *shown])
        low, high = np.nanmin(both), np.nanmax(np.concatenate(values))
        margin = 0.08 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


def _time_unit(runs: Sequence[Run]) -> tuple[float, str]:
    """Seconds in the unit that suits the longest run, and its name."""
    longest = max((np.nanmax(run.train["seconds"]) for run in runs if _has(run.train, "seconds")), default=0)
    if longest > 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if longest > 180 else (1.0, "seconds")


def _lighter(style: LineStyle) -> tuple[float, ...]:
    return tuple(0.45 + 0.55 * part for part in mpl.colors.to_rgb(style.color))


def _violins(axes: Axes, x: np.ndarray, norms: np.ndarray, width: float, style: LineStyle) -> None:
    parts: Mapping[str, Any] = axes.violinplot(list(norms), x, widths=width, showextrema=False)
    for body in parts["bodies"]:
        body.set(facecolor=_lighter(style), edgecolor=style.color, hatch=style.hatch, alpha=1.0)
    low, middle, high = np.quantile(norms, [0.25, 0.5, 0.75], axis=1)
    axes.vlines(x, low, high, color="0.2", linewidth=1.2)
    axes.plot(x, middle, "o", color="0.2", markersize=3.5)

"""The figures of a comparison: one function each, data in, ``matplotlib.figure.Figure`` out.

Only matplotlib's object interface is used, so that no figure lives in global state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from rbf_jax.analysis.diagnostics import Inside, natural
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
WIDTH = 10.0  # Inches; a report shows a figure at about 900 pixels.
_LEGEND_COLUMNS = 5


@mpl.rc_context(STYLE)
def loss_figure(runs: Sequence[Run], metric: str = "loss") -> Figure:
    """Training and validation loss against steps and time, and the difference to the first run.

    Args:
      runs: the runs; the first is the one that differences refer to.
      metric: "loss", or "bits_per_byte" where losses per token cannot be compared.
    """
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
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
    title = f"Validation loss minus {plain(runs[0].name)}'s"
    difference.set(title=title, xlabel="step", xlim=(0, None))
    difference.set_ylabel(f"difference in {label}")
    _legend(figure, _styled(runs), {"validation": "thick", "training, running median": "thin"})
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
    figure = Figure(figsize=(WIDTH, 0.5 + 2.6 * ((len(panels) + 1) // 2)), layout="constrained")
    for i, (key, title, label, scale) in enumerate(panels):
        axes = figure.add_subplot((len(panels) + 1) // 2, 2, i + 1)
        for run, style in _styled(runs):
            if _has(run.train, key):
                _line(axes, run.train["step"], run.train[key], style, thin=True)
                _line(axes, run.train["step"], smooth(run.train[key]), style)
        axes.set(title=title, xlabel="step", ylabel=label, xlim=(0, None))
        low, high = axes.dataLim.intervaly
        if scale == "log" and high > 10 * low > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(figure, _styled(runs), {"running median": "thick", "as logged": "thin"})
    return figure


# Of metrics per head: how they are written, and the key and value of runs that learn them.
_LEARNED = (
    ("gamma", "γ", "learn_gamma", True),
    ("key_norm_weight", "λ", "learn_key_norm_weight", True),
    ("sink_logits", "sink's logit", "sink", "learned"),
)


@mpl.rc_context(STYLE)
def learned_figure(runs: Sequence[Run]) -> Figure | None:
    """γ, λ and sinks of each layer by step, one thin line a head; None if no run learns any."""
    panels: dict[str, tuple[list[str], list[Run]]] = {}
    for key, symbol, flag, value in _LEARNED:
        learning = [run for run in runs if run.config["model"]["attention"][flag] == value]
        found = {name for run in learning for name in run.train if name.startswith(f"{key}/")}
        if found:
            panels[symbol] = sorted(found, key=natural), learning
    if not panels:
        return None
    columns = min(4, max(len(names) for names, _ in panels.values()))
    rows_of = {symbol: math.ceil(len(names) / columns) for symbol, (names, _) in panels.items()}
    rows = sum(rows_of.values())
    figure = Figure(figsize=(WIDTH, 0.5 + 2.3 * rows), layout="constrained")
    above = 0
    for symbol, (names, learning) in panels.items():
        first = None
        for i, name in enumerate(names):
            axes = figure.add_subplot(rows, columns, above * columns + i + 1, sharey=first)
            for run, style in _styled(runs):
                if run in learning and name in run.train:
                    _heads(axes, run.train["step"], run.train[name], style)
            axes.set(title=f"{symbol}, layer {name.partition('/')[2]}", xlabel="step")
            axes.set_ylabel(symbol if i % columns == 0 else "")
            first = first or axes
        above += rows_of[symbol]
    shown = [run for _, learning in panels.values() for run in learning]
    weights = {"mean of heads": "thick", "a head": "thin"}
    _legend(figure, [(run, style) for run, style in _styled(runs) if run in shown], weights)
    return figure


def _heads(axes: Axes, steps: np.ndarray, values: np.ndarray, style: LineStyle) -> None:
    """Draws (n,) or (n, N): a thin line for each of several heads, and their mean."""
    values = values.reshape(len(steps), -1)
    for head in values.T if values.shape[1] > 1 else ():
        _line(axes, steps, head, style, thin=True)
    _line(axes, steps, values.mean(1), style)


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
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    mark: dict[str, Any] = {"marker": "D", "color": REGISTER_COLOR, "linestyle": ""}
    mark |= {"markerfacecolor": "none", "markersize": 4.5}
    for i, ((_, style), norms, register_norms) in enumerate(zip(_styled(runs), text, registers)):
        x = np.arange(len(norms)) + (i - (len(runs) - 1) / 2) * width
        _violins(axes, x - 0.1 * width, norms, 0.75 * width, style)
        axes.plot(x + 0.37 * width, register_norms, **mark, clip_on=False, zorder=4)
    axes.set(xlabel="layer", ylabel="key norm ‖k‖", xticks=range(layers), ylim=(0, None))
    axes.grid(visible=False, axis="x")
    handles: list[Any] = [
        Patch(
            facecolor=_lighter(style),
            edgecolor=style.color,
            hatch=style.hatch,
            label=plain(run.name),
        )
        for run, style in _styled(runs)
    ]
    handles.append(
        Line2D([], [], color="0.2", marker="o", linewidth=1.2, label="median, quartiles")
    )
    if any(row.size for row in registers):
        handles.append(Line2D([], [], label="register tokens, one a head", **mark))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=min(len(handles), _LEGEND_COLUMNS)
    )
    return figure


@mpl.rc_context(STYLE)
def attention_figure(
    inside: Inside, tokens: Sequence[str], title: str, sink: bool = False
) -> Figure:
    """Attention weights, a panel a layer (row) and head (column); rows of a panel are queries.

    Args:
      inside: what the layers did with one text, B = 1.
      tokens: the text's T tokens, as they shall be written.
      title: whose attention it is.
      sink: the model has a virtual key with value 0; its share is shown as the first column.
    """
    layers, _, heads, _, _ = inside.attention_weights.shape
    special = ["sink"] * sink + [f"r{i}" for i in range(inside.num_registers)]
    side = float(np.clip(9.0 / heads, 1.1, 3.0))
    figure = Figure(figsize=(side * heads + 1.0, side * layers + 0.9), layout="constrained")
    grid: Any = figure.subplots(layers, heads, squeeze=False)
    look: dict[str, Any] = {
        "cmap": mpl.colormaps[WEIGHTS_COLORMAP].with_extremes(bad=MASKED_COLOR),
        "norm": PowerNorm(0.5, 0.0, 1.0),
        "interpolation": "none",
        "aspect": "auto",
    }
    for layer, head in np.ndindex(layers, heads):
        axes = grid[layer, head]
        image = axes.imshow(attention_map(inside, layer, head, sink), **look)
        if special:
            axes.axvline(len(special) - 0.5, color=REGISTER_COLOR, linewidth=1.0)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
        axes.set_title(f"head {head}" if layer == 0 else "", loc="center")
        axes.set_ylabel(f"layer {layer}" if head == 0 else "", fontsize=9, fontweight="bold")
    _label_tokens(grid, special, tokens, side)
    figure.colorbar(
        image, ax=grid, label="attention weight", ticks=[0, 0.05, 0.25, 0.5, 1], aspect=40, pad=0.01
    )
    figure.suptitle(f"{plain(title)}: attention weights, query (row) by key (column)", fontsize=10)
    return figure


def attention_map(inside: Inside, layer: int, head: int, sink: bool) -> np.ndarray:
    """(T, [1 +] R + T) weights of one head: sink, registers, tokens; NaN where the future is."""
    weights = np.array(inside.attention_weights[layer, 0, head])
    weights[:, inside.num_registers :][np.triu(np.ones((len(weights), len(weights)), bool), 1)] = (
        np.nan
    )
    if not sink:
        return weights
    return np.concatenate([inside.sink_weights[layer, 0, head][:, None], weights], axis=1)


def _label_tokens(
    grid: np.ndarray, special: Sequence[str], tokens: Sequence[str], side: float
) -> None:
    """Writes the tokens along the outer panels if there is room for them, else counts them."""
    first = len(special)
    size, every = min(7.0, 72 * 0.95 * side / (first + len(tokens))), 1
    red: dict[float, str] = dict(enumerate(special))
    if size < 3.5:
        size, every = 7.0, max(1, len(tokens) // 4)
        tokens = [str(i) for i in range(len(tokens))]
        red = {(first - 1) / 2: "…".join(dict.fromkeys([special[0], special[-1]]))} if first else {}
    black = {i: plain(token) for i, token in enumerate(tokens) if i % every == 0}
    rotation = 0 if max(map(len, black.values())) == 1 else 90
    for axes in grid[-1]:
        axes.set_xticks([*red, *(first + i for i in black)], [*red.values(), *black.values()])
        axes.tick_params("x", labelsize=size, rotation=rotation)
        for label in axes.get_xticklabels()[: len(red)]:
            label.set(color=REGISTER_COLOR, fontweight="bold", rotation=90)
    for axes in grid[:, 0]:
        axes.set_yticks(list(black), list(black.values()), fontsize=size)
    for axes in {*grid[-1], *grid[:, 0]}:
        axes.tick_params(length=0 if every == 1 else 2, pad=1)
        axes.grid(visible=False)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running median of (n,) over about a twentieth of the points, at least three.

    Fewer at the ends. Not a mean: one spike should not look like a plateau. NaN counts as missing.
    """
    smoothed = np.array(values, np.float64)
    at = np.arange(len(values))
    reaches = np.minimum(max(1, len(values) // 40), np.minimum(at, at[::-1]))
    for reach in np.unique(reaches):
        centres = at[(reaches == reach) & np.isfinite(values)]
        windows = np.asarray(values)[centres[:, None] + np.arange(-reach, reach + 1)]
        smoothed[centres] = np.nanmedian(windows, axis=1)
    return smoothed


def plain(text: str) -> str:
    """Text as matplotlib can draw it: no mathematics, nothing hidden by an underscore in front.

    What the font does not have becomes □.
    """
    font = font_manager.get_font(font_manager.findfont(STYLE["font.family"]))
    text = "".join(c if font.get_char_index(ord(c)) else "□" for c in text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _styled(runs: Sequence[Run]) -> list[tuple[Run, LineStyle]]:
    return list(zip(runs, line_styles([run.config for run in runs])))


_THIN: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.6}


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, style: LineStyle, thin: bool = False) -> None:
    """A curve with some markers along it; a thin one without."""
    marks = dict(_THIN)
    if not thin:
        marks = {"marker": style.marker, "markevery": max(1, len(x) // 12), "zorder": 3}
    axes.plot(x, y, color=style.color, linestyle="-" if thin else style.linestyle, **marks)


def _legend(
    figure: Figure, styled: Sequence[tuple[Run, LineStyle]], weights: Mapping[str, str]
) -> None:
    """Names the runs, and what thick and thin lines are."""
    handles = [
        Line2D([], [], color=s.color, linestyle=s.linestyle, marker=s.marker, label=plain(run.name))
        for run, s in styled
    ]
    for label, weight in weights.items():
        handles.append(
            Line2D([], [], color="0.3", label=label, **_THIN if weight == "thin" else {})
        )
    figure.legend(
        handles=handles, loc="outside upper center", ncols=min(len(handles), _LEGEND_COLUMNS)
    )


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
    longest = max(
        (np.nanmax(run.train["seconds"]) for run in runs if _has(run.train, "seconds")), default=0
    )
    if longest > 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if longest > 180 else (1.0, "seconds")


def _lighter(style: LineStyle) -> tuple[float, float, float]:
    red, green, blue = (0.45 + 0.55 * part for part in mpl.colors.to_rgb(style.color))
    return red, green, blue


def _violins(axes: Axes, x: np.ndarray, norms: np.ndarray, width: float, style: LineStyle) -> None:
    parts: Mapping[str, Any] = axes.violinplot(list(norms), x, widths=width, showextrema=False)
    for body in parts["bodies"]:
        body.set(facecolor=_lighter(style), edgecolor=style.color, hatch=style.hatch, alpha=1.0)
    low, middle, high = np.quantile(norms, [0.25, 0.5, 0.75], axis=1)
    axes.vlines(x, low, high, color="0.2", linewidth=1.2)
    axes.plot(x, middle, "o", color="0.2", markersize=3.5)

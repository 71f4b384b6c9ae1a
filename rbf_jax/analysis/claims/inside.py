"""Inside trained models: attention maps and key norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rbf_jax.analysis.claims.panels import (
    figure,
    has_virtual_sink,
    kind,
    legend_above,
    line_style,
    styled,
    the,
    where,
)
from rbf_jax.analysis.diagnostics import QUANTILES
from rbf_jax.analysis.records import Record
from rbf_jax.analysis.style import MASKED_COLOR, REGISTER_COLOR, WEIGHTS_COLORMAP

_WIDTH = 3
# A shape and a white face that no variant has.
_REGISTER: dict[str, Any] = {
    "marker": "*",
    "markersize": 8,
    "markerfacecolor": "white",
    "markeredgecolor": REGISTER_COLOR,
    "linestyle": "",
    "zorder": 4,
}


@styled
def attention_maps(records: Sequence[Record]) -> tuple[Figure, dict[str, Any]]:
    """Of each layer the head that gives most to registers and sink, and the one that gives least.

    Models with a register, with an origin sink in its place, and the dot product's twin; the first
    seed, on one text.
    """
    models = [
        (the(records, kind="rbf", sink="register", num_registers=1, register_init="zero"), "RBF"),
        (the(records, kind="rbf", sink="origin", num_registers=0), "RBF, origin sink"),
        (the(records, kind="dot", positions="rope", register_init="normal"), "dot product, RoPE"),
    ]
    shown = [(record, name) for record, name in models if record is not None]
    L = shown[0][0].inside["attention_map"].shape[1]
    made, axes = figure(len(shown), 2 * L, height=1.25)
    numbers: dict[str, Any] = {}
    for row, (record, name) in enumerate(shown):
        taken = (record.inside["register_mass"] + record.inside["sink_mass"])[0]  # (L, N)
        first = record.inside["first_token_mass"][0]
        for layer in range(L):
            for column, head in enumerate((taken[layer].argmax(), taken[layer].argmin())):
                axis = axes[row, 2 * layer + column]
                weights = record.inside["attention_map"][0, layer, head]
                _draw_map(axis, weights, has_virtual_sink(record))
                masses = f"{taken[layer, head]:.0%} | {first[layer, head]:.0%}"
                axis.set_title(masses, fontsize=5.5, fontweight="normal", pad=1.5)
                axis.set_xlabel(f"layer {layer}, head {head}", fontsize=5.5)
        axes[row, 0].set_ylabel(name, fontsize=8, fontweight="bold")
        numbers[record.name] = {
            name: np.nanmean(record.inside[name], axis=0).tolist()
            for name in ("entropy", "register_mass", "sink_mass", "first_token_mass", "distance")
        }
    made.supxlabel(
        "Keys by queries, square root of the weight; left of the upright line registers and sink. "
        "Above each: mean weight on registers and sink | on the first token.",
        fontsize=6.5,
    )
    return made, numbers


def _draw_map(axis: Axes, weights: np.ndarray, sink: bool) -> None:
    """Weights (M, R + M); the sink's, what is missing to a sum of 1, is drawn as a key's."""
    if sink:
        taken = np.clip(1 - weights.sum(-1, keepdims=True), 0, 1)
        weights = np.concatenate([taken, weights], axis=1)
    # A register is wide enough to be seen beside the line.
    registers = weights.shape[1] - len(weights)
    weights = np.repeat(weights, [_WIDTH] * registers + [1] * len(weights), axis=1)
    registers *= _WIDTH
    future = np.arange(weights.shape[1])[None] - registers > np.arange(len(weights))[:, None]
    axis.set_facecolor(MASKED_COLOR)
    axis.imshow(
        np.ma.array(np.sqrt(weights), mask=future),
        cmap=WEIGHTS_COLORMAP,
        vmin=0,
        vmax=1,
        interpolation="nearest",
        aspect="auto",
    )
    if registers:
        axis.axvline(registers - 0.5, color=REGISTER_COLOR, linewidth=0.8)
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)


@styled
def key_norms(records: Sequence[Record]) -> tuple[Figure, dict[str, Any]]:
    """‖k‖ of text by layer: median, quartiles, 1 % and 99 %; registers' beside."""
    shown = where(records, positions="susie", register_init="zero")
    made, axes = figure(1, 1, height=3.2)
    axis = axes[0, 0]
    numbers: dict[str, Any] = {}
    low, quarter, middle, three, high = (QUANTILES.index(q) for q in (0.01, 0.25, 0.5, 0.75, 0.99))
    for index, record in enumerate(shown):
        style = line_style(record)
        quantiles = np.nanmean(record.inside["key_norm_quantiles"], axis=0)  # (L, 9)
        for layer, q in enumerate(quantiles):
            x = layer + 0.8 * ((index + 0.5) / len(shown) - 0.5)
            axis.plot([x, x], q[[low, high]], color=style.color, linewidth=0.9)
            axis.plot([x, x], q[[quarter, three]], color=style.color, linewidth=4, alpha=0.5)
            axis.plot(
                x,
                q[middle],
                marker=style.marker,
                color=style.color,
                markersize=4,
                label=kind(record) if layer == 0 else None,
                linestyle="",
            )
            for norm in np.nanmean(record.inside["register_key_norm"], axis=0)[layer]:
                axis.plot(x, norm, **_REGISTER)
        numbers[record.name] = {
            "quantiles": list(QUANTILES),
            "key_norm_quantiles": quantiles.tolist(),
            "register_key_norm": np.nanmean(record.inside["register_key_norm"], axis=0).tolist(),
            "gated": np.nanmean(record.inside["gated"], axis=0).tolist(),
            "sink_value_norm": np.nanmean(record.inside["sink_value_norm"], axis=0).tolist(),
        }
    if shown:
        axis.set_xticks(range(len(numbers[shown[0].name]["key_norm_quantiles"])))
    axis.set(
        title="Norms of keys: 1 to 99 %, quartiles, median; stars: registers",
        xlabel="layer",
        ylabel="‖k‖",
        yscale="log",
    )
    for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        formatted("{x:g}")
    axis.tick_params(axis="y", which="minor", labelsize=6.5)
    axis.plot([], [], **_REGISTER, label="register")
    legend_above(made, axis, columns=3)
    return made, numbers

"""Inside trained models: attention maps and key norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rbf_jax.analysis.claims.panels import (
    figure,
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


@styled
def attention_maps(records: Sequence[Record]) -> tuple[Figure, dict[str, Any]]:
    """All heads of an RBF model and of its dot-product twin, first seed, on one text."""
    pair = [
        the(records, kind="rbf", positions="susie", qk_norm=False),
        the(records, kind="dot", positions="rope", register_init="normal"),
    ]
    shown = [r for r in pair if r is not None]
    L, N = shown[0].inside["attention_map"].shape[1:3]
    made, axes = figure(N, L * len(shown), height=7.0 / (L * len(shown)) + 0.12)
    numbers: dict[str, Any] = {}
    for block, record in enumerate(shown):
        maps = record.inside["attention_map"][0]  # (L, N, M, R + M)
        R = maps.shape[-1] - maps.shape[-2]
        for layer in range(L):
            for head in range(N):
                axis = axes[head, block * L + layer]
                weights = maps[layer, head]
                future = np.arange(weights.shape[1])[None] - R > np.arange(len(weights))[:, None]
                axis.set_facecolor(MASKED_COLOR)
                axis.imshow(
                    np.ma.array(np.sqrt(weights), mask=future),
                    cmap=WEIGHTS_COLORMAP,
                    vmin=0,
                    vmax=1,
                    interpolation="nearest",
                    aspect="auto",
                )
                if R:
                    axis.axvline(R - 0.5, color=REGISTER_COLOR, linewidth=0.8)
                axis.set_xticks([])
                axis.set_yticks([])
                axis.grid(visible=False)
                sink = record.inside["register_mass"] + record.inside["sink_mass"]
                first = record.inside["first_token_mass"]
                axis.set_title(
                    f"{100 * sink[0, layer, head]:.0f} | {100 * first[0, layer, head]:.0f} %",
                    fontsize=5.5,
                    fontweight="normal",
                    pad=1.5,
                )
                if head == N - 1:
                    axis.set_xlabel(f"layer {layer}", fontsize=6.5)
        axes[0, block * L].annotate(
            kind(record),
            (0, 1),
            xytext=(0, 12),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=8.5,
            fontweight="bold",
        )
        numbers[record.name] = {
            name: np.nanmean(record.inside[name], axis=0).tolist()
            for name in ("entropy", "register_mass", "sink_mass", "first_token_mass", "distance")
        }
    made.supxlabel(
        "Keys (registers left of the red line) by queries; square root of the weight. Above each: "
        "mean weight on registers and sink | on the first token.",
        fontsize=6.5,
    )
    return made, numbers


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
                axis.plot(x, norm, marker="_", color=REGISTER_COLOR, markersize=7)
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
        title="Norms of keys: 1 to 99 %, quartiles, median; red: registers",
        xlabel="layer",
        ylabel="‖k‖",
        yscale="log",
    )
    for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        formatted("{x:g}")
    axis.tick_params(axis="y", which="minor", labelsize=6.5)
    legend_above(made, axis, columns=5)
    return made, numbers

"""How every figure of the project looks: one style, one palette.

A variant of attention has the same colour, line and marker in every figure, and nothing else has
its colour. Lightness falls in even steps from one to the next, so that figures can be read in grey.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

# For `matplotlib.rc_context`; no figure depends on the user's own matplotlibrc.
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "0.3",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "xtick.color": "0.3",
    "ytick.color": "0.3",
    "xtick.labelcolor": "0.1",
    "ytick.labelcolor": "0.1",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 3.2,
    "figure.facecolor": "white",
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # Text stays text.
}

# Attention weights: white is 0, lightness falls evenly.
WEIGHTS_COLORMAP = "Blues"
REGISTER_COLOR = "#b2182b"
MASKED_COLOR = "0.93"


@dataclasses.dataclass(frozen=True)
class LineStyle:
    """How one variant is drawn; names of matplotlib."""

    color: str
    linestyle: Any
    marker: Any
    hatch: str


PALETTE: Mapping[str, LineStyle] = {
    "RBF": LineStyle("#08408b", "-", "o", ""),
    "RBF + QK-norm": LineStyle("#62359a", (0, (7, 1.5)), "D", ".."),
    "RBF, dial": LineStyle("#1b846f", (0, (6, 1.5, 1, 1.5)), "^", "xx"),
    "dot product": LineStyle("#e07b00", (0, (4, 1.6)), "s", "///"),
    "dot product, RBF's scale": LineStyle("#c9a227", (0, (1, 1.2)), "v", "..."),
    "dot product + QK-norm": LineStyle("#cc4d78", (0, (3, 1.3, 1, 1.3)), "P", "\\\\\\"),
}

_REPEAT_MARKERS = "XhdpH<>*"


def variant(config: Mapping[str, Any]) -> str:
    """The key of ``PALETTE`` for a run's configuration."""
    attention = config["model"]["attention"]
    rbf = attention["kind"] == "rbf"
    if attention["qk_norm"]:
        return "RBF + QK-norm" if rbf else "dot product + QK-norm"
    if rbf:
        dial = attention["learn_key_norm_weight"] or attention["key_norm_weight"] != 1
        return "RBF, dial" if dial else "RBF"
    return "dot product, RBF's scale" if attention["dot_scale"] == "rbf" else "dot product"


def line_styles(configs: Sequence[Mapping[str, Any]]) -> list[LineStyle]:
    """One style a run. Runs of one variant share colour and line and differ in marker."""
    seen: Counter[str] = Counter()
    styles = []
    for config in configs:
        key = variant(config)
        style = PALETTE[key]
        if seen[key]:
            marker = _REPEAT_MARKERS[(seen[key] - 1) % len(_REPEAT_MARKERS)]
            style = dataclasses.replace(style, marker=marker)
        styles.append(style)
        seen[key] += 1
    return styles

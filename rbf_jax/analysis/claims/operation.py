"""The operation alone, from the benchmark's kept files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rbf_jax.analysis.attention_profile import STYLES, profile_figure
from rbf_jax.analysis.claims.panels import figure, legend_above, styled
from rbf_jax.analysis.style import PALETTE

# Times at H 64, and memory.
PROFILE = Path("docs/measurements/bench_attention_h200_64.json")
# On a GPU, else on a CPU.
LAYER = (
    Path("docs/measurements/bench_layer_gpu.json"),
    Path("docs/measurements/bench_layer_cpu.json"),
)

# Colour says which attention, the line which positions, a full marker that there is a register.
_DASHED, _DOTTED = (0, (4, 1.6)), (0, (1, 1.2))
_LAYERS = {
    "dot product, RoPE": ("dot product", _DASHED, "white"),
    "dot product, SuSiE": ("dot product", "-", "white"),
    "RBF, RoPE": ("RBF", _DASHED, "white"),
    "RBF, SuSiE": ("RBF", "-", "white"),
    "RBF, SuSiE, 1 register": ("RBF", _DOTTED, None),
}


def profile(_: Any) -> tuple[Figure, dict[str, Any]]:
    """Time and memory of the operation against T."""
    content = json.loads(PROFILE.read_text())
    rows = [r for r in content["results"] if r["head_dim"] == 64 and r["causal"]]
    numbers = {"file": str(PROFILE), "device": content["device"], "results": rows}
    return profile_figure(content), numbers


def layer() -> tuple[Path, dict[str, Any]]:
    """The file of the layer's benchmark that there is, and its content.

    Raises:
      FileNotFoundError: there is none.
    """
    for path in LAYER:
        if path.is_file():
            return path, json.loads(path.read_text())
    raise FileNotFoundError(
        f"none of {', '.join(map(str, LAYER))}: python -m experiments.bench_layer"
    )


def layer_numbers() -> dict[str, Any] | None:
    """What `layer_profile` returns beside its figure; None without a file."""
    try:
        path, content = layer()
    except FileNotFoundError:
        return None
    return _layer_numbers(path, content)


def _layer_numbers(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    return {"file": str(path), "device": content["device"], "results": content["results"]}


@styled
def layer_profile(_: Any) -> tuple[Figure, dict[str, Any]]:
    """Time and memory of the attention layer, by attention and positions, against T."""
    path, content = layer()
    made, axes = figure(1, 3, height=3.0)
    panels = (
        ("forward", "milliseconds", 1, "Forward", "ms"),
        ("forward+backward", "milliseconds", 1, "Forward + backward", "ms"),
        ("forward+backward", "temporary_bytes", 2**20, "Memory", "temporaries, MiB"),
    )
    for axis, (direction, key, unit, title, ylabel) in zip(axes[0], panels):
        for name, (kind, linestyle, face) in _LAYERS.items():
            rows = [
                r
                for r in content["results"]
                if (r["implementation"], r["direction"]) == (name, direction)
            ]
            axis.plot(
                [r["length"] for r in rows],
                [r[key] / unit for r in rows],
                color=PALETTE[kind].color,
                linestyle=linestyle,
                marker=PALETTE[kind].marker,
                markerfacecolor=face,
                # Where both lie on each other, both are seen.
                markersize=6.5 if kind == "dot product" else 3.5,
                label=name,
            )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
        axis.set(title=title, xlabel="T", ylabel=ylabel)
        axis.set_ylim(bottom=0)
    legend_above(made, axes[0, 0], columns=3)
    settings = content["settings"]
    made.supxlabel(
        f"B·T = {settings['tokens']:,}, D {settings['d_model']}, N {settings['heads']}, "
        f"{settings['dtype']}; {content['device']}, {content['date'][:10]}",
        fontsize=6.5,
    )
    return made, _layer_numbers(path, content)


@styled
def memory(_: Any) -> tuple[Figure, dict[str, Any]]:
    """Memory of forward + backward against T, and where each runs out."""
    content = json.loads(PROFILE.read_text())
    made, axes = figure(1, 1, width=5.4, height=3.4)
    axis = axes[0, 0]
    limit = max(row["bytes_limit"] for row in content["memory"] if row["bytes_limit"])
    labels = {
        "RBF reference": "RBF, naive",
        "dot product, jax.nn xla": "dot product, jax.nn xla",
        "dot product, cuDNN": "dot product, cuDNN",
        "RBF xla": "RBF, reformulated (xla)",
        "RBF mosaic": "RBF, fused (mosaic)",
        "RBF triton": "RBF, fused (triton)",
    }
    for name, label in labels.items():
        look = STYLES[name]
        rows = [r for r in content["memory"] if r["implementation"] == name]
        kept = [r for r in rows if r.get("temporary_bytes") and not r["runs_out"]]
        axis.plot(
            [r["length"] for r in kept],
            [r["temporary_bytes"] / 2**30 for r in kept],
            color=look.color,
            linestyle=look.linestyle,
            marker=look.marker,
            label=label,
        )
        if out := [r for r in rows if r.get("error") or r["runs_out"]]:
            # Two that run out at one length stand side by side.
            x = out[0]["length"] * (0.93 if "naive" in label else 1.07)
            axis.plot(x, limit / 2**30, marker="X", color=look.color, markersize=8)
            axis.annotate(
                f"out at {out[0]['length']:,}",
                (x, limit / 2**30),
                xytext=(6, -12 if "naive" in label else 6),
                textcoords="offset points",
                fontsize=6.5,
                color=look.color,
            )
    axis.axhline(limit / 2**30, color="0.4", linewidth=0.8)
    axis.annotate(
        f"there are {limit / 2**30:.0f} GiB",
        (0.01, limit / 2**30),
        xycoords=("axes fraction", "data"),
        xytext=(0, -8),
        textcoords="offset points",
        fontsize=6.5,
    )
    axis.set_xscale("log", base=4)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set(title="Memory of forward + backward", xlabel="T = S", ylabel="temporaries, GiB")
    legend_above(made, axis, columns=3)
    made.supxlabel(
        f"B 1, N 8, H 64, bfloat16, causal; {content['device']}, {content['date'][:10]}",
        fontsize=6.5,
    )
    return made, {"file": str(PROFILE), "memory": content["memory"]}

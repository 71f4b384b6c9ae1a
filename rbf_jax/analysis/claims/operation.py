"""The operation alone, from the benchmark's kept files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rbf_jax.analysis.attention_profile import profile_figure
from rbf_jax.analysis.claims.panels import figure, styled
from rbf_jax.analysis.style import PALETTE

PROFILE = Path("docs/measurements/bench_attention_gpu.json")
MEMORY = Path("docs/measurements/bench_attention_gpu_memory.json")


def profile(_: Any) -> tuple[Figure, dict[str, Any]]:
    """Time and memory against T."""
    content = json.loads(PROFILE.read_text())
    rows = [r for r in content["results"] if r["head_dim"] == 64 and r["causal"]]
    return profile_figure(content), {"file": str(PROFILE), "results": rows}


@styled
def memory(_: Any) -> tuple[Figure, dict[str, Any]]:
    """Memory of forward + backward against T, and where each runs out."""
    content = json.loads(MEMORY.read_text())
    made, axes = figure(1, 1, width=5.4, height=3.4)
    axis = axes[0, 0]
    limit = max(row["bytes_limit"] for row in content["memory"] if row["bytes_limit"])
    looks = {
        "RBF reference": ("RBF, naive", "0.45", (0, (2, 1)), "x"),
        "dot product, jax.nn xla": (
            "dot product, jax.nn xla",
            PALETTE["dot product"].color,
            PALETTE["dot product"].linestyle,
            "s",
        ),
        "RBF xla": ("RBF, reformulated (xla)", "#5b9bd5", (0, (5, 1.5)), "^"),
        "RBF triton": ("RBF, fused (triton)", PALETTE["RBF"].color, "-", "o"),
    }
    for name, (label, color, line, marker) in looks.items():
        rows = [r for r in content["memory"] if r["implementation"] == name]
        kept = [r for r in rows if r.get("temporary_bytes") and not r["runs_out"]]
        axis.plot(
            [r["length"] for r in kept],
            [r["temporary_bytes"] / 2**30 for r in kept],
            color=color,
            linestyle=line,
            marker=marker,
            label=label,
        )
        if out := [r for r in rows if r.get("error") or r["runs_out"]]:
            axis.plot(out[0]["length"], limit / 2**30, marker="X", color=color, markersize=8)
            axis.annotate(
                f"out at {out[0]['length']:,}",
                (out[0]["length"], limit / 2**30),
                xytext=(6, -12 if "naive" in label else 6),
                textcoords="offset points",
                fontsize=6.5,
                color=color,
            )
    axis.axhline(limit / 2**30, color="0.4", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.set(title="Memory of forward + backward", xlabel="T = S", ylabel="temporaries, GiB")
    axis.legend(fontsize=7)
    made.supxlabel(
        f"B 1, N 8, H 64, bfloat16, causal; {content['device']}, {content['date'][:10]}",
        fontsize=6.5,
    )
    return made, {"file": str(MEMORY), "memory": content["memory"]}

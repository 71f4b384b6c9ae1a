"""What conversions by the dial came to, over several seeds: one table of numbers, one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from rbf_jax.analysis.runs import read_json
from rbf_jax.analysis.style import PALETTE, STYLE, LineStyle
from rbf_jax.training.config import differences
from rbf_jax.training.conversion import REPORT

_STYLES: Mapping[str, tuple[str, LineStyle]] = {
    "control": ("dot product, trained on", PALETTE["dot product"]),
    "switched": ("λ = 1 at once", PALETTE["RBF"]),
    "annealed": ("λ from 0 to 1", PALETTE["RBF, dial"]),
    "learned": ("λ learned per head", LineStyle("#0f5c4d", (0, (1, 1.2)), "<", "")),
}


def merge(folders: Sequence[str | Path]) -> dict[str, Any]:
    """Returns the reports of conversions that differ in seed and source only, and their means.

    Args:
      folders: of `rbf_jax.training.conversion.convert`, with their reports.

    Raises:
      FileNotFoundError: a folder has no report.
      ValueError: they are of unlike conversions.
    """
    reports = [read_json(Path(folder) / REPORT) for folder in folders]
    first = reports[0]
    for folder, report in zip(folders, reports):
        unlike = [
            change
            for change in differences(first["config"], report["config"])
            if not change.startswith("seed:")
        ]
        if unlike or list(report["arms"]) != list(first["arms"]):
            raise ValueError(
                f"{folder} is another conversion than {folders[0]}: "
                f"{'; '.join(unlike) or 'other arms'}."
            )
    start = np.array([report["untrained"]["dot_product"] for report in reports])

    def mean(values: Any) -> float:
        return round(float(np.mean(values)), 4)

    summary: dict[str, Any] = {
        "dot_product": mean(start),
        "rbf_untrained": mean([report["untrained"]["rbf"] for report in reports]),
        "lost": mean([report["lost"] for report in reports]),
    }
    for arm in first["arms"]:
        final = np.array([report["arms"][arm]["final"] for report in reports])
        summary[arm] = {
            "final": mean(final),
            "final_minus_dot_product": mean(final - start),
            "recovered_at": [report["arms"][arm]["recovered_at"] for report in reports],
        }
        if "control" in first["arms"] and arm != "control":
            control = np.array([report["arms"]["control"]["final"] for report in reports])
            summary[arm]["final_minus_control"] = mean(final - control)
    return {
        "seeds": [report["config"]["seed"] for report in reports],
        "mean": summary,
        "config": first["config"],
        "reports": [{k: v for k, v in r.items() if k != "config"} for r in reports],
    }


@mpl.rc_context(STYLE)
def conversion_figure(merged: Mapping[str, Any]) -> Figure:
    """Validation loss against step, from the untrained models on; a line is a mean over seeds.

    Args:
      merged: of `merge`.
    """
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    reports = merged["reports"]
    highest = []
    for arm in merged["reports"][0]["arms"]:
        label, style = _STYLES[arm]
        curves = np.array([curve(report, arm) for report in reports])  # (seeds, steps, 2)
        steps, losses = curves[0, :, 0], curves[:, :, 1]
        highest.append(losses[:, 1:].max())
        for seed in losses if len(losses) > 1 else []:
            axes.plot(steps, seed, color=style.color, linewidth=0.6, alpha=0.6)
        axes.plot(
            steps,
            losses.mean(axis=0),
            color=style.color,
            linestyle=style.linestyle,
            marker=style.marker,
            label=label,
        )
    axes.axhline(
        merged["mean"]["dot_product"], color="0.4", linewidth=0.8, label="the model converted"
    )
    steps = merged["config"]["optimizer"]["anneal_steps"]
    if "annealed" in merged["reports"][0]["arms"]:
        axes.axvline(steps, color=PALETTE["RBF, dial"].color, linewidth=0.8, linestyle=":")
        axes.annotate(
            "λ = 1", (steps, 0.97), xycoords=("data", "axes fraction"), va="top", ha="left"
        )
    axes.set(xlabel="step", ylabel="validation loss (nats per token)", xlim=(0, None))
    lost = merged["mean"]["lost"]
    seeds = len(merged["seeds"])
    axes.set_title(f"λ = 1 untrained costs {lost:.2f} nats; {seeds} seed{'s' if seeds > 1 else ''}")
    axes.legend()
    return figure


def curve(report: Mapping[str, Any], arm: str) -> list[list[float]]:
    """Returns [[step, validation loss] …] of an arm, from step 0 on.

    Args:
      report: of one conversion.
      arm: one of its arms.
    """
    start = report["untrained"]["rbf" if arm == "switched" else "dot_product"]
    return [[0, start], *report["arms"][arm]["valid_loss"]]

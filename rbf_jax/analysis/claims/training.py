"""How training goes: loss curves, the first steps, the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from rbf_jax.analysis import paired
from rbf_jax.analysis.claims import panels
from rbf_jax.analysis.claims.panels import (
    band,
    figure,
    forest,
    kind,
    legend_above,
    line_style,
    styled,
    the,
    where,
)
from rbf_jax.analysis.figures import smooth
from rbf_jax.analysis.records import Record


@styled
def loss_curves(records: Sequence[Record]) -> tuple[Figure, dict[str, Any]]:
    """Loss by step and by time, whole and less the dot product's; differences, all else equal."""
    same = where(records, positions="susie", register_init="zero")
    timed_positions, timed = _timed(records)
    made = Figure(figsize=(7.2, 7.4), layout="constrained")
    axes = made.subplot_mosaic(
        [
            ["valid", "valid less"],
            ["train", "train less"],
            ["time" if timed else "forest", "forest"],
        ]
    )
    for record in same:
        style = line_style(record)
        band(axes["valid"], record.valid["step"], record.valid["loss"], style, kind(record))
        band(axes["train"], *_smooth(record.train["step"], record.train["loss"]), style, "")
    _leave_out_the_fall(axes["valid"], [r.valid["loss"] for r in same])
    _leave_out_the_fall(axes["train"], [r.train["loss"] for r in same])
    dot = _usual_dot(same, "susie")
    if dot is not None:
        _curves_less(axes, same, dot)
    if timed:
        for record in timed:
            seconds = record.valid["seconds"]
            # The first include what a process does once.
            band(axes["time"], seconds - seconds[0], record.valid["loss"], line_style(record), "")
        _leave_out_the_fall(axes["time"], [r.valid["loss"] for r in timed])
        axes["time"].set(
            title=f"By time, {panels.POSITIONS[timed_positions]} for all",
            xlabel=f"seconds behind step {timed[0].valid['step'][0]}, all seeds",
        )
    else:
        text = "By time: not measured, other programs ran beside; --alone measures it."
        made.supxlabel(text, fontsize=6.5)
    for name, title in (("valid", "Validation, SuSiE for all"), ("train", "Training, smoothed")):
        axes[name].set(title=title, xlabel="step", ylabel="nats per token")
        axes[f"{name} less"].set(
            title=f"{title.split(',')[0]}, less the dot product's", xlabel="step"
        )
    legend_above(made, axes["valid"], columns=3)
    rows = _pairs(records)
    forest(
        axes["forest"],
        [label for label, *_ in rows],
        [paired.difference(a, b) for _, a, b in rows],
        [line_style(a) for _, a, _ in rows],
    )
    axes["forest"].set(title="End, less the dot product's", xlabel="nats; 95 % interval, paired")
    # In the numbers alone.
    more = [(a, b) for a, b in _more_pairs(records) if a is not None and b is not None]
    numbers: dict[str, Any] = {}
    for record, reference in [*((a, b) for _, a, b in rows), *more]:
        mean, other = (paired.mean_log_gradient_norm(r) for r in (record, reference))
        numbers[f"{record.name} against {reference.name}"] = {
            "label": f"{_label(record)} less {_label(reference)}",
            **panels.result_numbers([record], reference)[record.name],
            "log_gradient_norm": paired.as_numbers(paired.estimate(mean - other)),
        }
    spent = {r.name: float(np.ptp(r.valid["seconds"])) for r in timed}
    results = panels.result_numbers(records, None)
    return made, {"differences": numbers, "records": results, "seconds": spent}


@styled
def stability(records: Sequence[Record]) -> tuple[Figure, dict[str, Any]]:
    """The first steps at two learning rates: loss, gradient norm, largest logit."""
    rates = sorted({r.config["optimizer"]["learning_rate"] for r in records})
    shown = [rates[len(rates) // 2], rates[-1]] if len(rates) > 1 else rates
    made, axes = figure(max(len(shown), 1), 4, width=9.4, height=2.3)
    numbers: dict[str, Any] = {}
    for row, rate in enumerate(shown):
        group = [r for r in records if _rate(r) == rate]
        dot = the(group, kind="dot", dot_scale="standard", qk_norm=False)
        for record in group:
            first = paired.first_steps(record)
            some = max(len(record.inspected["step"]) // 5, 2)
            style, name = line_style(record), kind(record)
            step, seen = record.train["step"][:first], record.inspected["step"][:some]
            norms = record.train["grad_norm"][:first]
            band(axes[row, 0], step, record.train["loss"][:first], style, name)
            band(axes[row, 1], *_smooth(step, norms), style, "")
            if dot is not None:
                ratio = norms / dot.train["grad_norm"][:first]
                band(axes[row, 2], *_smooth(step, ratio), style, "")
            band(axes[row, 3], seen, record.inspected["logit_max"][:some], style, "")
        axes[row, 0].set(title=f"Loss, learning rate {rate:g}", xlabel="step", ylabel="nats")
        axes[row, 1].set(title="Gradient norm, smoothed", xlabel="step", yscale="log")
        axes[row, 2].set(title="… over the dot product's", xlabel="step", yscale="log")
        axes[row, 3].set(title="Largest logit", xlabel="step", yscale="log")
        for axis in axes[row, 1:]:
            low, high = axis.get_ylim()
            axis.yaxis.set_major_locator(LogLocator(subs=_ticks(high / low)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
    if shown:
        legend_above(made, axes[0, 0], columns=5)
    for rate in rates:
        group = [r for r in records if _rate(r) == rate]
        references = {
            "dot": the(group, kind="dot", dot_scale="standard", qk_norm=False),
            "matched": the(group, kind="dot", dot_scale="rbf"),
        }
        for record in group:
            largest = paired.largest_gradient_norm(record)
            numbers[record.name] = {
                "largest_gradient_norm": paired.as_numbers(paired.estimate(largest)),
                "largest_logit": _largest(record.inspected["logit_max"][: len(seen)]),
                "steps": paired.first_steps(record),
            }
            if kind(record) != "RBF":
                continue
            for name, reference in references.items():
                if reference is not None:
                    numbers[record.name] |= _gradients_less(record, reference, name)
    return made, numbers


@styled
def sensitivity(records: Sequence[Record]) -> tuple[Figure, dict[str, Any]]:
    """Final loss, whole and where it is low, and spikes against the learning rate."""
    made, axes = figure(1, 3, height=2.8)
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(kind(record), []).append(record)
    numbers: dict[str, Any] = {}
    best_of: dict[str, Record] = {}
    for name, group in kinds.items():
        group = sorted(group, key=_rate)
        rates = np.array([_rate(r) for r in group])
        style = line_style(group[0])
        for axis, values in (
            (axes[0, 0], [paired.loss(r) for r in group]),
            (axes[0, 1], [paired.loss(r) for r in group]),
            (axes[0, 2], [paired.spikes(r) for r in group]),
        ):
            made_of = [paired.estimate(v) for v in values]
            mean = np.array([e.mean for e in made_of])
            axis.plot(
                rates,
                mean,
                color=style.color,
                linestyle=style.linestyle,
                marker=style.marker,
                label=name,
            )
            low = [np.nanmin(v) if np.isfinite(v).any() else np.nan for v in values]
            high = [np.nanmax(v) if np.isfinite(v).any() else np.nan for v in values]
            axis.fill_between(rates, low, high, color=style.color, alpha=0.18, linewidth=0)
        # A rate that lost a seed is no candidate, and its loss that of the first step.
        ends = np.array([paired.loss(r).mean() for r in group])
        starts = np.array([np.nanmean(r.train["loss"][0]) for r in group])
        if np.isfinite(ends).any():
            best = int(np.nanargmin(ends))
            best_of[name] = group[best]
            # Wortsman et al., arXiv:2309.14322: how much is lost on average over the grid.
            numbers[name] = {
                "best_rate": float(rates[best]),
                "best": panels.result_numbers([group[best]], None)[group[best].name],
                "mean_excess": float(np.where(np.isfinite(ends), ends, starts).mean() - ends[best]),
                "diverged": int(sum(paired.estimate(paired.loss(r)).missing for r in group)),
                "by_rate": {f"{rate:g}": float(end) for rate, end in zip(rates, ends)},
            }
    for name, record in best_of.items():
        numbers[name]["best_less"] = {
            other: paired.as_numbers(paired.difference(record, reference))
            for other, reference in best_of.items()
            if other != name
        }
    axes[0, 0].set(title="Final validation loss", ylabel="nats per token")
    axes[0, 1].set(title="The same, nearer")
    if best_of:
        least = np.array([paired.loss(record).mean() for record in best_of.values()])
        margin = np.ptp(least) + 0.01
        axes[0, 1].set_ylim(least.min() - margin, least.max() + 3 * margin)
    axes[0, 2].set(title=f"Spikes of {paired.SPIKE_NATS} nats", ylabel="steps")
    axes[0, 2].set_ylim(bottom=0)
    for axis in axes.flat:
        axis.set(xscale="log", xlabel="learning rate")
    legend_above(made, axes[0, 0], columns=5)
    return made, numbers


def _more_pairs(records: Sequence[Record]) -> list[tuple[Record | None, Record | None]]:
    """What `loss_curves` compares beside the dot product of the same positions."""

    def one(**wanted: Any) -> Record | None:
        usual = {"qk_norm": False, "dot_scale": "standard", "register_init": "zero"}
        return the(records, **{**usual, **wanted})

    rbf, rbf_rope = (one(kind="rbf", positions=name) for name in ("susie", "rope"))
    dot, dot_rope = (one(kind="dot", positions=name) for name in ("susie", "rope"))
    (rbf_normed, rbf_rope_normed), (dot_normed, dot_rope_normed) = (
        [one(kind=kind, positions=name, qk_norm=True) for name in ("susie", "rope")]
        for kind in ("rbf", "dot")
    )
    return [
        (rbf, one(kind="dot", positions="susie", dot_scale="rbf")),
        (rbf, dot_normed),
        (rbf, dot_rope_normed),
        (rbf_normed, dot_normed),
        (rbf_rope_normed, dot_rope_normed),
        (rbf_rope, rbf),
        (dot, dot_rope),
    ]


def _gradients_less(record: Record, reference: Record, name: str) -> dict[str, Any]:
    """Logarithms of ratios over the first steps: of the mean norm, and of the largest."""
    mean, other = (paired.mean_log_gradient_norm(r) for r in (record, reference))
    largest = np.log(paired.largest_gradient_norm(record) / paired.largest_gradient_norm(reference))
    return {
        f"log_gradient_less_{name}": paired.as_numbers(paired.estimate(mean - other)),
        f"log_largest_less_{name}": paired.as_numbers(paired.estimate(largest)),
    }


def _label(record: Record) -> str:
    start = record.config["model"]["register_init"]
    suffix = "" if start == "zero" else ", random register"
    return f"{kind(record)}, {panels.positions(record)}{suffix}"


def _timed(records: Sequence[Record]) -> tuple[str, list[Record]]:
    """Those that had the machine alone, of positions for which RBF and the dot product did."""
    alone = where([r for r in records if r.summary.get("timed_alone")], register_init="zero")
    for positions in ("susie", "rope"):
        group = where(alone, positions=positions)
        if _usual_dot(group, positions) and the(group, kind="rbf", qk_norm=False):
            return positions, group
    return "", []


def _usual_dot(records: Sequence[Record], positions: str) -> Record | None:
    return the(
        records,
        kind="dot",
        positions=positions,
        dot_scale="standard",
        qk_norm=False,
        register_init="zero",
    )


def _pairs(records: Sequence[Record]) -> list[tuple[str, Record, Record]]:
    """What `loss_curves` draws: a label, a record and the dot product that it is compared with."""
    rows = []
    for positions in ("susie", "rope"):
        dot = _usual_dot(records, positions)
        for record in where(records, positions=positions, register_init="zero"):
            if dot is not None and record is not dot:
                label = f"{kind(record)}, {panels.positions(record)}"
                rows.append((label.replace(" product", ""), record, dot))
    twin = the(records, kind="dot", positions="rope", register_init="normal")
    ours = the(records, kind="rbf", positions="susie", qk_norm=False)
    if twin is not None and ours is not None:
        rows.append(("RBF, original's twins", ours, twin))
    return rows


def _curves_less(axes: Mapping[str, Axes], records: Sequence[Record], dot: Record) -> None:
    """The panels of losses less the dot product's, paired by seed; of the last two thirds."""
    for name, smoothed in (("valid less", False), ("train less", True)):
        shown = []
        for record in records:
            losses, others = (r.train if smoothed else r.valid for r in (record, dot))
            step, less = losses["step"], losses["loss"] - others["loss"]
            if smoothed:
                step, less = _smooth(step, less)
            band(axes[name], step, less, line_style(record), "")
            shown.append(less[len(less) // 3 :].ravel())
        values = np.concatenate(shown)
        values = values[np.isfinite(values)]
        if len(values) and np.ptp(values) > 0:
            margin = 0.08 * np.ptp(values)
            axes[name].set_ylim(values.min() - margin, values.max() + margin)
            axes[name].set_xlim(left=step[len(step) // 4])


def _smooth(step: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running medians of (m, n), seed by seed, but for the last, which would be of few points."""
    whole = len(step) - len(step) // 40
    return step[:whole], np.apply_along_axis(smooth, 0, values)[:whole]


def _leave_out_the_fall(axis: Axes, losses: Sequence[np.ndarray]) -> None:
    """Shows the last two thirds of curves (m, n) from top to bottom."""
    later = np.concatenate([values[len(values) // 3 :].ravel() for values in losses])
    later = later[np.isfinite(later)]
    if len(later):
        low, high = later.min(), np.quantile(later, 0.99)
        axis.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def difference_table(curves: Mapping[str, Any]) -> str:
    """Markdown: a row for each difference of `loss_curves`."""
    lines = [
        "| | loss after the last step, nats | least loss | steps saved |",
        "|---|---:|---:|---:|",
    ]

    def cell(value: Mapping[str, Any], digits: int) -> str:
        return paired.interval(value, digits) if value["n"] else "diverged"

    for numbers in curves["differences"].values():
        final, best = (cell(numbers[f"{which}_difference"], 3) for which in ("final", "best"))
        lines.append(
            f"| {numbers['label']} | {final} | {best} | {cell(numbers['steps_saved'], 0)} |"
        )
    return "\n".join(lines) + "\n"


def _largest(values: np.ndarray) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")


def _ticks(span: float) -> tuple[float, ...]:
    """Of a decade, for a logarithmic axis that spans so much."""
    if span < 10:
        return 1, 1.5, 2, 3, 5, 7
    return (1, 2, 5) if span < 100 else (1,)


def _rate(record: Record) -> float:
    return record.config["optimizer"]["learning_rate"]

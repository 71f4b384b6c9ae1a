"""What a model is made of: registers, positions, the dial from dot product to RBF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rbf_jax.analysis import paired
from rbf_jax.analysis.claims import panels
from rbf_jax.analysis.claims.panels import (
    figure,
    forest,
    kind,
    legend_above,
    line_style,
    styled,
    the,
    where,
)
from rbf_jax.analysis.records import Record
from rbf_jax.analysis.style import REGISTER_COLOR


@styled
def registers(records: Sequence[Record]) -> tuple[Figure, dict[str, Any]]:
    """Loss, spikes, and the attention that registers, sink and first token take."""
    made, axes = figure(1, 3, height=3.6)
    labels = [_registers(record) for record in records]
    styles = [line_style(record) for record in records]
    reference = {
        kind(r): r for r in where(records, sink="register", num_registers=1, register_init="zero")
    }
    losses = [
        paired.difference(r, reference[kind(r)])
        if kind(r) in reference
        else paired.estimate(np.full(len(r.seeds), np.nan))
        for r in records
    ]
    forest(axes[0, 0], labels, losses, styles)
    forest(
        axes[0, 1], labels, [paired.estimate(paired.spikes(r)) for r in records], styles, zero=False
    )
    names = ("register_mass", "sink_mass", "first_token_mass")
    rows = np.arange(len(records))
    left = np.zeros(len(records))
    masses = {name: np.array([_mean(r, name) for r in records]) for name in names}
    for name, color in zip(names, ("0.25", "0.55", "0.8")):
        axes[0, 2].barh(
            rows,
            masses[name],
            left=left,
            color=color,
            label={"register": "registers", "sink": "origin sink", "first_token": "first token"}[
                name.removesuffix("_mass")
            ],
        )
        left = left + np.nan_to_num(masses[name])
    axes[0, 2].plot(
        [_even_share(r) * (_sinks(r) or np.nan) for r in records],
        rows,
        "d",
        markersize=5,
        markerfacecolor="white",
        markeredgecolor=REGISTER_COLOR,
        label="registers and sink, even share",
    )
    axes[0, 2].set_xlim(left=0)
    panels.rows(axes[0, 2], labels)
    legend_above(made, axes[0, 2], columns=4)
    axes[0, 0].set(title='Loss less that of "1, zero"', xlabel="nats; 95 % interval, paired")
    axes[0, 1].set(title="Spikes", xlabel=f"steps that rise {paired.SPIKE_NATS} nats")
    axes[0, 1].xaxis.set_major_locator(MaxNLocator(integer=True))
    most = max(1.0, axes[0, 1].get_xlim()[1])
    axes[0, 1].set_xlim(left=-0.03 * most, right=most)
    axes[0, 2].set(title="Attention they take", xlabel="mean weight")
    for axis in axes[0, 1:]:
        axis.set_yticks(rows, [""] * len(records))
    numbers: dict[str, Any] = {}
    for index, record in enumerate(records):
        own = reference.get(kind(record))
        numbers |= panels.result_numbers([record], own)
        numbers[record.name] |= {name: float(masses[name][index]) for name in names}
        numbers[record.name]["even_share"] = _even_share(record)
        if own is not None and record is not own:
            spikes = paired.estimate(paired.spikes(record) - paired.spikes(own))
            numbers[record.name]["spikes_difference"] = paired.as_numbers(spikes)
    return made, numbers


@styled
def positions(records: Sequence[Record]) -> tuple[Figure, dict[str, Any]]:
    """Final loss of each kind of positions, and RBF less dot product; controls are left out."""
    made, axes = figure(1, 2, height=2.8)
    plain = where(records, dot_scale="standard", qk_norm=False)
    pairs = [
        (the(plain, kind="rbf", positions=name), the(plain, kind="dot", positions=name))
        for name in panels.POSITIONS
    ]
    shown = [(a, b) for a, b in pairs if a is not None and b is not None]
    for offset, index in ((-0.12, 0), (0.12, 1)):
        for row, pair in enumerate(shown):
            value, style = paired.estimate(paired.loss(pair[index])), line_style(pair[index])
            axes[0, 0].plot([value.low, value.high], [row + offset] * 2, color=style.color)
            axes[0, 0].plot(
                value.mean,
                row + offset,
                marker=style.marker,
                color=style.color,
                linestyle="",
                label=kind(pair[index]) if row == 0 else None,
            )
    names = [panels.positions(a) for a, _ in shown]
    panels.rows(axes[0, 0], names)
    if shown:
        legend_above(made, axes[0, 0], columns=2)
    differences = [paired.difference(a, b) for a, b in shown]
    forest(axes[0, 1], names, differences, [line_style(a) for a, _ in shown])
    losses = [paired.estimate(paired.loss(r)) for pair in shown for r in pair]
    panels.limit_to_most(axes[0, 0], losses)
    panels.limit_to_most(axes[0, 1], differences)
    axes[0, 0].set(title="Final validation loss", xlabel="nats per token; 95 % interval")
    axes[0, 1].set(title="RBF less dot product", xlabel="nats per token; 95 % interval, paired")
    numbers: dict[str, Any] = {}
    for a, b in shown:
        numbers |= panels.result_numbers([a], b) | panels.result_numbers([b], None)
    for name, positions, key in (("rbf", "susie", "less_susie"), ("dot", "rope", "less_rope")):
        reference = the(plain, kind=name, positions=positions)
        for record in where(plain, kind=name):
            if reference is not None and record is not reference and record.name in numbers:
                numbers[record.name][key] = paired.as_numbers(paired.difference(record, reference))
    return made, numbers


@styled
def dial(records: Sequence[Record]) -> tuple[Figure, dict[str, Any]]:
    """Final loss against λ, fixed and learned; where λ and γ go when they are learned."""
    made, axes = figure(1, 2, height=2.8)
    base = the(records, key_norm_weight=1.0, learn_key_norm_weight=False, learn_gamma=False)
    fixed = sorted(
        where(records, learn_key_norm_weight=False, learn_gamma=False),
        key=lambda r: r.config["model"]["attention"]["key_norm_weight"],
    )
    learned = [r for r in records if r not in fixed]
    rows = [*fixed, *learned]
    if base is not None:
        forest(
            axes[0, 0],
            [_dial(r) for r in rows],
            [paired.difference(r, base) for r in rows],
            [line_style(r) for r in rows],
        )
    axes[0, 0].set(title="Final loss less λ = 1's", xlabel="nats; 95 % interval, paired")
    labels, values = [], []
    for record in learned:
        attention = record.config["model"]["attention"]
        for name, symbol in (("key_norm_weight", "λ"), ("gamma", "γ/γ₀")):
            if attention[f"learn_{name}"]:
                found = record.inside[name]
                start = _initial_gamma(record) if name == "gamma" else 1.0
                labels.append(f"{symbol}: {_dial(record)}")
                values.append((found / start).reshape(-1, found.shape[-2]))
    for row, array in enumerate(values):
        layers = array.shape[1]
        for layer in range(layers):
            offset = 0.6 * (layer / (layers - 1) - 0.5) if layers > 1 else 0.0
            axes[0, 1].plot(
                array[:, layer],
                np.full(len(array), row + offset),
                ".",
                markersize=3,
                color=str(0.1 + 0.6 * layer / layers),
            )
    panels.rows(axes[0, 1], labels)
    axes[0, 1].set(title="Where they end", xlabel="heads of all seeds; first layer on top")
    numbers = panels.result_numbers(rows, base)
    for record in learned:
        for name in ("key_norm_weight", "gamma"):
            found = record.inside[name]
            numbers[record.name][name] = {
                "mean": float(np.nanmean(found)),
                "least": float(np.nanmin(found)),
                "largest": float(np.nanmax(found)),
            }
    return made, numbers


def _registers(record: Record) -> str:
    model = record.config["model"]
    number, init = panels.num_registers(record), model["register_init"]
    text = "none" if number == 0 else f"{number}, {'zero' if init == 'zero' else 'random'}"
    learned = model["attention"]["sink"] == "learned"
    sink = " + learned sink" if learned else " + sink" if panels.has_virtual_sink(record) else ""
    return f"{'RBF' if model['attention']['kind'] == 'rbf' else 'dot'}: {text}{sink}"


def _sinks(record: Record) -> int:
    """How many keys are no text."""
    return panels.num_registers(record) + panels.has_virtual_sink(record)


def _even_share(record: Record) -> float:
    """Of one of them, or of the first token; NaN in records made before it was kept."""
    return float(np.mean(record.inside.get("even_share", np.nan)))


def _dial(record: Record) -> str:
    attention = record.config["model"]["attention"]
    weight = attention["key_norm_weight"]
    text = f"λ from {weight:g}" if attention["learn_key_norm_weight"] else f"λ = {weight:g}"
    return f"{text}, γ learned" if attention["learn_gamma"] else text


def _initial_gamma(record: Record) -> float:
    model = record.config["model"]
    gamma = model["attention"]["gamma"]
    return gamma if gamma is not None else (model["d_model"] // model["num_heads"]) ** -0.5


def _mean(record: Record, name: str) -> float:
    values = record.inside.get(name)
    if values is None or not np.isfinite(values).any():
        return float("nan")
    return float(np.nanmean(values))

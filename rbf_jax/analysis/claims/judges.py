"""What was measured on each claim of the article, in words, and the verdict by `rules`.

Each takes what the drawing of its figures returned and returns both. They raise LookupError where a
number is missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rbf_jax.analysis import paired
from rbf_jax.analysis.claims import rules
from rbf_jax.analysis.claims.rules import (
    GRADIENT_MARGIN,
    HOLDS,
    IN_PART,
    KERNEL_MARGIN,
    MARGIN,
    NOT,
    SPIKE_MARGIN,
    STEP_MARGIN,
)

# The training step of the model at the original's sizes, by experiments.bench_training.
TRAINING = Path("docs/measurements/bench_training_gpu.json")
CPU = Path("docs/measurements/bench_attention_cpu.json")
# The fastest RBF beside cuDNN's dot product, causal and full.
HOPPER = (
    Path("docs/measurements/bench_attention_h200_64.json"),
    Path("docs/measurements/bench_attention_h200_128.json"),
)

Numbers = Mapping[str, Any]


def naive(memory: Numbers) -> tuple[str, str]:
    """Naive distances exhaust memory: they run out where the kernel does not."""
    rows = memory["memory"]
    limit = max(r["bytes_limit"] for r in rows if r["bytes_limit"])
    naive, dot = (_runs_out(rows, n) for n in ("RBF reference", "dot product, jax.nn xla"))
    fused = max(r["length"] for r in rows if _fits(r) and r["implementation"] == "RBF triton")
    text = (
        f"with {limit / 2**30:.0f} GiB (B 1, N 8, H 64, forward + backward) the naive path runs "
        f"out at T = {naive:,}, jax.nn's dot product through XLA at {dot:,}; the kernel ran at "
        f"{fused:,}"
    )
    return text, HOLDS if naive <= fused else NOT


def reformulated(memory: Numbers, profile: Numbers) -> tuple[str, str]:
    """The reformulation is linear in memory; it is slower, on a GPU and on a CPU.

    On a GPU by XLA alone, and fused in the fastest kernel too.
    """
    sizes = {
        r["length"]: r["temporary_bytes"]
        for r in memory["memory"]
        if r["implementation"] == "RBF xla" and _fits(r)
    }
    *_, before, last = sorted(sizes)
    exponent = math.log(sizes[last] / sizes[before]) / math.log(last / before)
    gpu = _ratios(profile["results"], "RBF xla", "dot product, cuDNN")
    cpu = _ratios(json.loads(CPU.read_text())["results"], "rbf xla", "dot, jax.nn xla")
    text = (
        f"memory grows as T^{exponent:.2f}; by XLA alone it takes {_range(gpu)} times as long as "
        f"cuDNN's dot product on an {profile['device']}, and {_range(cpu)} times as long as "
        "jax.nn's on a CPU (forward + backward, causal); fused in the Mosaic kernels "
        f"{_hopper_text()}"
    )
    slower = [rules.exceeds(times, 1.0) for times in (gpu, cpu, _hopper("forward+backward"))]
    return text, rules.verdict([exponent < 1.1, *slower])


def kernel(profile: Numbers) -> tuple[str, str]:
    """A fused kernel is faster than what needs none of ours, and takes less memory.

    By the Triton kernels, which were measured beside both. That it costs expertise is not measured:
    the claim holds in part at most.
    """
    rows, ours = profile["results"], "RBF triton"
    others = ("RBF xla", "RBF cudnn")
    times = [_ratios(rows, name, ours) for name in others]
    sizes = [_ratios(rows, name, ours, "temporary_bytes") for name in others]
    dot = _ratios(rows, ours, "dot product, cuDNN")
    text = (
        f"H 64, causal, forward + backward, T {_lengths(rows, ours)}: the Triton "
        f"kernel takes {_range(dot)} times as long as cuDNN's dot product; the reformulation by "
        f"XLA alone takes {_range(times[0])} times the kernel's time and "
        f"{_range(sizes[0], 0)} times its memory; with the norms folded into cuDNN's dot product, "
        "which needs no kernel of ours, "
        f"{_range(times[1])} times the kernel's time and {_range(sizes[1], 0)} times its memory. "
        f"The Mosaic kernels take {_hopper_text()}. "
        "Expertise is not measured; a call of `rbf_attention` asks for none"
    )
    found = rules.verdict(rules.exceeds(some, KERNEL_MARGIN) for some in (*times, *sizes))
    return text, IN_PART if found == HOLDS else found


def registers(registers: Numbers) -> tuple[str, str]:
    """Without registers training is unstable; the loss rises."""
    none, one = registers["sink=none"], registers["base"]
    loss, spikes = none["final_difference"], none["spikes_difference"]
    first = [f"{r['first_token_mass']:.1%}" for r in (none, one)]
    even = [f"{r['even_share']:.1%}" for r in (none, one)]
    register = one["register_mass"]
    diverged = none["spikes"]["missing"] - one["spikes"]["missing"]
    text = (
        f"without, the loss is {_signed(loss)} nats against one at the origin, with "
        f"{none['spikes']['mean']:.1f} spikes a run against {one['spikes']['mean']:.1f} and "
        f"{none['spikes']['missing']} diverged seeds of {len(none['seeds'])} against "
        f"{one['spikes']['missing']}; the first token takes {first[0]} of the attention (an even "
        f"share: {even[0]}) against {first[1]} ({even[1]}), the register {register:.1%} "
        "(corruption of real tokens is judged by the loss alone)"
    )
    unstable = True if diverged > 0 else rules.rises(spikes, SPIKE_MARGIN)
    return text, rules.verdict([unstable, rules.rises(loss, MARGIN)])


def positions(positions: Numbers, layer: Numbers) -> tuple[str, str]:
    """RoPE is worse than SuSiE for distances; SuSiE costs time, forward and with the way back."""
    rbf, dot = positions["positions=rope"]["less_susie"], positions["kind=dot"]["less_rope"]
    forward, both = (
        _ratios(layer["results"], "RBF, SuSiE", "RBF, RoPE", direction=direction)
        for direction in ("forward", "forward+backward")
    )
    text = (
        f"RBF with RoPE instead of SuSiE: {_signed(rbf)} nats; the dot product with SuSiE instead "
        f"of RoPE: {_signed(dot)}; an RBF layer with SuSiE takes {_range(forward)} times as long "
        f"as with RoPE forward, and {_range(both)} times forward + backward ({layer['device']})"
    )
    costs = rules.exceeds([*forward, *both], STEP_MARGIN)
    return text, rules.verdict([rules.rises(rbf, MARGIN), costs])


def early(curves: Numbers, stability: Numbers) -> tuple[str, str]:
    """First gradients are lower, at each learning rate; the final loss is, against both scales."""
    usual, matched = (
        curves["differences"][f"base against {name}"]
        for name in ("kind=dot", "dot_scale=rbf,kind=dot")
    )
    keys = ("log_gradient_less_dot", "log_gradient_less_matched")
    ratios = [tuple(n[k] for k in keys) for n in stability.values() if all(k in n for k in keys)]
    if not ratios:
        raise LookupError("no learning rate at which all three were trained")
    tame = [rules.both(rules.falls(r, GRADIENT_MARGIN) for r in pair) for pair in ratios]
    shown, of_matched = (
        ", ".join(f"{math.exp(r['mean']):.2f}" for r in column) for column in zip(*ratios)
    )
    by = ", by learning rate" if len(ratios) > 1 else ", at one learning rate"
    text = (
        f"gradient norm of the first steps over the dot product's{by}: {shown}, over that of "
        f"RBF's scale {of_matched} ({GRADIENT_MARGIN:.0%} below both: confirmed at "
        f"{tame.count(True)} of {len(tame)}, refuted at {tame.count(False)}); final loss "
        f"{_signed(usual['final_difference'])} nats against the dot product, steps saved "
        f"{_signed(usual['steps_saved'], 0)}; against the dot product of RBF's scale "
        f"{_signed(matched['final_difference'])}, {_signed(matched['steps_saved'], 0)}"
    )
    lower = [rules.falls(d["final_difference"], MARGIN) for d in (usual, matched)]
    return text, rules.verdict([*tame, *lower])


def overall(sensitivity: Numbers, curves: Numbers) -> tuple[str, str]:
    """RBF gains nothing that counts over any dot product; a training step is slower."""
    less = sensitivity["RBF"]["best_less"]
    names = ("dot product", "dot product, RBF's scale", "dot product + QK-norm")
    usual, matched, normed = (less[name] for name in names)
    both_normed = sensitivity["RBF + QK-norm"]["best_less"]["dot product + QK-norm"]
    rope, rope_normed = (
        curves["differences"][f"base against {name}"]["final_difference"]
        for name in (
            "kind=dot,positions=rope,register_init=normal",
            "kind=dot,qk_norm=True,positions=rope",
        )
    )
    rbf, dot = (r["tokens_per_second"] for r in json.loads(TRAINING.read_text())["results"])
    rates = len(sensitivity["RBF"]["by_rate"])
    how = f"each at the best of {rates} learning rates" if rates > 1 else "at one learning rate"
    rope_how = ", trained at one learning rate alone," if rates > 1 else ""
    text = (
        f"RBF less dot products, SuSiE for all, {how}: {_signed(usual)} nats against the usual "
        f"one, {_signed(matched)} against RBF's scale, {_signed(normed)} against QK-norm (RBF + "
        f"QK-norm less that: {_signed(both_normed)}); against a dot product with RoPE{rope_how} "
        f"{_signed(rope)}, with RoPE and QK-norm {_signed(rope_normed)}; a training step at the "
        f"original's sizes runs at {rbf / dot:.2f} of the dot product's tokens/s on an H100"
    )
    losses = (usual, matched, normed, rope, rope_normed)
    parts = [rules.no(rules.falls(loss, MARGIN)) for loss in losses]
    return text, rules.verdict([*parts, rules.exceeds([dot / rbf], STEP_MARGIN)])


def _fits(row: Numbers) -> bool:
    return not (row.get("error") or row["runs_out"]) and row.get("temporary_bytes", 0) > 0


def _runs_out(rows: list[Numbers], name: str) -> int:
    """The least length at which it does."""
    lengths = [r["length"] for r in rows if r["implementation"] == name and not _fits(r)]
    if not lengths:
        raise LookupError(f"{name} never ran out")
    return min(lengths)


def _ratios(
    rows: list[Numbers],
    name: str,
    reference: str,
    key: str = "milliseconds",
    direction: str = "forward+backward",
) -> list[float]:
    """Time, or another number, over the reference's, by length."""
    found = {
        (r["implementation"], r["length"]): r[key]
        for r in rows
        if r["direction"] == direction and r[key]
    }
    lengths = sorted(T for who, T in found if who == name and (reference, T) in found)
    if not lengths:
        raise LookupError(f"no {key} of {name} beside {reference}")
    return [found[name, T] / found[reference, T] for T in lengths]


def _hopper(direction: str) -> list[float]:
    """Time of the Mosaic kernels over that of cuDNN's dot product, in every cell."""
    return [
        ratio
        for path in HOPPER
        for causal in (True, False)
        for ratio in _ratios(
            [r for r in json.loads(path.read_text())["results"] if r["causal"] is causal],
            "RBF mosaic",
            "dot product, cuDNN",
            direction=direction,
        )
    ]


def _hopper_text() -> str:
    cells = _hopper("forward+backward")
    return (
        f"{_range(_hopper('forward'))} times as long as cuDNN's dot product forward and "
        f"{_range(cells)} times forward + backward ({len(cells)} cells of H, T, causal or full)"
    )


def _lengths(rows: list[Numbers], name: str) -> str:
    lengths = sorted({r["length"] for r in rows if r["implementation"] == name})
    return f"{lengths[0]:,} to {lengths[-1]:,}"


def _range(values: list[float], digits: int = 2) -> str:
    ends = dict.fromkeys(f"{value:,.{digits}f}" for value in (min(values), max(values)))
    return " to ".join(ends)


def _signed(value: Numbers, digits: int = 4) -> str:
    """A mean and its interval."""
    if not value["n"]:
        raise LookupError("all seeds diverged")
    return paired.interval(value, digits)

"""What the article claims, what was measured, and the verdict: by rules, so that other numbers give
other verdicts.

A difference is clear where its 95 % interval leaves out 0, and of no account where the interval
lies within ± `MARGIN` nats a token. Gradient norms are lower where the interval of the logarithm of
their ratio lies below −`GRADIENT_MARGIN`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rbf_jax.analysis import paired

HOLDS, IN_PART, NOT, OPEN = "holds", "holds in part", "does not hold", "not decided"
MARGIN = 0.01
# Of the logarithm of a ratio of gradient norms.
GRADIENT_MARGIN = 0.05
# The training step of the model at the original's sizes, by experiments.bench_training.
TRAINING = Path("docs/measurements/bench_training_gpu.json")
CPU = Path("docs/measurements/bench_attention_cpu.json")

Numbers = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """On one claim.

    Attributes:
      claim: what the article says.
      measured: what we found.
      verdict: one of the four.
      figures: names of those that show it.
    """

    claim: str
    measured: str
    verdict: str
    figures: tuple[str, ...]


def verdicts(numbers: Mapping[str, Numbers]) -> list[Verdict]:
    """The verdict on each claim, in the article's order.

    Args:
      numbers: what each figure's drawing returned, by its name; a claim whose figures are not all
        there, or lack a variant, is not decided.
    """
    found = []
    for claim, figures, judge in CLAIMS:
        missing = [name for name in figures if name not in numbers]
        try:
            if missing:
                raise LookupError(f"no {' and no '.join(missing)}")
            measured, verdict = judge(*(numbers[name] for name in figures))
        except (LookupError, OSError) as error:
            measured, verdict = f"not measured: {error}", OPEN
        found.append(Verdict(claim, measured, verdict, figures))
    return found


def table(found: list[Verdict], folder: str = "") -> str:
    """Markdown: a row for each claim, with links to figures in `folder` and what redraws them."""
    lines = [
        "| the article says | measured | verdict | figures | `python -m experiments.figures …` |",
        "|---|---|---|---|---|",
    ]
    for v in found:
        links = ", ".join(f"[{name}]({folder}{name}.png)" for name in v.figures)
        command = f"`--figure={','.join(v.figures)}`"
        lines.append(f"| {v.claim} | {v.measured} | **{v.verdict}** | {links} | {command} |")
    return "\n".join(lines) + "\n"


def short_table(found: list[Verdict]) -> str:
    """Markdown: claims and verdicts alone."""
    lines = ["| the article says | verdict |", "|---|---|"]
    lines += [f"| {v.claim} | {v.verdict} |" for v in found]
    return "\n".join(lines) + "\n"


def _naive(memory: Numbers) -> tuple[str, str]:
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


def _reformulated(memory: Numbers, profile: Numbers) -> tuple[str, str]:
    sizes = {
        r["length"]: r["temporary_bytes"]
        for r in memory["memory"]
        if r["implementation"] == "RBF xla" and _fits(r)
    }
    *_, before, last = sorted(sizes)
    exponent = math.log(sizes[last] / sizes[before]) / math.log(last / before)
    gpu = _slowdowns(profile["results"], "RBF xla", "dot product, cuDNN")
    cpu = _slowdowns(json.loads(CPU.read_text())["results"], "rbf xla", "dot, jax.nn xla")
    text = (
        f"memory grows as T^{exponent:.2f}; on an H100 it takes {_range(gpu)} times as long as "
        f"cuDNN's dot product, on a CPU {_range(cpu)} times as long as jax.nn's "
        "(forward + backward, causal)"
    )
    linear, slow = exponent < 1.1, (min(gpu) > 1, min(cpu) > 1)
    if linear and all(slow):
        return text, HOLDS
    return text, IN_PART if linear or any(slow) else NOT


def _kernel(profile: Numbers) -> tuple[str, str]:
    rows, dot = profile["results"], "dot product, cuDNN"
    plain, folded, fused = (
        _slowdowns(rows, f"RBF {name}", dot) for name in ("xla", "cudnn", "triton")
    )
    folder = Path(__file__).parents[2] / "ops" / "triton"
    code = sum(len(p.read_text().splitlines()) for p in folder.glob("*.py"))
    thousands = max(round(code / 1000), 1)
    text = (
        f"H 64, causal: {_range(plain)} times the dot product's time by XLA alone, "
        f"{_range(folded)} by folding the norms into cuDNN's dot product, {_range(fused)} with our "
        f"kernel, which is some {thousands},000 lines; a call of `rbf_attention` costs its user "
        "none of that"
    )
    return text, HOLDS if min(*plain, *folded) > 1.2 * min(fused) else IN_PART


def _registers(registers: Numbers) -> tuple[str, str]:
    none, one = registers["num_registers=0"], registers["base"]
    loss = none["final_difference"]
    diverged = none["spikes"]["missing"] - one["spikes"]["missing"]
    spikes = none["spikes"]["mean"] - one["spikes"]["mean"]
    text = (
        f"without, the loss is {_signed(loss)} nats against one at the origin, with "
        f"{none['spikes']['mean']:.1f} spikes a run against {one['spikes']['mean']:.1f} and "
        f"{none['spikes']['missing']} diverged seeds of {len(none['seeds'])} against "
        f"{one['spikes']['missing']}; the first token takes {none['first_token_mass']:.1%} of the "
        f"attention against {one['first_token_mass']:.1%}, the register {one['register_mass']:.1%} "
        "(corruption of real tokens is judged by the loss alone)"
    )
    unstable, worse = diverged > 0 or spikes > 1, loss["low"] > 0
    if unstable or worse:
        return text, HOLDS if unstable and worse else IN_PART
    return text, NOT if loss["high"] < MARGIN else OPEN


def _positions(positions: Numbers, layer: Numbers) -> tuple[str, str]:
    rbf, dot = positions["positions=rope"]["less_susie"], positions["kind=dot"]["less_rope"]
    times = _slowdowns(layer["results"], "RBF, SuSiE", "RBF, RoPE")
    text = (
        f"RBF with RoPE instead of SuSiE: {_signed(rbf)} nats; the dot product with SuSiE instead "
        f"of RoPE: {_signed(dot)}; an RBF layer with SuSiE takes {_range(times)} times as long as "
        f"with RoPE ({layer['device']})"
    )
    right, costs = rbf["low"] > 0, max(times) > 1.02
    if right:
        return text, HOLDS if costs else IN_PART
    return text, NOT if rbf["high"] < MARGIN else OPEN


def _early(curves: Numbers, stability: Numbers) -> tuple[str, str]:
    usual, matched = (
        curves["differences"][f"base against {name}"]
        for name in ("kind=dot", "dot_scale=rbf,kind=dot")
    )
    keys = ("log_gradient_less_dot", "log_gradient_less_matched")
    ratios = [tuple(n[k] for k in keys) for n in stability.values() if all(k in n for k in keys)]
    if not ratios:
        raise LookupError("no learning rate at which all three were trained")
    tame = sum(all(r["high"] < -GRADIENT_MARGIN for r in both) for both in ratios)
    wild = sum(all(r["low"] > GRADIENT_MARGIN for r in both) for both in ratios)
    shown, of_matched = (
        ", ".join(f"{math.exp(r['mean']):.2f}" for r in column) for column in zip(*ratios)
    )
    text = (
        f"gradient norm of the first steps over the dot product's, by learning rate: {shown}, "
        f"over that of RBF's scale {of_matched} (clearly {GRADIENT_MARGIN:.0%} below both at "
        f"{tame} of {len(ratios)}, above both at {wild}); final loss "
        f"{_signed(usual['final_difference'])} nats against the dot product, steps saved "
        f"{_signed(usual['steps_saved'], 0)}; against the dot product of RBF's scale "
        f"{_signed(matched['final_difference'])}, {_signed(matched['steps_saved'], 0)}"
    )
    losses = [d["final_difference"] for d in (usual, matched)]
    faster = all(loss["high"] < 0 for loss in losses)
    if faster and tame > wild:
        return text, HOLDS
    if faster or tame > wild:
        return text, IN_PART
    return text, NOT if all(loss["low"] > -MARGIN for loss in losses) else OPEN


def _overall(sensitivity: Numbers, curves: Numbers) -> tuple[str, str]:
    best = sensitivity["RBF"]["best_less_dot"]
    rope, normed = (
        curves["differences"][f"base against {name}"]["final_difference"]
        for name in (
            "kind=dot,positions=rope,register_init=normal",
            "kind=dot,qk_norm=True,positions=rope",
        )
    )
    rbf, dot = (r["tokens_per_second"] for r in json.loads(TRAINING.read_text())["results"])
    speed = rbf / dot
    text = (
        f"RBF with SuSiE against a dot product with SuSiE, each at its best learning rate: "
        f"{_signed(best)} nats; at one learning rate against a dot product with RoPE "
        f"{_signed(rope)}, with RoPE and QK-norm {_signed(normed)}; a training step at the "
        f"original's sizes runs at {speed:.2f} of the dot product's tokens/s on an H100"
    )
    losses, slower = (best, rope, normed), speed < 0.98
    if all(loss["high"] < 0 for loss in losses):
        return text, OPEN if slower else NOT
    if slower or any(loss["low"] > 0 for loss in losses):
        return text, HOLDS
    none = all(loss["low"] > -MARGIN and loss["high"] < MARGIN for loss in losses)
    return text, IN_PART if none else OPEN


def _fits(row: Numbers) -> bool:
    return not (row.get("error") or row["runs_out"]) and row.get("temporary_bytes", 0) > 0


def _runs_out(rows: list[Numbers], name: str) -> int:
    """The least length at which it does.

    Raises:
      LookupError: it never does.
    """
    lengths = [r["length"] for r in rows if r["implementation"] == name and not _fits(r)]
    if not lengths:
        raise LookupError(f"{name} never ran out")
    return min(lengths)


def _slowdowns(rows: list[Numbers], name: str, reference: str) -> list[float]:
    """Time over the reference's, forward + backward, at each length where both were timed.

    Raises:
      LookupError: there is none.
    """
    times = {
        (r["implementation"], r["length"]): r["milliseconds"]
        for r in rows
        if r["direction"] == "forward+backward" and r["milliseconds"]
    }
    lengths = sorted(
        length for who, length in times if who == name and (reference, length) in times
    )
    if not lengths:
        raise LookupError(f"no times of {name} beside {reference}")
    return [times[name, length] / times[reference, length] for length in lengths]


def _range(values: list[float]) -> str:
    ends = dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values)))
    return " to ".join(ends)


def _signed(value: Numbers, digits: int = 4) -> str:
    """A mean and its interval."""
    if not value["n"]:
        raise LookupError("all seeds diverged")
    return paired.interval(value, digits)


CLAIMS: tuple[tuple[str, tuple[str, ...], Callable[..., tuple[str, str]]], ...] = (
    ("naive distances exhaust memory at long context", ("memory",), _naive),
    (
        "the reformulation is linear in memory, but slower than dot products",
        ("memory", "profile"),
        _reformulated,
    ),
    ("a fused kernel is needed, and costs expertise", ("profile",), _kernel),
    (
        "without registers at the origin training is unstable, or real tokens are corrupted",
        ("registers",),
        _registers,
    ),
    (
        "RoPE is wrong for distances and SuSiE right, at some cost",
        ("positions", "layer_profile"),
        _positions,
    ),
    (
        "logits capped at 0 tame early gradients, and training converges slightly faster",
        ("loss_curves", "stability"),
        _early,
    ),
    ("the hurdles currently outweigh the benefits", ("sensitivity", "loss_curves"), _overall),
)

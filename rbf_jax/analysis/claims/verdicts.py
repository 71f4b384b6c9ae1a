"""The verdict on each claim of the article: by rules, so that other numbers give other verdicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rbf_jax.analysis.claims import judges
from rbf_jax.analysis.claims.rules import OPEN

Numbers = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """On one claim.

    Attributes:
      claim: what the article says.
      measured: what we found.
      verdict: one of the four of `rules`.
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
    return [_judged(claim, figures, judge, numbers) for claim, figures, judge in CLAIMS]


def at_one_rate(curves: Numbers, layer: Numbers | None) -> list[Verdict]:
    """The verdicts that a text allows on which nothing but the variants of `loss_curves` was
    trained: by the same rules, at one learning rate.

    Args:
      curves: what the drawing of "loss_curves" returned.
      layer: what that of "layer_profile" did, which knows no text; None if there is none.
    """
    numbers = {"loss_curves": curves, **_figures_at_one_rate(curves)}
    if layer is not None:
        numbers["layer_profile"] = layer
    found = [
        _judged(claim, figures, judge, numbers)
        for claim, figures, judge in CLAIMS
        if {"positions", "stability", "sensitivity"} & set(figures)
    ]
    return [dataclasses.replace(v, figures=("loss_curves",)) for v in found]


def table(found: Sequence[Verdict], folder: str = "") -> str:
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


def short_table(found: Sequence[Verdict], other_texts: Mapping[str, Sequence[Verdict]]) -> str:
    """Markdown: claims and verdicts alone; a column for each other text, "–" where it has none."""
    names = "".join(f" {name} |" for name in other_texts)
    lines = [f"| the article says | verdict |{names}", "|---|---|" + "---|" * len(other_texts)]
    for v in found:
        others = [
            {o.claim: o.verdict for o in text}.get(v.claim, "–") for text in other_texts.values()
        ]
        lines.append(f"| {' | '.join([v.claim, v.verdict, *others])} |")
    return "\n".join(lines) + "\n"


def _judged(
    claim: str,
    figures: tuple[str, ...],
    judge: Callable[..., tuple[str, str]],
    numbers: Mapping[str, Numbers],
) -> Verdict:
    missing = [name for name in figures if name not in numbers]
    try:
        if missing:
            raise LookupError(f"no {' and no '.join(missing)}")
        measured, verdict = judge(*(numbers[name] for name in figures))
    except (LookupError, OSError) as error:
        measured, verdict = f"not measured: {error}", OPEN
    return Verdict(claim, measured, verdict, figures)


def _figures_at_one_rate(curves: Numbers) -> dict[str, Numbers]:
    """What positions, stability and sensitivity say, of the one learning rate of the curves."""
    found = curves["differences"]

    def final(name: str) -> Numbers:
        return found.get(name, {}).get("final_difference", {"n": 0})

    def gradients(name: str) -> Numbers:
        return found.get(name, {}).get("log_gradient_norm", {"n": 0})

    names = {
        "dot product": "kind=dot",
        "dot product, RBF's scale": "dot_scale=rbf,kind=dot",
        "dot product + QK-norm": "kind=dot,qk_norm=True",
    }
    less = {kind: final(f"base against {name}") for kind, name in names.items()}
    normed = {"dot product + QK-norm": final("qk_norm=True against kind=dot,qk_norm=True")}
    return {
        "positions": {
            "positions=rope": {"less_susie": final("positions=rope against base")},
            "kind=dot": {"less_rope": final("kind=dot against kind=dot,positions=rope")},
        },
        "stability": {
            "base": {
                "log_gradient_less_dot": gradients("base against kind=dot"),
                "log_gradient_less_matched": gradients("base against dot_scale=rbf,kind=dot"),
            }
        },
        "sensitivity": {
            "RBF": {"best_less": less, "by_rate": (None,)},
            "RBF + QK-norm": {"best_less": normed},
        },
    }


CLAIMS: tuple[tuple[str, tuple[str, ...], Callable[..., tuple[str, str]]], ...] = (
    ("naive distances exhaust memory at long context", ("memory",), judges.naive),
    (
        "the reformulation is linear in memory, but slower than dot products",
        ("memory", "profile"),
        judges.reformulated,
    ),
    ("a fused kernel is needed, and costs expertise", ("profile",), judges.kernel),
    (
        "without registers at the origin training is unstable, or real tokens are corrupted",
        ("registers",),
        judges.registers,
    ),
    (
        "RoPE is wrong for distances and SuSiE right, at some cost",
        ("positions", "layer_profile"),
        judges.positions,
    ),
    (
        "logits capped at 0 tame early gradients, and training converges slightly faster",
        ("loss_curves", "stability"),
        judges.early,
    ),
    (
        "the hurdles currently outweigh the benefits",
        ("sensitivity", "loss_curves"),
        judges.overall,
    ),
)

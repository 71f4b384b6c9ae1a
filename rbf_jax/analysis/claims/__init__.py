"""Every claim's figure: what it needs trained, and how it is drawn from records."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rbf_jax.analysis.claims import (
    choices,
    inside,
    lengths,
    operation,
    training,
    verdicts,
)
from rbf_jax.analysis.records import Record
from rbf_jax.analysis.report import jsonable, save_figure
from rbf_jax.analysis.variants import Variant
from rbf_jax.data.files import write_text

Draw = Callable[[Sequence[Record]], tuple[Figure, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A figure.

    Attributes:
      name: of its files.
      title: in reports.
      trained: the file of configs/figures that says what it needs trained; "" for nothing.
      draw: from the records that are there, in the order of that file.
    """

    name: str
    title: str
    trained: str
    draw: Draw


FIGURES = {
    claim.name: claim
    for claim in (
        Claim("loss_curves", "RBF against dot product", "twins", training.loss_curves),
        Claim(
            "attention_maps", "Attention, registers and sinks", "registers", inside.attention_maps
        ),
        Claim("key_norms", "Norms of keys", "twins", inside.key_norms),
        Claim("registers", "Registers and the origin sink", "registers", choices.registers),
        Claim("positions", "Positions", "positions", choices.positions),
        Claim("lengths", "Longer contexts than trained at", "positions", lengths.lengths),
        Claim("stability", "The first steps", "learning_rate", training.stability),
        Claim("sensitivity", "The learning rate", "learning_rate", training.sensitivity),
        Claim("dial", "From dot product to RBF", "dial", choices.dial),
        Claim("profile", "Time and memory of the operation", "", operation.profile),
        Claim("layer_profile", "Time and memory of the layer", "", operation.layer_profile),
        Claim("memory", "Memory against T", "", operation.memory),
    )
}

# Beside their figures, in Markdown.
TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "loss_curves": training.difference_table,
    "lengths": lengths.lengths_table,
}


def named(names: str) -> list[Claim]:
    """Returns the figures of "all", or of names with commas between.

    Raises:
      ValueError: there is no such figure.
    """
    if names == "all":
        return list(FIGURES.values())
    found = []
    for name in names.split(","):
        if name not in FIGURES:
            near = difflib.get_close_matches(name, FIGURES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"--figure is {name!r}; it must be all, or of {', '.join(FIGURES)}{hint}"
            )
        found.append(FIGURES[name])
    return found


def write(
    claims: Sequence[Claim],
    needed: Mapping[str, Sequence[Variant]],
    found: Mapping[str, Record],
    failed: Mapping[str, str],
    out: Path,
    command: str,
) -> list[str]:
    """Draws; writes NAME.png, NAME.svg, NAME.json, verdicts.json and report.md into `out`.

    Verdicts are those on claims all of whose figures are among `claims`; of "loss_curves" without
    them, those that one learning rate allows.

    Args:
      claims: the figures.
      needed: variants by figure.
      found: records by variant.
      failed: reasons by variant.
      out: the folder.
      command: that leads here.

    Returns:
      The names of figures that could not be drawn.
    """
    undrawn: list[str] = []
    lines: list[str] = []
    numbers_of: dict[str, Any] = {}
    for claim in claims:
        lines += [f"## {claim.title}", ""]
        variants = needed[claim.name]
        records = [found[v.name] for v in variants if v.name in found]
        missing = [v.name for v in variants if v.name not in found]
        if missing:
            reasons = [f"{name}: {failed.get(name, 'no record')}" for name in missing]
            lines += [f"Missing: {'; '.join(reasons)}", ""]
        if variants and not records:
            undrawn.append(claim.name)
            continue
        try:
            drawn, numbers = claim.draw(records)
        except OSError as error:
            undrawn.append(claim.name)
            lines += [f"Not drawn: {error}", ""]
            continue
        save_figure(drawn, out, claim.name, ("png", "svg"))
        numbers_of[claim.name] = numbers
        _write_json(out / f"{claim.name}.json", numbers)
        lines += [
            f"![{claim.title}]({claim.name}.png)",
            "",
            f"[as vectors]({claim.name}.svg), [numbers]({claim.name}.json)",
            "",
        ]
        if claim.name in TABLES:
            lines += [TABLES[claim.name](numbers)]
    asked = {claim.name for claim in claims}
    judged = [v for v in verdicts.verdicts(numbers_of) if set(v.figures) <= asked]
    if not judged and "loss_curves" in numbers_of:
        judged = verdicts.at_one_rate(numbers_of["loss_curves"], operation.layer_numbers())
    _write_json(out / "verdicts.json", [dataclasses.asdict(v) for v in judged])
    head = ["# Figures", "", f"`{command}`", "", *_machine(found), ""]
    head += [verdicts.table(judged)] if judged else []
    write_text(out / "report.md", "\n".join([*head, *lines]).rstrip() + "\n")
    return undrawn


def _machine(found: Mapping[str, Record]) -> list[str]:
    """On what the records were made: one line each machine, versions and number of seeds."""
    said: dict[str, set[str]] = {}
    for record in found.values():
        summary = record.summary
        versions = ", ".join(f"{k} {v}" for k, v in summary["versions"].items())
        text = f"{summary['device']}; {versions}; seeds {', '.join(map(str, record.seeds))}"
        said.setdefault(text, set()).add(summary["date"][:10])
    return [f"* {text}; {', '.join(sorted(dates))}" for text, dates in said.items()]


def _write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(jsonable(content), indent=1) + "\n")

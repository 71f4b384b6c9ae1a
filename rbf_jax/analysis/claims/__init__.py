"""Every claim's figure: what it needs trained, and how it is drawn from records."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rbf_jax.analysis.attention_profile import save
from rbf_jax.analysis.claims import choices, inside, operation, training
from rbf_jax.analysis.records import Record
from rbf_jax.analysis.variants import Variant
from rbf_jax.data.files import write_text

Draw = Callable[[Sequence[Record]], tuple[Figure, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A figure.

    Attributes:
      name: of its files.
      title: in reports.
      trained: module of configs/figures that says what it needs, or "".
      draw: from the records that are there, in the order of that file.
    """

    name: str
    title: str
    trained: str
    draw: Draw

    @property
    def config(self) -> Callable[[], Any] | None:
        """Returns what it needs trained; None where nothing is."""
        if not self.trained:
            return None
        return importlib.import_module(f"configs.figures.{self.trained}").get_config


FIGURES = {
    claim.name: claim
    for claim in (
        Claim("loss_curves", "RBF against dot product", "twins", training.loss_curves),
        Claim("attention_maps", "Attention, registers and sinks", "twins", inside.attention_maps),
        Claim("key_norms", "Norms of keys", "twins", inside.key_norms),
        Claim("registers", "Registers and the origin sink", "registers", choices.registers),
        Claim("positions", "Positions", "positions", choices.positions),
        Claim("lengths", "Longer contexts than trained at", "positions", choices.lengths),
        Claim("stability", "The first steps", "learning_rate", training.stability),
        Claim("sensitivity", "The learning rate", "learning_rate", training.sensitivity),
        Claim("dial", "From dot product to RBF", "dial", choices.dial),
        Claim("profile", "Time and memory of the operation", "", operation.profile),
        Claim("memory", "Memory against T", "", operation.memory),
    )
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
) -> None:
    """Draws; writes NAME.png, NAME.svg, NAME.json and report.md into `out`.

    Args:
      claims: the figures.
      needed: variants by figure.
      found: records by variant.
      failed: reasons by variant.
      out: the folder.
      command: that leads here.
    """
    lines = ["# Figures", "", f"`{command}`", "", *_machine(found), ""]
    for claim in claims:
        lines += [f"## {claim.title}", ""]
        variants = needed[claim.name]
        records = [found[v.name] for v in variants if v.name in found]
        missing = [v.name for v in variants if v.name not in found]
        if missing:
            reasons = [f"{name}: {failed.get(name, 'no record')}" for name in missing]
            lines += [f"Missing: {'; '.join(reasons)}", ""]
        if variants and not records:
            continue
        try:
            drawn, numbers = claim.draw(records)
        except OSError as error:
            lines += [f"Not drawn: {error}", ""]
            continue
        save(drawn, out / claim.name)
        write_text(out / f"{claim.name}.json", json.dumps(_jsonable(numbers), indent=1) + "\n")
        lines += [
            f"![{claim.title}]({claim.name}.png)",
            "",
            f"[as vectors]({claim.name}.svg), [numbers]({claim.name}.json)",
            "",
        ]
    write_text(out / "report.md", "\n".join(lines).rstrip() + "\n")


def _machine(found: Mapping[str, Record]) -> list[str]:
    """On what the records were made: one line each machine, versions and number of seeds."""
    said = {}
    for record in found.values():
        summary = record.summary
        versions = ", ".join(f"{k} {v}" for k, v in summary["versions"].items())
        text = f"{summary['device']}; {versions}; seeds {', '.join(map(str, record.seeds))}"
        said.setdefault(text, set()).add(summary["date"][:10])
    return [f"* {text}; {', '.join(sorted(dates))}" for text, dates in said.items()]


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

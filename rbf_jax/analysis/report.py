"""Writes a report: Markdown, the pictures that it shows, and the numbers as JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from rbf_jax.analysis.style import STYLE
from rbf_jax.data.files import replacing, write_text


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report: heading, Markdown, and figures by the stem of their files' names."""

    title: str
    text: str
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)


def write_report(
    out: Path, title: str, sections: Sequence[Section], numbers: Any, vectors: str = "pdf"
) -> list[Path]:
    """Writes report.md, numbers.json and figures/NAME.png and .pdf, each beside and renamed.

    Args:
      out: the folder; made if it is not there.
      title: the report's heading.
      sections: its parts, in order.
      numbers: what goes into numbers.json; NaN and infinity become null.
      vectors: "pdf" or "svg": what the figures are written as beside PNG.

    Returns:
      The files written, report.md first.
    """
    pictures: list[Path] = []
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.text, ""]
        for stem, figure in section.figures.items():
            saved = save_figure(figure, out / "figures", stem, ("png", vectors))
            pictures += saved
            links = [urllib.parse.quote(f"figures/{path.name}") for path in saved]
            lines += [f"![{stem}]({links[0]})", "", f"[the same as vectors]({links[1]})", ""]
    write_text(
        out / "numbers.json", json.dumps(jsonable(numbers), indent=2, ensure_ascii=False) + "\n"
    )
    write_text(out / "report.md", "\n".join(lines).rstrip() + "\n")
    return [out / "report.md", out / "numbers.json", *pictures]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of a header and rows; first column to the left, the others to the right."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    rule = "|".join(["", ":---", *["---:"] * (len(rows[0]) - 1), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


# The same figure gives the same bytes.
_UNDATED: Mapping[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}


def save_figure(figure: Figure, folder: Path, stem: str, kinds: Sequence[str]) -> list[Path]:
    """Writes a figure in each of some formats, the same bytes for the same figure."""
    paths = [folder / f"{stem}.{kind}" for kind in kinds]
    for path, kind in zip(paths, kinds):
        content = io.BytesIO()
        with mpl.rc_context({**STYLE, "svg.hashsalt": stem}):
            figure.savefig(content, format=kind, metadata=_UNDATED[kind])
        figure.set_layout_engine("none")  # Laid out by now; once is enough.
        with replacing(path) as file:
            file.write(content.getvalue())
    return paths


def jsonable(value: Any) -> Any:
    """What JSON can hold: None for numbers that are not finite, lists for tuples."""
    if isinstance(value, Mapping):
        return {key: jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

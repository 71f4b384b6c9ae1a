"""The report of a comparison: Markdown, the pictures that it shows, and the numbers as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import math
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from rbf_jax.analysis.comparison import MISSING, Comparison
from rbf_jax.analysis.runs import Run
from rbf_jax.analysis.style import STYLE, variant
from rbf_jax.data.files import replacing

_METRIC_NAMES = {"loss": "validation loss", "bits_per_byte": "bits per byte"}


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report: heading, Markdown, and figures by the stem of their files' names."""

    title: str
    text: str
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)


def write_report(out: Path, title: str, sections: Sequence[Section], numbers: Any) -> list[Path]:
    """Writes report.md, numbers.json and figures/NAME.png and .pdf, each beside and renamed.

    Args:
      out: the folder; made if it is not there.
      title: the report's heading.
      sections: its parts, in order.
      numbers: what goes into numbers.json; NaN and infinity become null.

    Returns:
      The files written, report.md first.
    """
    pictures: list[Path] = []
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.text, ""]
        for stem, figure in section.figures.items():
            png, pdf = _save(figure, out / "figures", stem)
            pictures += [png, pdf]
            links = [urllib.parse.quote(f"figures/{path.name}") for path in (png, pdf)]
            lines += [f"![{stem}]({links[0]})", "", f"([{stem}, vector]({links[1]}))", ""]
    _write(out / "numbers.json", json.dumps(_jsonable(numbers), indent=2, ensure_ascii=False) + "\n")
    _write(out / "report.md", "\n".join(lines).rstrip() + "\n")
    return [out / "report.md", out / "numbers.json", *pictures]


def result_rows(runs: Sequence[Run], comparison: Comparison) -> list[list[str]]:
    """The table of results as text: a header, then one row a quantity, one column a run."""
    results = comparison.results
    rows = [["", *(run.name for run in runs)]]
    rows.append(["attention", *(variant(run.config) for run in runs)])
    rows.append(["step", *(_progress(run) for run in runs)])
    for key, label, write in _QUANTITIES:
        rows.append([label, *(write(result[key]) for result in results)])
        if key == "valid_perplexity":
            rows += _reach_rows(runs, comparison)
    return rows


def difference_rows(runs: Sequence[Run], comparison: Comparison) -> list[list[str]]:
    """The table of config keys that differ: a header, then one row a key, one column a run."""
    rows = [["config key", *(run.name for run in runs)]]
    for key, values in comparison.differences.items():
        rows.append([key, *(v if v is MISSING else json.dumps(v) for v in values)])
    return rows


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of a header and rows; first column to the left, the others to the right."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    rule = "|".join(["", ":---", *["---:"] * (len(rows[0]) - 1), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


def numbers(runs: Sequence[Run], comparison: Comparison) -> dict[str, Any]:
    """What goes into numbers.json."""
    names = [run.name for run in runs]
    return {
        "runs": {
            run.name: {"path": str(run.path), "attention": variant(run.config), **result}
            for run, result in zip(runs, comparison.results)
        },
        "differences": {k: dict(zip(names, v)) for k, v in comparison.differences.items()},
        "compared_metric": comparison.metric,
        "steps_to_reach_final_of": {
            name: dict(zip(names, steps)) for name, steps in zip(names, comparison.steps_to_reach)
        },
        "warnings": list(comparison.warnings),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _reach_rows(runs: Sequence[Run], comparison: Comparison) -> list[list[str]]:
    """For each run j a row: the step at which each run i first had j's final validation metric."""
    key = {"loss": "valid_loss", "bits_per_byte": "valid_bits_per_byte"}[comparison.metric]
    rows = []
    for j, (run, result) in enumerate(zip(runs, comparison.results)):
        if result[key] is None:
            continue
        label = f"step that reaches {run.name}'s final {_METRIC_NAMES[comparison.metric]}"
        rows.append([label, *(_reached(r, c[j]) for r, c in zip(runs, comparison.steps_to_reach))])
    return rows


def _reached(run: Run, step: float | None) -> str:
    if not len(run.valid["step"]):
        return MISSING
    if step is None:
        return "not reached"
    return f"≤ {step:,.0f}" if step == run.valid["step"][0] else f"{step:,.0f}"


def _progress(run: Run) -> str:
    planned = run.config["train"].get("steps")
    return f"{run.last_step:,}" if run.finished else f"{run.last_step:,} of {planned:,}, not ended"


def _decimals(digits: int):
    return lambda value: MISSING if value is None else f"{value:,.{digits}f}"


def _plain(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    return str(datetime.timedelta(seconds=round(seconds)))


_QUANTITIES = (
    ("valid_loss", "validation loss (nats per token)", _decimals(4)),
    ("best_valid_loss", "best validation loss (nats per token)", _decimals(4)),
    ("best_step", "at step", _decimals(0)),
    ("valid_bits_per_byte", "bits per byte", _decimals(4)),
    ("valid_perplexity", "perplexity per token", _decimals(2)),
    ("tokens_per_second", "tokens per second", _decimals(0)),
    ("seconds", "training time (h:mm:ss)", _duration),
    ("train_tokens", "training tokens", _decimals(0)),
    ("parameters", "parameters", _decimals(0)),
    ("seed", "seed", _plain),
    ("device", "device", _plain),
    ("versions", "versions", _plain),
    ("date", "date", _plain),
)


@mpl.rc_context(STYLE)
def _save(figure: Figure, folder: Path, stem: str) -> tuple[Path, Path]:
    """Writes a figure as PNG and PDF, without dates: the same figure gives the same bytes."""
    paths = folder / f"{stem}.png", folder / f"{stem}.pdf"
    for path, metadata in zip(paths, ({"Software": None}, {"CreationDate": None})):
        content = io.BytesIO()
        figure.savefig(content, format=path.suffix[1:], metadata=metadata)
        with replacing(path) as file:
            file.write(content.getvalue())
    return paths


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What the report of a comparison says: its tables, its sections, its numbers."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rbf_jax.analysis import figures
from rbf_jax.analysis.comparison import MISSING, Comparison
from rbf_jax.analysis.models import Findings
from rbf_jax.analysis.report import Section, markdown_table
from rbf_jax.analysis.runs import Run
from rbf_jax.analysis.style import variant
from rbf_jax.nn.config import VIRTUAL_SINKS

_METRIC_NAMES = {"loss": "validation loss", "bits_per_byte": "bits per byte"}

_ONE_SEED = (
    "**One seed is no proof.** Each column is one run with one seed. Part of every difference is "
    "noise of the initial parameters and of the order of the data, and a single run does not show "
    "how large a part. Before calling one better, train each several times "
    "(`--config.seed=1`, `2`, …) and see whether the difference is larger than the spread."
)


def title(runs: Sequence[Run]) -> str:
    """The report's heading."""
    return f"{', '.join(run.name for run in runs[:-1])} and {runs[-1].name}, side by side"


def sections(
    runs: Sequence[Run], comparison: Comparison, found: Sequence[Findings | str], command: str
) -> list[Section]:
    """The report's parts, in order.

    Args:
      runs: n runs.
      comparison: their numbers.
      found: what their models do, or why that is not known.
      command: what wrote the report.
    """
    date = datetime.date.today().isoformat()
    made = f"`{command}`, {date}. The numbers are in [numbers.json](numbers.json)."
    parts = [
        _results_section(runs, comparison),
        _differences_section(runs, comparison),
        _loss_section(runs, comparison),
        _stability_section(runs),
        _learned_section(runs),
        *_inside_sections(runs, found),
        Section("Written by", made),
    ]
    return [part for part in parts if part is not None]


def _results_section(runs: Sequence[Run], comparison: Comparison) -> Section:
    warnings = [f"> **Note.** {warning}\n" for warning in comparison.warnings]
    reading = (
        "Final numbers are those of the last validation. Steps to reach a loss are interpolated "
        "linearly between validations; *≤* marks a run that was there at its first validation."
    )
    parts = ["\n".join(warnings), markdown_table(result_rows(runs, comparison)), reading, _ONE_SEED]
    return Section("Results", "\n\n".join(part for part in parts if part))


def _differences_section(runs: Sequence[Run], comparison: Comparison) -> Section:
    table = markdown_table(difference_rows(runs, comparison))
    none = "Nothing: the runs have one and the same configuration."
    return Section(
        "What differs between the configurations", table if comparison.differences else none
    )


def _loss_section(runs: Sequence[Run], comparison: Comparison) -> Section:
    text = (
        "The first steps, where the loss falls from that of guessing, lie above what is shown. "
        f"On the right, below zero is better than {runs[0].name}."
    )
    return Section("Loss", text, {"loss": figures.loss_figure(runs, comparison.metric)})


def _stability_section(runs: Sequence[Run]) -> Section | None:
    figure = figures.stability_figure(runs)
    text = (
        "Thin: every logged step. Thick: running median. Spikes of the gradient norm, and logits "
        "that grow without end, come before a run diverges."
    )
    return Section("Stability", text, {"stability": figure}) if figure else None


def _learned_section(runs: Sequence[Run]) -> Section | None:
    figure = figures.learned_figure(runs)
    text = (
        "γ is the bandwidth, λ the weight of the key norms; a sink's logit is that of a virtual "
        "key with value 0. Thin: heads. Thick: their mean."
    )
    return Section("Learned by head", text, {"learned": figure}) if figure else None


def _inside_sections(runs: Sequence[Run], findings: Sequence[Findings | str]) -> list[Section]:
    """Attention maps and key norms of the runs that have a checkpoint, and why others have none."""
    found = [(run, f) for run, f in zip(runs, findings) if isinstance(f, Findings)]
    lost = [(run, f) for run, f in zip(runs, findings) if isinstance(f, str)]
    reasons = "\n".join(f"* Not shown: {run.name}, because {reason}" for run, reason in lost)
    if not found:
        return [Section("Attention maps and key norms", reasons)]
    text = (
        "Rows are queries, columns are keys; the same text of the validation split for all runs. "
        "Left of the red line are the registers (r0, r1, …) and the sink, where a model has "
        "them. Grey: the future, which is masked."
    )
    maps = {
        "attention-" + run.name.replace("/", "--"): figures.attention_figure(
            f.inside,
            f.tokens,
            f"{run.name}, step {f.step:,}",
            sink=run.config["model"]["attention"]["sink"] in VIRTUAL_SINKS,
        )
        for run, f in found
    }
    norms = figures.key_norm_figure(
        [run for run, _ in found],
        [f.text_key_norms for _, f in found],
        [f.register_key_norms for _, f in found],
    )
    norm_text = (
        "Norms of the keys as attention sees them, over tokens and heads of some rows of the "
        "validation split. RBF attention penalises long keys; a dot product can make use of them."
    )
    return [
        Section("Attention maps", "\n\n".join(part for part in (text, reasons) if part), maps),
        Section("Key norms", norm_text, {"key-norms": norms}),
    ]


def result_rows(runs: Sequence[Run], comparison: Comparison) -> list[list[str]]:
    """The table of results as text: a header, then one row a quantity, one column a run."""
    results = comparison.results
    rows = [["", *(run.name for run in runs)]]
    rows.append(["attention", *(variant(run.config) for run in runs)])
    rows.append(["step", *(_progress(run) for run in runs)])
    for key, label, write in _QUANTITIES:
        rows.append([label, *(write(result[key]) for result in results)])
        if key == "valid_loss" and comparison.metric == "loss":
            rows.append(_minus_row(runs, results))
        if key == "valid_perplexity":
            rows += _reach_rows(runs, comparison)
    return rows


def difference_rows(runs: Sequence[Run], comparison: Comparison) -> list[list[str]]:
    """The table of config keys that differ: a header, then one row a key, one column a run."""
    rows = [["config key", *(run.name for run in runs)]]
    for key, values in comparison.differences.items():
        rows.append([key, *(v if v is MISSING else json.dumps(v) for v in values)])
    return rows


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


def _minus_row(runs: Sequence[Run], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Final validation losses minus that of the first run."""
    first, *others = [result["valid_loss"] for result in results]
    known = [first is not None and loss is not None for loss in others]
    minus = [f"{loss - first:+.4f}" if k else MISSING for loss, k in zip(others, known)]
    return [f"minus that of {runs[0].name}", "", *minus]


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
    return MISSING if value is None else str(value)


def _versions(value: Mapping[str, str] | None) -> str:
    """The versions that matter most; numbers.json has all."""
    return ", ".join(f"{k} {v}" for k, v in (value or {}).items() if k in _SHOWN) or MISSING


_SHOWN = ("python", "jax", "flax")


def _date(value: str | None) -> str:
    if value is None:
        return MISSING
    date = datetime.datetime.fromisoformat(value).astimezone(datetime.UTC)
    return f"{date:%Y-%m-%d %H:%M} UTC"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    return str(datetime.timedelta(seconds=round(seconds)))


_QUANTITIES = (
    ("valid_loss", "validation loss (nats per token)", _decimals(4)),
    ("best_valid_loss", "best validation loss (nats per token)", _decimals(4)),
    ("best_step", "best at step", _decimals(0)),
    ("valid_bits_per_byte", "bits per byte", _decimals(4)),
    ("valid_perplexity", "perplexity per token", _decimals(2)),
    ("tokens_per_second", "tokens per second", _decimals(0)),
    ("seconds", "training time (h:mm:ss)", _duration),
    ("train_tokens", "training tokens", _decimals(0)),
    ("parameters", "parameters", _decimals(0)),
    ("seed", "seed", _plain),
    ("device", "device", _plain),
    ("versions", "versions", _versions),
    ("date", "date", _date),
)

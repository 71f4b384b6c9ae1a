"""What differs between runs, in numbers: configurations, losses, steps to reach a loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rbf_jax.analysis.runs import Columns, Run

MISSING = "—"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Numbers of a comparison of n runs.

    Attributes:
      metric: the validation metric that can be compared between these runs: "loss", or
        "bits_per_byte" where tokenizers differ.
      differences: dotted config key → its n values, ``MISSING`` where a run lacks the key; only
        the keys whose values differ.
      results: one dictionary of numbers for each run.
      steps_to_reach: ``[i][j]``: the step at which run i first had run j's final validation
        ``metric``; None where it has not (or there is nothing to compare).
      warnings: sentences on what limits the comparison.
    """

    metric: str
    differences: Mapping[str, Sequence[Any]]
    results: Sequence[Mapping[str, Any]]
    steps_to_reach: Sequence[Sequence[float | None]]
    warnings: Sequence[str]


def compare(runs: Sequence[Run]) -> Comparison:
    """Compares runs by their metrics, summaries and configurations."""
    same_tokens = len({run.tokenizer for run in runs}) == 1
    metric = "loss" if same_tokens else "bits_per_byte"
    curves = [_curve(run.valid, metric) for run in runs]
    finals = [values[-1] if len(values) else math.nan for _, values in curves]
    return Comparison(
        metric=metric,
        differences=config_differences([run.config for run in runs]),
        results=[results(run) for run in runs],
        steps_to_reach=[[steps_to_reach(*curve, final) for final in finals] for curve in curves],
        warnings=_warnings(runs, same_tokens),
    )


def steps_to_reach(steps: np.ndarray, losses: np.ndarray, target: float) -> float | None:
    """Step at which a loss curve first comes down to a target, interpolated linearly.

    Args:
      steps: (n,), increasing.
      losses: (n,).
      target: the loss to reach; NaN is never reached.

    Returns:
      The step; the first one if the curve starts at or below the target, in which case it may
      have been there earlier; None if the curve never comes down to it.
    """
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return float(steps[0])
    part = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + part * (steps[i] - steps[i - 1]))


def config_differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted keys whose values are not the same in all configs → their values, one a config."""
    flat = [_flatten(config) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    values = {key: [config.get(key, MISSING) for config in flat] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def results(run: Run) -> dict[str, Any]:
    """Final numbers of one run: from its summary where it ended, else from its metrics so far."""
    steps, losses = _curve(run.valid, "loss")
    best = int(np.argmin(losses)) if len(losses) else None
    final = {key: _last(run.valid, key) for key in ("loss", "bits_per_byte", "perplexity")}
    speed = run.train.get("tokens_per_second", np.array([]))
    speed = speed[np.isfinite(speed)]
    measured = {
        "finished": run.finished,
        "step": run.last_step,
        "valid_loss": final["loss"],
        "best_valid_loss": None if best is None else float(losses[best]),
        "best_step": None if best is None else int(steps[best]),
        "valid_bits_per_byte": final["bits_per_byte"],
        "valid_perplexity": final["perplexity"],
        "tokens_per_second": float(np.median(speed)) if len(speed) else None,
        "seconds": _last(run.train, "seconds"),
    }
    stated = ("tokens_per_second", "seconds", "parameters", "train_tokens")
    described = ("device", "versions", "date")
    summary = {key: run.summary[key] for key in stated + described if key in run.summary}
    return {**dict.fromkeys(stated + described), **measured, **summary, "seed": run.config["seed"]}


def _curve(columns: Columns, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric where it is finite."""
    values = columns.get(metric, np.full(len(columns["step"]), np.nan))
    finite = np.isfinite(values)
    return columns["step"][finite], values[finite]


def _last(columns: Columns, metric: str) -> float | None:
    _, values = _curve(columns, metric)
    return float(values[-1]) if len(values) else None


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


# Keys of config.data that decide which text is validated on.
_VALID_TEXT = ("source", "valid_files", "separator", "tfds_dir", "manual_dir")


def _valid_text(run: Run) -> list[Any]:
    data = run.config["data"]
    keys = _VALID_TEXT if data.get("valid_files") else (*_VALID_TEXT, "train_files")
    return [data.get(key) for key in keys]


def _validation_rows(run: Run) -> int:
    """Rows of the validation split that an evaluation looks at; 0 for all."""
    train, optimizer = run.config["train"], run.config.get("optimizer", {})
    rows = train.get("batch_size", 0) // optimizer.get("accumulate_steps", 1)
    return train.get("eval_batches", 0) * rows


def _warnings(runs: Sequence[Run], same_tokens: bool) -> list[str]:
    warnings = []
    if not same_tokens:
        warnings.append(
            "The runs cut text into tokens differently, so losses per token and perplexities "
            "cannot be compared: bits per byte are compared instead."
        )
    if any(_valid_text(run) != _valid_text(runs[0]) for run in runs):
        warnings.append(
            "The runs are validated on different texts: no metric can be compared between them."
        )
    if len({run.config["data"].get("context_length") for run in runs}) > 1:
        warnings.append("Context lengths differ: a longer context alone lowers the loss.")
    if len({run.config["data"].get("layout") for run in runs}) > 1:
        warnings.append(
            "Data layouts differ: packed rows keep every token as a target, padded rows only the "
            "first of each document, so losses are means over different targets."
        )
    rows = [_validation_rows(run) for run in runs]
    if len(set(rows)) > 1:
        each = ", ".join(f"{run.name}: {number or 'all'}" for run, number in zip(runs, rows))
        warnings.append(
            "The runs are validated on different numbers of rows, so losses are means over "
            f"different targets ({each})."
        )
    if len({run.config["train"].get("steps") for run in runs}) > 1:
        warnings.append(
            "Numbers of steps differ, and the learning rate decays over them: at one and the same "
            "step the runs are at different learning rates."
        )
    for run in runs:
        if not run.finished:
            steps = run.config["train"].get("steps")
            warnings.append(
                f"Run {run.name} has not ended: it is at step {run.last_step} of {steps}."
            )
        if not len(_curve(run.valid, "loss")[0]):
            warnings.append(f"Run {run.name} has no validation loss yet.")
    return warnings

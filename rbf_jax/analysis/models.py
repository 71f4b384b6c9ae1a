"""Opens checkpoints of runs and looks inside the models: several on one text, or one closely."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rbf_jax.analysis.diagnostics import Inside, diagnose, look_inside
from rbf_jax.analysis.runs import Run
from rbf_jax.nn import TransformerConfig
from rbf_jax.training import load_run
from rbf_jax.training.metrics import read_valid_losses
from rbf_jax.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a trained model does with text.

    Attributes:
      step: the checkpoint's step.
      inside: attention and keys of one text, B = 1.
      tokens: T strings, the text's tokens.
      text_key_norms: (L, samples), ‖k‖ of text tokens and heads over rows of the validation split.
      register_key_norms: (L, R · K), ‖k‖ of registers; the same in every row.
    """

    step: int
    inside: Inside
    tokens: Sequence[str]
    text_key_norms: np.ndarray
    register_key_norms: np.ndarray


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a trained model does with rows of its validation split.

    Attributes:
      path: the run's folder.
      config: of the run, nested dictionaries.
      model: the model's configuration.
      step: the checkpoint's step.
      valid_loss: there; None if it was not evaluated there.
      rows: rows that hold text.
      text_tokens: tokens in them, padding not counted.
      numbers: what `rbf_jax.analysis.diagnostics.diagnose` says of them.
      uniform: "entropy" and "distance" of attention that weighs all that it may see alike.
      document: attention on the first tokens of one document.
    """

    path: Path
    config: Mapping[str, Any]
    model: TransformerConfig
    step: int
    valid_loss: float | None
    rows: int
    text_tokens: int
    numbers: Mapping[str, np.ndarray]
    uniform: Mapping[str, float]
    document: Findings


def inspect_run(
    run_dir: str | Path,
    *,
    checkpoint: int | str = "last",
    num_rows: int = 8,
    num_tokens: int = 32,
) -> Inspection:
    """Looks closely inside one model; memory grows with rows × heads × layers × T².

    Args:
      run_dir: the run's folder.
      checkpoint: "last", "best" or a step.
      num_rows: rows of the validation split to look at; all, if it has fewer.
      num_tokens: tokens of one document whose attention weights are kept.

    Raises:
      ValueError: as `load_run`, or the data is not where the run found it.
    """
    run = load_run(run_dir, checkpoint)
    batch = _validation_rows(run.data, num_rows)
    segment_ids = batch["segment_ids"]
    numbers = jax.jit(functools.partial(diagnose, run.model))(
        run.variables["params"],
        {name: batch[name] for name in ("inputs", "positions", "segment_ids")},
    )
    return Inspection(
        path=run.path,
        config=run.config.to_dict(),
        model=run.model.config,
        step=run.step,
        valid_loss=read_valid_losses(RunFolder(run.path).metrics).get(run.step),
        rows=int((segment_ids > 0).any(1).sum()),
        text_tokens=int((segment_ids > 0).sum()),
        numbers={name: np.asarray(values) for name, values in numbers.items()},
        uniform=_uniform(batch["positions"][segment_ids > 0], run.model.config),
        document=_look(run, _document(run.data), num_tokens, num_rows=1),
    )


def _uniform(positions: np.ndarray, model: TransformerConfig) -> dict[str, float]:
    """Entropy and distance, as `diagnose` defines them, of weights that are all the same."""
    window = model.attention.window
    behind = positions if window is None else np.minimum(positions, window)
    seen = behind + 1 + model.num_registers + model.attention.has_virtual_sink
    text_mass = (behind + 1) / seen
    return {
        "entropy": float(np.log(seen).mean()),
        "distance": float((text_mass * behind / 2).sum() / text_mass.sum()),
    }


def examine(
    runs: Sequence[Run], *, num_tokens: int = 32, num_rows: int = 4
) -> list[Findings | str]:
    """Looks inside the models of n runs, on one text: from the first run's validation split.

    Args:
      runs: the runs.
      num_tokens: tokens of the text to read; a model with a shorter context reads less.
      num_rows: rows of each run's validation split to gather key norms from.

    Returns:
      n findings; in place of one the reason why there is none, where a run has no checkpoint that
      can be read, or its data is not on this machine.
    """
    text = ""
    found: list[Findings | str] = []
    for run in runs:
        try:
            loaded = load_run(run.path)
            text = text or _document(loaded.data)
            found.append(_look(loaded, text, num_tokens, num_rows))
        except (OSError, ValueError) as error:
            found.append(str(error))
    return found


def _look(loaded: Any, text: str, num_tokens: int, num_rows: int) -> Findings:
    rows = _validation_rows(loaded.data, num_rows)
    tokens = loaded.data.tokenizer.encode(text)[: min(num_tokens, rows["inputs"].shape[1])]
    # The text joins the rows as one more: two shapes would compile twice.
    inputs, positions, segment_ids = (
        np.concatenate([rows[key], np.zeros_like(rows[key][:1])])
        for key in ("inputs", "positions", "segment_ids")
    )
    inputs[-1, : len(tokens)] = tokens
    positions[-1] = np.arange(positions.shape[1])
    segment_ids[-1, : len(tokens)] = 1
    inside = look_inside(loaded.model, loaded.variables, inputs, positions, segment_ids)
    layers = len(inside.key_norms)
    return Findings(
        step=loaded.step,
        inside=inside.start(num_rows, len(tokens)),
        tokens=[visible(loaded.data.tokenizer.decode([token])) for token in tokens],
        text_key_norms=inside.text_key_norms[:, :-1][:, segment_ids[:-1] > 0].reshape(layers, -1),
        register_key_norms=inside.register_key_norms[:, 0].reshape(layers, -1),
    )


def visible(token: str) -> str:
    """A token with its white space shown."""
    return token.translate({ord(" "): "␣", ord("\n"): "↵", ord("\r"): "↵", ord("\t"): "⇥"})


def _validation_rows(data: Any, num_rows: int) -> dict[str, np.ndarray]:
    return next(iter(data.batches("valid", num_rows, shuffle=False, repeat=False)))


def _document(data: Any) -> str:
    """The longest document in the first row of the validation split."""
    row = {key: values[0] for key, values in _validation_rows(data, 1).items()}
    longest = np.argmax(np.bincount(row["segment_ids"][row["segment_ids"] > 0]))
    tokens = row["inputs"][row["segment_ids"] == longest]
    return data.tokenizer.decode([int(token) for token in tokens])

"""What is kept of one configuration trained with several seeds: all that figures are drawn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

Columns = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Record:
    """One configuration, n seeds. Where a seed has no finite number, there is NaN.

    Attributes:
      name: of the configuration, unique among records; a file name without suffix.
      config: the whole configuration, without its seed.
      seeds: n whole numbers.
      train: "step" (s,), every step; "loss", "grad_norm" (s, n); "learning_rate" (s,).
      inspected: "step" (m,), every train.log_every steps; "logit_max", "key_norm_mean",
        "key_norm_max", "register_norm" (m, n); "gamma/LAYER", "key_norm_weight/LAYER" (m, n, N).
      valid: "step" (m,), every train.eval_every steps; "loss", "bits_per_byte" (m, n), and
        "seconds" (m,), spent in training all seeds together.
      lengths: context length → validation loss (n,) after the last step.
      inside: what `rbf_jax.analysis.diagnostics.diagnose` says after the last step, each (n, …).
      tokens: the text whose attention weights are in `inside`, as strings.
      summary: as in a run's summary.json: parameters, tokens, device, versions, date, command.
    """

    name: str
    config: Mapping[str, Any]
    seeds: tuple[int, ...]
    train: Columns
    inspected: Columns
    valid: Columns
    lengths: Mapping[int, np.ndarray]
    inside: Columns
    tokens: tuple[str, ...]
    summary: Mapping[str, Any]

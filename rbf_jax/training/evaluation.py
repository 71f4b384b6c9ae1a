"""Loss over a split: in nats a token, in bits a byte, as a perplexity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rbf_jax.training.sharding import Batch, place_batch

# exp of more overflows a float64.
_LARGEST_EXPONENT = 700.0


def evaluate(
    eval_step: Callable[[Any, Batch], tuple[jax.Array, jax.Array]],
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
    *,
    bytes_per_token: float,
    limit: int = 0,
) -> dict[str, float]:
    """Returns "loss", mean over all targets in nats, "bits_per_byte" and "perplexity".

    Args:
      eval_step: of `make_eval_step`, jitted.
      params: of the model.
      batches: of the split, once.
      mesh: of `make_mesh`.
      bytes_per_token: of the split.
      limit: batches to look at; 0 for all.

    Raises:
      ValueError: the batches hold no target.
    """
    results = [
        eval_step(params, place_batch(batch, mesh))
        for batch in itertools.islice(batches, limit or None)
    ]
    loss = sum(float(loss) for loss, _ in results)
    targets = sum(int(targets) for _, targets in results)
    if not targets:
        raise ValueError("the split holds no targets to evaluate.")
    loss /= targets
    return {
        "loss": loss,
        "bits_per_byte": bits_per_byte(loss, bytes_per_token),
        "perplexity": math.exp(min(loss, _LARGEST_EXPONENT)),
    }


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Returns a loss in nats a token as bits a byte of UTF-8: comparable between tokenizers."""
    return loss / math.log(2) / bytes_per_token

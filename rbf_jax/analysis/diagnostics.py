"""What a model does inside on given tokens: pure functions from variables and tokens to arrays."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict


@dataclasses.dataclass(frozen=True)
class Inside:
    """What the attention layers of a model did with a batch of tokens.

    Attributes:
      attention_weights: (L, B, N, T, R + T) float32, keys of registers first. A row sums to 1, to
        less with an origin sink, to 0 where it attends to nothing.
      key_norms: (L, B, R + T, K) float32, ‖k‖ of the keys as attention sees them.
    """

    attention_weights: np.ndarray
    key_norms: np.ndarray

    @property
    def num_registers(self) -> int:
        """R."""
        return self.attention_weights.shape[-1] - self.attention_weights.shape[-2]

    def start(self, row: int, length: int) -> Inside:
        """The first tokens of one row, B = 1; causal models do the same with them alone."""
        columns = self.num_registers + length
        return Inside(
            self.attention_weights[:, row : row + 1, :, :length, :columns],
            self.key_norms[:, row : row + 1, :columns],
        )

    @property
    def sink_weights(self) -> np.ndarray:
        """(L, B, N, T): the weight that an origin sink takes, what is missing to a sum of 1."""
        return np.clip(1.0 - self.attention_weights.sum(-1), 0.0, 1.0)

    @property
    def register_key_norms(self) -> np.ndarray:
        """(L, B, R, K) float32."""
        return self.key_norms[:, :, : self.num_registers]

    @property
    def text_key_norms(self) -> np.ndarray:
        """(L, B, T, K) float32."""
        return self.key_norms[:, :, self.num_registers :]


def look_inside(
    model: nn.Module,
    variables: Mapping[str, Any],
    tokens: np.ndarray,
    positions: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
) -> Inside:
    """Applies a causal language model and gathers what its attention layers sow.

    Args:
      model: a ``CausalLM``.
      variables: its variables.
      tokens: int32 (B, T).
      positions: int32 (B, T), as the model takes them; None for 0 … T − 1.
      segment_ids: int32 (B, T), as the model takes them; None for one text a row.

    Raises:
      ValueError: the model has no attention layers that sow what they do.
    """
    sown = flatten_dict(_intermediates(model, variables, tokens, positions, segment_ids))
    if not any(path[-1] == "attention_weights" for path in sown):
        raise ValueError(f"model={type(model).__name__} must sow attention_weights, and sows none")
    return Inside(_by_layer(sown, "attention_weights"), _by_layer(sown, "key_norms"))


@functools.partial(jax.jit, static_argnums=0)
def _intermediates(model, variables, tokens, positions, segment_ids):
    _, state = model.apply(
        variables, tokens, positions=positions, segment_ids=segment_ids, mutable=["intermediates"]
    )
    return state["intermediates"]


def _by_layer(sown: Mapping[tuple[str, ...], tuple[jax.Array, ...]], name: str) -> np.ndarray:
    """Stacks what each layer sowed under a name, in the order of the layers' numbers."""
    paths = [path for path in sown if path[-1] == name]
    return np.stack(
        [
            np.asarray(sown[path][0])
            for path in sorted(paths, key=lambda path: natural("/".join(path)))
        ]
    )


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block_2 before block_10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

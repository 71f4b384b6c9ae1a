"""From logits to the next token."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature first, then top-k, then top-p.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token always.
      top_k: choose among the k likeliest only; None for all.
      top_p: choose among the likeliest only, as few as have this probability together, and at least
        one (Holtzman et al., arXiv:1904.09751); None for all.

    Raises:
      ValueError: a value is wrong, or has no effect beside the others.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature!r} must be a number, at least 0.")
        if self.top_k is not None and not (type(self.top_k) is int and self.top_k >= 1):
            raise ValueError(f"top_k={self.top_k!r} must be None or an int, at least 1.")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(
                f"top_p={self.top_p!r} must be None or a number greater than 0 and at most 1."
            )
        for name in ("top_k", "top_p"):
            value = getattr(self, name)
            if self.temperature == 0 and value is not None:
                raise ValueError(
                    f"{name}={value} has no effect with temperature=0, which takes the likeliest "
                    "token; leave it out."
                )


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws a token for each row.

    Args:
      logits: (B, V) float32.
      keys: B random keys.
      sampling: how.

    Returns:
      int32 (B,).

    Raises:
      ValueError: top_k exceeds V.
    """
    V = logits.shape[-1]
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Differences to the largest overflow to −∞ only; what float32 rounds to 0 would give 0/0.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / max(sampling.temperature, float(jnp.finfo(logits.dtype).tiny))
    draw = jax.vmap(jax.random.categorical)
    if sampling.top_k is None and sampling.top_p is None:
        return draw(keys, logits).astype(jnp.int32)
    if sampling.top_k is not None and sampling.top_k > V:
        raise ValueError(f"top_k={sampling.top_k} must be at most the vocabulary's size {V}.")
    # In order, so that ties are cut too: exactly k are left, and no more than p needs.
    logits, tokens = jax.lax.top_k(logits, sampling.top_k or V)
    if sampling.top_p is not None:
        p = jax.nn.softmax(logits, axis=-1)
        likelier = jnp.cumsum(p, axis=-1) - p
        # The first is at 0 up to rounding, and stays whatever that may be.
        keep = (likelier < sampling.top_p).at[:, 0].set(True)
        logits = jnp.where(keep, logits, -jnp.inf)
    drawn = draw(keys, logits)[:, None]
    return jnp.take_along_axis(tokens, drawn, axis=-1)[:, 0].astype(jnp.int32)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

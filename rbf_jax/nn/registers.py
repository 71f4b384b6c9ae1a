"""Register tokens: learned vectors in front of the sequence that every token can attend to."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rbf_jax.ops.api import rbf_attention


class Registers(nn.Module):
    """Puts R learned vectors in front of the sequence.

    Attributes:
      num_registers: R > 0.
      d_model: D.
      initial: "zero" or "normal" (standard deviation 0.02).
    """

    num_registers: int
    d_model: int
    initial: str

    def setup(self):
        """Makes the parameter, for the model to look at too."""
        init = nn.initializers.zeros if self.initial == "zero" else nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (self.num_registers, self.d_model))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D) → (B, R+T, D), of x's dtype."""
        shape = (x.shape[0], *self.embedding.shape)
        registers = jnp.broadcast_to(self.embedding.astype(x.dtype), shape)
        return jnp.concatenate([registers, x], axis=1)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_registers: int,
    *,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    alibi_slopes: Any = None,
    **options: Any,
) -> jax.Array:
    """Causal attention over registers and text.

    Text attends to text by the rules of segments, window and ALiBi, and to all registers whatever
    these say. Registers attend to registers only, causally.

    Args:
      query: (B, R+T, N, H), registers first.
      key: (B, R+T, K, H).
      value: (B, R+T, K, H).
      num_registers: R.
      segment_ids: integer (B, T), of the text.
      window: text attends to this many tokens back, and to itself.
      alibi_slopes: (N,).
      **options: other options of `rbf_attention`.

    Returns:
      (B, R+T, N, H) of query's dtype.
    """
    if segment_ids is not None:  # registers see and are seen without regard to theirs
        in_front = ((0, 0), (num_registers, 0))
        segment_ids = jnp.pad(segment_ids, in_front, mode="edge")
    return rbf_attention(
        query,
        key,
        value,
        is_causal=True,
        local_window_size=None if window is None else (window, 0),
        num_global_keys=num_registers,
        query_segment_ids=segment_ids,
        key_value_segment_ids=segment_ids,
        alibi_slopes=alibi_slopes,
        **options,
    )

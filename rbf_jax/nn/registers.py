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
    origin_sink: bool = False,
    normalize: bool = True,
    **options: Any,
) -> jax.Array:
    """Causal attention over registers and text.

    Text attends to text by the rules of segments, window and ALiBi, and to all registers whatever
    these say. Registers attend to registers only, causally.

    Without such rules causality alone says all this, in one call of the operation. With them
    there are two calls, to text and to registers, merged by their logsumexps; the origin sink
    takes part in the second, where every row has its place. Sums that are not normalised are added.

    Args:
      query: (B, R+T, N, H), registers first.
      key: (B, R+T, K, H).
      value: (B, R+T, K, H).
      num_registers: R.
      segment_ids: integer (B, T), of the text.
      window: text attends to this many tokens back, and to itself.
      alibi_slopes: (N,).
      origin_sink: a virtual key at the origin with value 0.
      normalize: of `rbf_attention`.
      **options: gamma, key_norm_weight and implementation of `rbf_attention`.

    Returns:
      (B, R+T, N, H) of query's dtype.
    """
    R = num_registers
    options = {"normalize": normalize, **options}
    rules: dict[str, Any] = {
        "query_segment_ids": segment_ids,
        "key_value_segment_ids": segment_ids,
        "local_window_size": None if window is None else (window, 0),
        "alibi_slopes": alibi_slopes,
    }
    if R == 0 or all(rule is None for rule in rules.values()):
        return rbf_attention(
            query, key, value, is_causal=True, origin_sink=origin_sink, **rules, **options
        )
    # Query i ≥ R - 1 sees all R registers: causality is the registers' own order, no more.
    to_registers, registers_logsumexp = rbf_attention(
        query,
        key[:, :R],
        value[:, :R],
        is_causal=True,
        origin_sink=origin_sink,
        return_residual=True,
        **options,
    )
    to_text, text_logsumexp = rbf_attention(
        query[:, R:],
        key[:, R:],
        value[:, R:],
        is_causal=True,
        return_residual=True,
        **rules,
        **options,
    )
    if not normalize:
        text = to_registers[:, R:] + to_text
        return jnp.concatenate([to_registers[:, :R], text], axis=1)
    text = merge(to_text, text_logsumexp, to_registers[:, R:], registers_logsumexp[:, R:])
    return jnp.concatenate([to_registers[:, :R], text], axis=1)


def merge(
    out_a: jax.Array, logsumexp_a: jax.Array, out_b: jax.Array, logsumexp_b: jax.Array
) -> jax.Array:
    """Attention over two sets of keys from attention over each.

    Args:
      out_a: (..., H), attention over the first set.
      logsumexp_a: (...), float32 logsumexp of its logits; −inf where it has no key.
      out_b: (..., H), over the second set.
      logsumexp_b: (...).

    Returns:
      (e^a out_a + e^b out_b) / (e^a + e^b), of out_a's dtype, computed in the logsumexps'; 0 where
      both are −inf.
    """
    maximum = jax.lax.stop_gradient(jnp.maximum(logsumexp_a, logsumexp_b))
    maximum = jnp.where(jnp.isneginf(maximum), 0, maximum)
    weight_a, weight_b = jnp.exp(logsumexp_a - maximum), jnp.exp(logsumexp_b - maximum)
    total = weight_a + weight_b
    total = jnp.where(total == 0, 1, total)
    a, b = out_a.astype(total.dtype), out_b.astype(total.dtype)
    out = (weight_a / total)[..., None] * a + (weight_b / total)[..., None] * b
    return out.astype(out_a.dtype)

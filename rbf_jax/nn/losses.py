"""Cross-entropy that never holds the logits of all tokens at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Float32 logits (..., V) of hidden states (..., D); the head (V, D) is cast to their dtype."""
    return jnp.einsum(
        "...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def token_losses(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, chunk: int
) -> jax.Array:
    """Negative log-likelihood of each target, with at most `chunk` tokens' logits at a time.

    The logits are computed again in the backward pass, chunk by chunk.

    Args:
      hidden: (B, T, D), in the compute dtype.
      head: (V, D) float32.
      targets: integer (B, T).
      chunk: tokens.

    Returns:
      (B, T) float32, nats.
    """
    B, T, D = hidden.shape
    num_chunks = -(-B * T // chunk)
    size = -(-B * T // num_chunks)

    def split(x: jax.Array) -> jax.Array:
        # Chunk i takes every num_chunks-th token from i on, not a run of tokens: where rows are
        # spread over devices, each then has its share in every chunk.
        padded = jnp.pad(x, [(0, num_chunks * size - B * T)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(size, num_chunks, *x.shape[1:]).swapaxes(0, 1)

    @jax.checkpoint
    def losses(hidden_and_targets):
        hidden, targets = hidden_and_targets
        z = logits(hidden, head)
        picked = jnp.take_along_axis(z, targets[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(z, axis=-1) - picked

    nll = jax.lax.map(losses, (split(hidden.reshape(-1, D)), split(targets.reshape(-1))))
    return nll.swapaxes(0, 1).reshape(-1)[: B * T].reshape(B, T)

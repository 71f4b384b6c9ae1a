"""What attention and the transformer share: the norm and the initialisation of weights."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

NORM_EPSILON = 1e-5

weight_init = nn.initializers.normal(0.02)


def output_init(num_layers: int) -> jax.nn.initializers.Initializer:
    """For projections into the residual stream: 2L of them add up, so 1/√(2L) smaller (GPT-2)."""
    return nn.initializers.normal(0.02 / math.sqrt(2 * num_layers))


class Norm(nn.Module):
    """RMSNorm over the last axis with a learned scale, computed in float32.

    Attributes:
      dtype: of the result.
    """

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) → (..., D)."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + NORM_EPSILON) * scale).astype(self.dtype)

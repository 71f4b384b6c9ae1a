"""What attention and the transformer share: the norm and the initialisation of weights."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

# At x = 0 the derivative of x/√(mean(x²) + ε) is 1/√ε, and a register that starts at zero is 0
# in front of every norm of every layer: its gradient is multiplied by some 1/√ε per layer. With
# 1e-5 it is 3e6 at the start for L = 4, D = 256, and 2e18 for L = 12, beside 22 to 38 for all
# other parameters together; clipping the global norm would then stop these. With 1e-2 it is 0.28
# and 0.31, that of registers which start at random (0.27); for D = 768 5 and 12, beside 48 and 90.
REGISTER_EPSILON = 1e-2
TOKEN_EPSILON = 1e-5

weight_init = nn.initializers.normal(0.02)


def output_init(num_layers: int) -> jax.nn.initializers.Initializer:
    """For projections into the residual stream: 2L of them add up, so 1/√(2L) smaller (GPT-2)."""
    return nn.initializers.normal(0.02 / math.sqrt(2 * num_layers))


class Norm(nn.Module):
    """RMSNorm over the last axis with a learned scale, or LayerNorm; computed in float32.

    Attributes:
      dtype: of the result.
      num_registers: so many places at the head of axis 1 are registers, which have an ε of their
        own.
      kind: "rms"; "layer" subtracts the mean too, and adds a learned bias.
    """

    dtype: str
    num_registers: int = 0
    kind: str = "rms"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, ..., D) → (B, T, ..., D)."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        is_register = jnp.arange(x.shape[1]) < self.num_registers
        epsilon = jnp.where(is_register, REGISTER_EPSILON, TOKEN_EPSILON)
        epsilon = epsilon.reshape(-1, *(1,) * (x.ndim - 2))
        x = x.astype(jnp.float32)
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + epsilon) * scale
        if self.kind == "layer":
            x = x + self.param("bias", nn.initializers.zeros, scale.shape)
        return x.astype(self.dtype)

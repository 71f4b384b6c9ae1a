"""Where a token stands: SuSiE, RoPE and ALiBi. Learned positions are a table in transformer.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_BASE = 10000.0
_SPLIT = 1024


class Sinusoids(NamedTuple):
    """sin(t ω_i) and cos(t ω_i) at every text position, float32 (B or 1, T, H/2)."""

    sin: jax.Array
    cos: jax.Array


def sinusoids(positions: jax.Array, head_dim: int) -> Sinusoids:
    """sin(t ω_i) and cos(t ω_i), with ω_i = 10000^(−2i/H), i < H/2.

    t ω itself, rounded to float32, is wrong by 0.03 at t = 10⁶. So t is split into 1024 a + b,
    and 1024 ω and ω are reduced modulo 2π in float64: the error stays below 3e-4 up to there.

    Args:
      positions: integer (B or 1, T), not negative.
      head_dim: H, even.

    Returns:
      Two float32 arrays (B or 1, T, H/2).
    """
    frequencies = _BASE ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)

    def reduced(multiple: int) -> jax.Array:
        turns = multiple * frequencies / (2 * math.pi)
        return jnp.asarray((turns - np.round(turns)) * 2 * math.pi, jnp.float32)

    high, low = jnp.divmod(positions, _SPLIT)
    angles = high[..., None].astype(jnp.float32) * reduced(_SPLIT)
    angles = angles + low[..., None].astype(jnp.float32) * reduced(1)
    return Sinusoids(jnp.sin(angles), jnp.cos(angles))


def rotate(x: jax.Array, angles: Sinusoids, num_registers: int) -> jax.Array:
    """RoPE (arXiv:2104.09864), dimension i paired with i + H/2; registers are not rotated.

    Args:
      x: queries or keys (B, R+T, heads, H), registers first.
      angles: of the T text positions.
      num_registers: R.

    Returns:
      (B, R+T, heads, H) of x's dtype; computed in float32.
    """
    registers, tokens = x[:, :num_registers], x[:, num_registers:]
    first, second = jnp.split(tokens.astype(jnp.float32), 2, axis=-1)
    sin, cos = angles.sin[:, :, None, :], angles.cos[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([registers, rotated.astype(x.dtype)], axis=1)


class SuSiE(nn.Module):
    """Subspace sinusoidal embeddings: p_t = w ∘ [sin(t ω), cos(t ω)], for queries and keys alike.

    w is learned per head and frequency, shared by the pair of sine and cosine: then ‖p_i − p_j‖²
    = 2 Σ w² (1 − cos((i − j) ω)) depends on i − j only. Heads are K/V heads, and the query heads
    of a group share theirs. Registers get a learned offset in place of p_t.

    Attributes:
      num_kv_heads: K.
      num_registers: R.
    """

    num_kv_heads: int
    num_registers: int

    @nn.compact
    def __call__(self, angles: Sinusoids) -> jax.Array:
        """Returns p, registers first, float32 (B or 1, R+T, K, H)."""
        half = angles.sin.shape[-1]
        weight = self.param("weight", nn.initializers.constant(0.5), (self.num_kv_heads, half))
        sin, cos = angles.sin[:, :, None, :], angles.cos[:, :, None, :]
        offsets = jnp.concatenate([weight * sin, weight * cos], axis=-1)
        if not self.num_registers:
            return offsets
        registers = self.param(
            "registers",
            nn.initializers.normal(0.02),
            (self.num_registers, self.num_kv_heads, 2 * half),
        )
        registers = jnp.broadcast_to(registers, (offsets.shape[0], *registers.shape))
        return jnp.concatenate([registers, offsets], axis=1)


def add_susie(x: jax.Array, offsets: jax.Array) -> jax.Array:
    """Adds SuSiE's offsets in float32.

    Args:
      x: queries or keys (B, R+T, heads, H), K divides heads.
      offsets: (B or 1, R+T, K, H) float32.

    Returns:
      As x.
    """
    offsets = jnp.repeat(offsets, x.shape[2] // offsets.shape[2], axis=2)
    return (x.astype(jnp.float32) + offsets).astype(x.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """ALiBi's slopes, one per head, float32 (N,) (Press et al., arXiv:2108.12409).

    2^(−8/n), 2^(−16/n), … for n a power of two. Else those of the next lower power of two, then
    every second one of the next higher, as the authors' code has it.
    """

    def geometric(n: int) -> np.ndarray:
        return 2.0 ** (-8 * np.arange(1, n + 1) / n)

    lower = 2 ** int(math.log2(num_heads))
    slopes = np.concatenate([geometric(lower), geometric(2 * lower)[::2]])
    return slopes[:num_heads].astype(np.float32)

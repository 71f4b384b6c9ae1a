"""Where the forward kernel's bound of the logits is not safe, and how often that is in a model."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# Logits are measured from the bound R less this many bits, so that weights go up to 2^60: the rows
# whose nearest key is up to 83 nats below the bound are within float32's range, and so are sums of
# 2^22 weights times values of up to 2^45.
HEADROOM = 60.0
# exp2 gives 0 below 2^-126. Where a row's sum is above this, what 2^22 keys may lose to that is far
# less than float32's rounding, and the sums of values as small as 2^-58 keep bfloat16's precision.
SMALLEST_SUM = 2.0**-60
# Subtracting the bound R in float32 costs up to R·2^-24.
LARGEST_REFERENCE = 2.0**13


def gated_tiles(
    query: jax.Array,
    logsumexp: jax.Array,
    *,
    gamma: ArrayLike,
    key_norm_weight: ArrayLike,
    block_q: int = 128,
) -> jax.Array:
    """Which tiles of queries the forward kernel does a second time, with online softmax (bfloat16).

    Computed from the outside, on any device, for measuring how often it happens. The bound of a row
    is γ‖q‖²/λ; a tile is measured from the largest bound of its rows (see forward.py). Sums that
    overflow are not seen from here: they need values beyond 2^45.

    Args:
      query: (B, T, N, H).
      logsumexp: (B, T, N), as `rbf_attention(..., return_residual=True)` returns it.
      gamma: γ, scalar or (N,).
      key_norm_weight: λ, scalar or (N,).
      block_q: queries of a tile.

    Returns:
      bool, (B, N, tiles). A row that may attend to nothing counts as one whose sum is tiny, as in
      the kernel where a mask or segments make it so.
    """
    B, T, N, _ = query.shape
    gamma = jnp.broadcast_to(jnp.asarray(gamma, jnp.float32), (N,))
    weight = jnp.broadcast_to(jnp.asarray(key_norm_weight, jnp.float32), (N,))
    query = query.astype(jnp.float32)
    bound = gamma * jnp.sum(query * query, axis=-1) / weight / math.log(2)

    def tiles(x, fill):
        x = jnp.pad(x, [(0, 0), (0, -T % block_q), (0, 0)], constant_values=fill)
        return x.reshape(B, -1, block_q, N)

    reference = tiles(bound, 0.0).max(axis=2)
    smallest = tiles(logsumexp / math.log(2), jnp.inf).min(axis=2) - (reference - HEADROOM)
    safe = (weight > 0) & (reference <= LARGEST_REFERENCE)
    return (~safe | (smallest < math.log2(SMALLEST_SUM))).swapaxes(1, 2)

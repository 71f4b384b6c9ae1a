"""The backward kernel of keys and values; the arithmetic is that of `backward.py`."""

from __future__ import annotations

import jax

from rbf_jax.ops.gpu.mosaic.common import Rules, kernel
from rbf_jax.ops.gpu.mosaic.config import Tiles
from rbf_jax.ops.gpu.mosaic.key_block import KeyBlock, KeyMemory, memory_of, results_and_grid


def keys(
    inputs: list[jax.Array], rows: list[jax.Array], *, rules: Rules, tiles: Tiles
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
      inputs: the arrays of `forward.forward`.
      rows: as `backward.queries` takes them; the logsumexp is +∞ beyond the last query.
      rules: as in the forward pass.
      tiles: sizes; `block_k` is the number of keys of a consumer, `block_q` of queries of a step.

    Returns:
      dk and dv, (B, S, K, H), and Σ_i dS_ij, float32 (B, N, S') with S' a multiple of the keys of a
      block of threads.
    """

    def rbf_attention_keys(*refs):
        block = KeyBlock(refs[:9], refs[9:12], KeyMemory(*refs[12:]), rules, tiles)
        block.run()

    results, grid = results_and_grid(inputs, tiles)
    call = kernel(rbf_attention_keys, results, memory_of(inputs[1], tiles), grid, tiles.consumers)
    return tuple(call(*inputs, *rows))

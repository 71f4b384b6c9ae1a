"""Which tiles the Mosaic GPU kernels take, and that they fit."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest

from rbf_jax.ops.gpu.mosaic import backward_fused, backward_keys, backward_queries, common, forward
from rbf_jax.ops.gpu.mosaic.config import (
    HEAD_DIMS,
    SHARED_MEMORY,
    BackwardTiles,
    ForwardTiles,
    choose,
    choose_backward,
    tiles_in_use,
    use_tiles,
)


@pytest.mark.parametrize(
    ("make", "change", "requirement"),
    [
        (ForwardTiles, {"block_k": 320}, "block_k=320 must be 64, 128, 192 or 256"),
        (ForwardTiles, {"stages": 1}, "stages=1 must be at least 2"),
        (ForwardTiles, {"tiles_per_cta": 0}, "tiles_per_cta=0 must be at least 1"),
        (BackwardTiles, {"stages": 1}, "stages=1 must be at least 2"),
        (BackwardTiles, {"consumers": 3}, "consumers=3 must be 1 or 2"),
        (
            BackwardTiles,
            {"consumers": 1, "fused": True},
            "fused=True requires consumers=2, not 1",
        ),
    ],
)
def test_tiles_say_what_is_wrong_with_them(make, change, requirement):
    with pytest.raises(ValueError, match=re.escape(requirement)):
        make(**change)


def test_use_tiles_nests():
    """What an inner context does not set is left as the outer one has it."""
    forward_tiles, backward_tiles = ForwardTiles(block_k=64), BackwardTiles(fused=True)
    with use_tiles(forward_tiles):
        with use_tiles(backward=backward_tiles):
            assert tiles_in_use() == (forward_tiles, backward_tiles)
        assert tiles_in_use() == (forward_tiles, None)
    assert tiles_in_use() == (None, None)


def _fits(memory_of, head_dim, tiles, *, reductions=True):
    key = jax.ShapeDtypeStruct((1, 1, 1, head_dim), jnp.bfloat16)
    return common.shared_memory(memory_of(key, tiles), reductions=reductions) <= SHARED_MEMORY


@pytest.mark.parametrize("H", HEAD_DIMS)
def test_chosen_tiles_fit(H):
    for plain, length in itertools.product((False, True), (128, 1024, 4096, 16384)):
        assert _fits(forward.memory_of, H, choose(H, plain, length, 2**20 // length))
    assert not _fits(forward.memory_of, H, ForwardTiles(block_k=256, stages=4))
    two_kernels = choose_backward(H, deterministic=True)
    assert not two_kernels.fused
    assert _fits(backward_queries.memory_of, H, two_kernels)
    assert _fits(backward_keys.memory_of, H, two_kernels)
    fused = choose_backward(H) if H < 256 else BackwardTiles(fused=True)
    assert _fits(backward_fused.memory_of, H, fused, reductions=False) == (H < 256)
    assert choose_backward(H).fused == (H < 256)


@pytest.mark.parametrize(
    ("num_heads", "length", "tiles_per_cta"),
    [
        (128, 4096, 4),  # 4,096 tiles are 31.03 for each of 132: 32 turns, or 8 of four
        (132, 512, 4),
        (33, 512, 1),  # a tile for each multiprocessor
        (66, 512, 2),
        (128, 16384, 1),  # long ones gain nothing
    ],
)
def test_ctas_have_several_tiles_where_no_multiprocessor_idles(num_heads, length, tiles_per_cta):
    assert choose(64, True, length, num_heads).tiles_per_cta == tiles_per_cta


def test_under_a_causal_rule_ctas_have_more_tiles_or_one():
    assert choose(64, False, 4096, 128).tiles_per_cta == 8
    assert choose(64, False, 512, 1024).tiles_per_cta == 4  # there are no more
    assert choose(128, False, 4096, 64).tiles_per_cta == 1

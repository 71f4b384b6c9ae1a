"""Which tiles the Mosaic GPU kernels take, and that they fit."""

import itertools
import re

import pytest

from rbf_jax.ops.gpu.mosaic.config import HEAD_DIMS, Tiles, choose, choose_backward, override_tiles

ONE_KERNEL = Tiles(block_k=64, pingpong=False, one_kernel=True)


@pytest.mark.parametrize(
    ("change", "requirement"),
    [
        ({"block_q": 96}, "block_q=96 must be a multiple of 64"),
        ({"block_k": 320}, "block_k=320 must be a multiple of 64 up to 256"),
        ({"stages": 1}, "stages=1 must be at least 2"),
        ({"visits": 0}, "visits=0 must be at least 1"),
        ({"consumers": 4}, "consumers=4 must be one of [1, 2, 3]"),
        ({"consumers": 3}, "pingpong=True requires consumers=2, not 3"),
        (
            {"consumers": 1, "pingpong": False, "one_kernel": True},
            "one_kernel=True requires consumers of at least 2, not 1",
        ),
    ],
)
def test_tiles_say_what_is_wrong_with_them(change, requirement):
    with pytest.raises(ValueError, match=re.escape(requirement)):
        Tiles(**change)


def test_only_the_forward_pass_visits_many_tiles():
    with pytest.raises(ValueError, match="backward has visits=2, which must be 1"):
        override_tiles(None, Tiles(visits=2))


@pytest.mark.parametrize("H", HEAD_DIMS)
def test_chosen_tiles_fit(H):
    for plain, length in itertools.product((False, True), (128, 1024, 4096, 16384)):
        assert choose(H, plain, length, 2**20 // length).fits("forward", H)
    for two_kernels in (False, True):
        tiles = choose_backward(H, two_kernels=two_kernels)
        assert all(tiles.fits(kernel, H) for kernel in tiles.backward_kernels)
    assert not choose_backward(H, two_kernels=True).one_kernel
    assert not Tiles(block_k=256, stages=4).fits("forward", H)
    assert ONE_KERNEL.fits("gradients", H) == (H < 256)


@pytest.mark.parametrize(
    ("num_heads", "length", "visits"),
    [
        (128, 4096, 4),  # 4,096 tiles are 31.03 for each of 132: 32 turns, or 8 of four
        (132, 512, 4),
        (33, 512, 1),  # a tile for each multiprocessor
        (66, 512, 2),
        (128, 16384, 1),  # long ones gain nothing
    ],
)
def test_blocks_visit_several_tiles_where_no_multiprocessor_idles(num_heads, length, visits):
    assert choose(64, True, length, num_heads).visits == visits


def test_under_a_causal_rule_blocks_visit_more_tiles_or_one():
    assert choose(64, False, 4096, 128).visits == 8
    assert choose(64, False, 512, 1024).visits == 4  # there are no more
    assert choose(128, False, 4096, 64).visits == 1

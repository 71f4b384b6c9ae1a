"""The kernels of attention to a cache in programs for CUDA, on a machine that may have no GPU."""

import functools
import logging

import jax
import jax.numpy as jnp
import pytest

from rbf_jax.ops import dispatch
from rbf_jax.ops.decode import api as decode
from rbf_jax.ops.decode import triton
from rbf_jax.ops.decode.cache import KeysValues
from rbf_jax.ops.decode.triton import Sizes, choose_sizes, use_sizes
from rbf_jax.ops.gpu import device
from rbf_jax.ops.gpu.triton import launch
from rbf_jax.ops.gpu.triton.config import Tiles

pytestmark = pytest.mark.usefixtures("h100")

CALL = "@triton_kernel_call"
H100 = device.Target("NVIDIA H100 80GB HBM3", 90)


def shapes(B=2, T=1, N=4, K=2, S=5003, H=64, dtype="bfloat16"):
    cache = KeysValues(
        *[jax.ShapeDtypeStruct((B, K, S, H), dtype)] * 2,
        jax.ShapeDtypeStruct((B, K, S), jnp.float32),
    )
    place = jax.ShapeDtypeStruct((B,), jnp.int32)
    return jax.ShapeDtypeStruct((B, T, N, H), dtype), cache, place, place


def program(arrays, **options):
    call = functools.partial(decode.attend, **options)
    return jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_none_takes_it_where_cuda_is_and_says_so_once(caplog):
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="rbf_jax"):
        text = program(shapes())
        program(shapes(T=2))
    assert text.count(CALL) == 2
    assert "tensor<2x2x5003x64xf32>" not in text  # no copy of the keys, as the dense pass makes
    assert [record.getMessage() for record in caplog.records] == [
        "decode.attend: implementation=None takes 'triton' where the program is compiled for CUDA, "
        "else 'xla'."
    ]


def test_none_on_the_cpu_runs_all_the_same():
    query, cache, *places = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes(S=9))
    out, _ = decode.attend(query, cache, *places)
    assert out.shape == query.shape


def test_what_it_cannot_do_is_left_to_xla():
    assert CALL not in program(shapes(H=272))
    with pytest.raises(NotImplementedError, match=r"up to 256, not 272; 'xla' can do this call"):
        program(shapes(H=272), implementation="triton")
    with pytest.raises(NotImplementedError, match=r"less than 2³¹ numbers .*, not 16777216 × 128"):
        program(shapes(S=2**24, H=128), implementation="triton")
    with jax.enable_x64(True):
        arrays = shapes(dtype="float64")
        cache = arrays[1]._replace(key_norms=jax.ShapeDtypeStruct((2, 2, 5003), jnp.float64))
        with pytest.raises(NotImplementedError, match=r"not float64; 'xla' can do this call"):
            program((arrays[0], cache, *arrays[2:]), implementation="triton")


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(launch, "unavailable", lambda: "needs an NVIDIA GPU")
    with pytest.raises(NotImplementedError, match="'triton' needs an NVIDIA GPU; 'xla' can"):
        program(shapes(), implementation="triton")
    assert CALL not in program(shapes())


def test_one_split_needs_no_merge():
    assert program(shapes(S=100), implementation="triton").count(CALL) == 1
    with use_sizes(Sizes(Tiles(16, 16, 1, 1), 3)):
        assert program(shapes(S=100), implementation="triton").count(CALL) == 2


def test_vmap_folds_the_axis_into_the_batch():
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), shapes())
    call = jax.vmap(functools.partial(decode.attend, implementation="triton"))
    text = jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(CALL) == 2
    assert "tensor<6x2x5003x64xbf16>" in text


def chosen(B=1, K=16, S=32768, **changes):
    given = {"rows": 1, "head_dim": 128, "dtype": jnp.dtype("bfloat16"), "target": H100} | changes
    return choose_sizes(heads=B * K, visible=S, **given)


def test_few_keys_are_not_split():
    assert [chosen(S=n).num_splits for n in (1, 64, 100)] == [1, 1, 1]
    assert chosen(S=4096, B=1000).num_splits < 4
    assert chosen(S=10**7, B=1, K=1).num_splits == triton._MOST_SPLITS


def test_rows_are_a_tile_or_several():
    assert [chosen(rows=n).tiles.block_q for n in (1, 16, 17, 64, 500)] == [16, 16, 32, 64, 64]
    assert chosen(rows=500, head_dim=200).tiles.block_q == 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sizes(Tiles(16, 64, 4, 3), 0), "num_splits=0 must be from 1 to 128"),
        (lambda: Sizes(Tiles(16, 64, 4, 3), 129), "num_splits=129 must be from 1 to 128"),
        (lambda: Sizes(Tiles(16, 64, 4, 3, 2), 1), "heads_at_once=2 must be 1"),
    ],
)
def test_sizes_say_what_is_wrong_with_them(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Which tiles are chosen, and that they fit. No GPU and no Triton is needed."""

import jax.numpy as jnp
import pytest

from rbf_jax.ops.call import Inputs, Masking, Rules
from rbf_jax.ops.gpu import device, program
from rbf_jax.ops.gpu.triton import config as tiles
from rbf_jax.ops.gpu.triton import passes as attention
from rbf_jax.ops.gpu.triton.config import PASSES, Tiles, choose, default_tiles, use_tiles

CALL = {"head_dim": 64, "dtype": "bfloat16", "causal": True, "length": 4096}
H100 = {"gpu": "NVIDIA H100 80GB HBM3", "compute_capability": 90}
A, B, C = Tiles(32, 16, 4, 2), Tiles(16, 32, 4, 2), Tiles(16, 16, 4, 2)


def entry(chosen, **changed):
    fields = {"block_q": chosen.block_q, "block_k": chosen.block_k, "num_warps": chosen.num_warps}
    where = {"pass": "keys", **CALL, "length": "medium", **H100, **changed}
    return {**where, "tiles": {**fields, "num_stages": chosen.num_stages}, "milliseconds": 1.0}


@pytest.fixture
def table(monkeypatch):
    """Sets the tuned table."""

    def set_table(*entries):
        monkeypatch.setattr(tiles, "tuned_table", lambda: entries)

    return set_table


def test_the_same_gpu_comes_before_the_same_compute_capability(table):
    table(entry(A, gpu="NVIDIA H200"), entry(B))
    assert choose("keys", **CALL, **H100) == B
    table(entry(A, gpu="NVIDIA H200"))
    assert choose("keys", **CALL, **H100) == A


@pytest.mark.parametrize(
    "other",
    [
        {"pass": "queries"},
        {"head_dim": 128},
        {"dtype": "float16"},
        {"causal": False},
        {"length": "long"},
        {"gpu": "NVIDIA A100", "compute_capability": 80},
    ],
)
def test_an_entry_about_something_else_is_not_taken(table, other):
    table(entry(A, **other))
    assert choose("keys", **CALL, **H100) == default_tiles("keys", 64, "bfloat16", 90)


def test_head_dimensions_between_powers_of_two_take_the_larger(table):
    table(entry(A))
    assert choose("keys", **{**CALL, "head_dim": 48}, **H100) == A


@pytest.mark.parametrize(
    ("length", "name"),
    [
        (1, "short"),
        (1024, "short"),
        (1025, "medium"),
        (4096, "medium"),
        (4097, "long"),
        (10**6, "long"),
    ],
)
def test_classes_of_lengths(table, length, name):
    table(entry(A, length=name))
    assert choose("keys", **{**CALL, "length": length}, **H100) == A


def test_tiles_in_use_come_before_the_table(table, monkeypatch):
    table(entry(A), entry(B, **{"pass": "forward"}))
    monkeypatch.setattr(device, "target", lambda: device.Target(H100["gpu"], 90))

    def chosen():
        array = jnp.ones((1, 4096, 2, 64), jnp.bfloat16)
        numbers = jnp.ones((2,))
        inputs = Inputs(array, array, array, numbers, numbers)
        plan = attention._plan(Rules(right=0))
        call = attention._Call(plan, *program.with_batch_axis(inputs, Masking()))
        return call.tiles("forward"), call.tiles("keys")

    assert chosen() == (B, A)
    with use_tiles(keys=C):
        assert chosen() == (B, C)
        with use_tiles(keys=B, forward=C):
            assert chosen() == (C, B)
        assert chosen() == (B, C)
    assert chosen() == (B, A)


def test_the_table_in_the_package_can_be_read():
    for e in tiles.tuned_table():
        Tiles(**e["tiles"])
        assert e["pass"] in PASSES
        assert e["length"] in (*tiles.LENGTH_CLASSES, "long")


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("capability", "limit"), [(80, 166912), (90, 232448), (120, 101376)])
def test_default_tiles_fit(name, dtype, capability, limit):
    for H in (1, 16, 17, 64, 80, 128, 129, 256):
        chosen = default_tiles(name, H, dtype, capability)
        assert tiles.shared_memory(name, chosen, H, dtype) <= limit, H
        assert chosen.num_stages >= 2


# Of Triton 3.6.0, its own `metadata.shared`; the last number is the compute capability.
@pytest.mark.parametrize(
    ("name", "dtype", "H", "fields", "used", "capability"),
    [
        ("forward", "bfloat16", 256, (64, 32, 4, 3), 132096, 90),
        ("forward", "float32", 64, (64, 32, 4, 3), 82176, 90),
        ("forward", "float32", 64, (128, 32, 8, 2), 98432, 90),
        ("queries", "bfloat16", 256, (64, 32, 4, 3), 164864, 90),
        ("queries", "float32", 128, (64, 16, 8, 2), 163904, 90),
        ("queries", "float32", 256, (32, 16, 4, 2), 163904, 80),
        ("queries", "float32", 256, (32, 32, 4, 1), 163840, 80),
        ("keys", "bfloat16", 64, (64, 64, 4, 3), 67072, 90),
        ("keys", "float32", 16, (32, 32, 4, 2), 16640, 80),
        ("keys", "float32", 64, (64, 64, 8, 2), 164352, 90),
        ("keys", "float32", 64, (16, 64, 8, 2), 73856, 80),
        ("keys", "bfloat16", 256, (64, 32, 4, 1), 114688, 80),
    ],
)
def test_shared_memory_is_a_bound(name, dtype, H, fields, used, capability):
    assert tiles.shared_memory(name, Tiles(*fields), H, dtype) >= used


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_q", 48),
        ("block_k", 8),
        ("num_warps", 3),
        ("num_stages", 0),
        ("heads_at_once", 0.5),
        ("max_registers", 300),
    ],
)
def test_impossible_tiles(field, value):
    fields = {"block_q": 64, "block_k": 64, "num_warps": 4, "num_stages": 2, field: value}
    with pytest.raises(ValueError, match=f"{field}={value!r} must be"):
        Tiles(**fields)

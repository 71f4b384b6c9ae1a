"""How attention to a cache is cut for a GPU. No GPU and no Triton is needed."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from rbf_jax.ops.decode import triton as decode
from rbf_jax.ops.gpu import device

SWEEP = Path(__file__).parents[4] / "docs" / "measurements" / "decode_sweep_gpu.json"
ROWS = json.loads(SWEEP.read_text())["results"]
CELLS = sorted({(r["batch"], r["length"], r["heads"], r["kv_heads"]) for r in ROWS})
H100 = device.Target("NVIDIA H100 80GB HBM3", 90, 132)


def choose(batch, length, heads, kv_heads, head_dim=128, dtype="bfloat16", target=H100):
    return decode.choose_sizes(
        heads=batch * kv_heads,
        rows=heads // kv_heads,
        visible=length,
        head_dim=head_dim,
        dtype=jnp.dtype(dtype),
        target=target,
    )


def of_cell(cell):
    names = ("batch", "length", "heads", "kv_heads")
    return [row for row in ROWS if tuple(row[name] for name in names) == cell]


def tiles_of(row):
    return row["block_k"], row["num_warps"], row["num_stages"]


def test_tiles_are_those_measured_best():
    logs: dict[tuple[int, ...], list[float]] = {}
    for cell in CELLS:
        for row in of_cell(cell)[:7]:  # of one number of splits
            logs.setdefault(tiles_of(row), []).append(math.log(row["microseconds"]))
    best = min(logs, key=lambda tiles: sum(logs[tiles]))
    for cell in CELLS:
        tiles = choose(*cell).tiles
        assert (tiles.block_k, tiles.num_warps, tiles.num_stages) == best


@pytest.mark.parametrize("cell", CELLS)
def test_splits_are_those_measured_best(cell):
    tiles = choose(*cell).tiles
    chosen = (tiles.block_k, tiles.num_warps, tiles.num_stages)
    rows = [row for row in of_cell(cell) if tiles_of(row) == chosen]
    assert len(rows) >= 5
    best = min(rows, key=lambda row: row["microseconds"])
    assert choose(*cell).num_splits == best["num_splits"]


@pytest.mark.parametrize("batch", [1, 3, 16, 64])
@pytest.mark.parametrize("length", [8192, 32768, 131072])
@pytest.mark.parametrize("heads", [(16, 16), (32, 8), (8, 1)])
def test_every_multiprocessor_has_a_program_and_none_is_long(batch, length, heads):
    splits = choose(batch, length, *heads).num_splits
    assert length / splits <= 8192
    assert splits == 128 or batch * heads[1] * splits >= 0.95 * 132


def test_smaller_heads_take_more_programs():
    """Each has half as many bytes under way."""
    assert choose(1, 32768, 16, 16, head_dim=64).num_splits > choose(1, 32768, 16, 16).num_splits


def test_a_window_is_as_a_short_cache():
    assert choose(16, 128, 16, 16).num_splits <= 2


@pytest.mark.parametrize(("rows", "dtype", "warps"), [(1, "bfloat16", 2), (1, "float32", 4)])
def test_two_warps_where_registers_suffice(rows, dtype, warps):
    assert choose(1, 8192, rows, 1, dtype=dtype).tiles.num_warps == warps
    assert choose(1, 8192, 32, 1, dtype=dtype).tiles.num_warps == 4

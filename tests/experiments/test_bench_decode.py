"""The benchmark of decoding; times are whatever they are."""

import concurrent.futures
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import bench_decode
from experiments.benchmarks import decode_cells, decode_sweep
from experiments.benchmarks.clock import Call, Timing
from experiments.benchmarks.decode_cells import Cell
from rbf_jax.ops.decode.triton import Sizes
from rbf_jax.ops.gpu import device


def test_measures_every_cell_and_writes_json_and_a_table(tmp_path, capsys):
    out = tmp_path / "new folder" / "decode.json"
    sizes = ["--lengths=24,48", "--batches=1,3", "--heads=4/2", "--head_dim=8", "--rounds=1"]
    assert bench_decode.main(["bench", *sizes, f"--out={out}"]) == 0
    content = json.loads(out.read_text())
    rows = [r for r in content["results"] if r["implementation"] == "RBF xla"]
    cells = [(r["batch"], r["length"], r["filled"]) for r in rows]
    assert cells == [(1, 24, 24), (3, 24, 24), (1, 48, 48), (3, 48, 48), (3, 24, 12)]
    assert len(content["results"]) == 2 * len(rows)
    assert all(r["microseconds"] > 0 and "error" not in r for r in content["results"])
    assert content["versions"]["jax"]
    table = out.with_suffix(".md").read_text()
    assert table.count("\n| 4 | 2 |") == 5
    assert table in capsys.readouterr().out


def test_speeds_are_those_of_the_bytes():
    class Clock:
        def times_for(self, call, milliseconds):
            return 1

        def measure(self, call, times):
            return Timing(2.0, 3.0, {"one": 2.0})

    cell = Cell(2, 64, 4, 2, 8, 32)
    assert cell.cache_bytes == 2 * 2 * 64 * 2 * 8 * 2
    rbf, copy = bench_decode.measure(cell, Clock(), 1)
    assert (rbf["implementation"], copy["implementation"]) == ("RBF xla", "copy")
    assert rbf["terabytes_per_second"] == pytest.approx(1e-12 * cell.cache_bytes / 2 / 2e-3)
    assert copy["terabytes_per_second"] == pytest.approx(1e-12 * cell.cache_bytes / 2e-3)
    assert (rbf["microseconds"], rbf["queued_microseconds"]) == (2000, 3000)


def test_layouts_and_lengths():
    """The step attends to its own cache: the first `filled` tokens of (B, K, S, H)."""
    cell = Cell(2, 20, 4, 2, 8, 9)
    query, key, value, norms, lengths = cell.arrays()
    assert key.shape == (2 * 2, 20 * 8)
    out, _ = decode_cells.rbf(cell, "xla")(query, key, value, norms, lengths)
    k, v = (x.reshape(2, 2, 20, 8)[:, :, :9].astype(jnp.float32) for x in (key, value))
    k, v = (jnp.repeat(x, 2, axis=1) for x in (k, v))
    logits = 2 * jnp.einsum("btnh,bnsh->bns", query.astype(jnp.float32), k)
    logits = (logits - jnp.square(k).sum(-1)) / jnp.sqrt(jnp.float32(8))
    want = jnp.einsum("bns,bnsh->bnh", jax.nn.softmax(logits), v)
    assert jnp.allclose(out[:, 0].astype(jnp.float32), want, atol=0.02)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--heads=16/3", "'16/3' must be N/K,… with K a divisor of N"),
        ("--heads=16", "must be N/K"),
        ("--lengths=0", "'0' must be an integer of at least 1"),
        ("--out=x.txt", "must end in .json"),
    ],
)
def test_wrong_options(option, message, capsys):
    with pytest.raises(SystemExit):
        bench_decode.main(["bench", option])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_a_sweep_needs_a_gpu(capsys):
    assert bench_decode.main(["bench", "--sweep"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_decode: --sweep needs an NVIDIA GPU")


def test_a_sweep_finds_the_best(monkeypatch):
    """Times are made up: three stages and many splits are best; one compilation fails."""
    monkeypatch.setattr(device, "target", lambda: device.Target("NVIDIA H100 80GB HBM3", 90))
    small = tuple(Cell(batch, 4096, 2, 1, 8, 4096) for batch in (16, 64))
    monkeypatch.setattr(decode_sweep, "CELLS", small)

    def compile_step(step, arrays, sizes):
        if sizes.tiles.num_warps == 1:
            raise RuntimeError("no such thing")
        future: concurrent.futures.Future[Call] = concurrent.futures.Future()
        future.set_result(Call(lambda: sizes, lambda _: None))
        return future

    class Clock:
        def times_for(self, call, milliseconds):
            return 1

        def measure(self, call, times):
            sizes: Sizes = call.run()
            tiles = sizes.tiles
            ms = 1 + (tiles.num_stages != 3) + (tiles.num_warps != 2) + 1 / sizes.num_splits
            return Timing(ms, ms, {})

    monkeypatch.setattr(decode_cells, "compile_step", compile_step)
    said: list[str] = []
    rows = decode_sweep.sweep(Clock(), 1, said.append)
    assert sum("error" in row for row in rows) == len(small)
    assert "best tiles in all: 64 keys, 2 warps, 3 stages" in "\n".join(said)
    best = [line for line in said if line.startswith("best of")]
    assert ["B 16 S 4096: 64 keys, 2 warps, 3 stages, 99 splits" in best[0], len(best)] == [
        True,
        2,
    ]
    assert "by default" in best[0]
    assert "nan" not in best[0]

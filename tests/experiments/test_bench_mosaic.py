"""The sweep of the Mosaic kernel's tiles, with "xla" in the place of what needs a GPU."""

import itertools
import json
import re

import jax
import pytest

from experiments import bench_mosaic as program
from experiments.benchmarks.clock import Clock
from experiments.benchmarks.contenders import Cell, rbf
from rbf_jax.ops.gpu import device
from rbf_jax.ops.gpu.mosaic.config import HEAD_DIMS, ForwardTiles, choose, tiles_in_use


@pytest.mark.parametrize("H", HEAD_DIMS)
def test_candidates_have_the_default(H):
    cells = itertools.product((False, True), (512, 1024, 4096, 16384))
    chosen = {choose(H, plain, T, 2**25 // (H * T)) for plain, T in cells}
    assert chosen <= set(program.candidates(H))


def test_measure(monkeypatch):
    """Wrong results are named, and not timed."""
    cell = Cell(1, 64, 1, 64, True)
    wrong = ForwardTiles(block_k=64)

    def mosaic(cell, implementation):
        attend = rbf(cell, "xla")
        if implementation != "mosaic":
            return attend
        return lambda *x: attend(*x) * (0 if tiles_in_use()[0] == wrong else 1)

    monkeypatch.setattr(program, "rbf", mosaic)
    monkeypatch.setattr(program, "dot_product", lambda cell, _: rbf(cell, "xla"))
    monkeypatch.setattr(program, "candidates", lambda _: [ForwardTiles(), wrong])
    monkeypatch.setattr(program, "QUEUE_MILLISECONDS", 0.1)
    lines = []
    medians = program.measure(cell, Clock(), lines.append)
    assert lines[0] == f"{wrong}: wrong by 1 of the largest output"
    pattern = r" +[0-9.]+ ms +[0-9]+ TFLOP/s +[0-9.]+ (.*)"
    names = {re.fullmatch(pattern, line)[1] for line in lines[1:]}
    assert names == medians.keys() == {"cuDNN dot product", "RBF triton", str(ForwardTiles())}
    assert list(medians.values()) == sorted(medians.values())


def test_the_file_has_all_cells(monkeypatch, tmp_path):
    monkeypatch.setattr(program.launch, "unavailable", lambda: None)
    monkeypatch.setattr(program.device, "target", lambda: device.Target("GPU", 90))
    monkeypatch.setattr(program, "measure", lambda cell, *_: {"all": float(cell.length)})
    out = tmp_path / "times.json"
    argv = ["bench_mosaic", "--head_dims=64", "--lengths=32,16", f"--out={out}"]
    assert program.main(argv) == 0
    content = json.loads(out.read_text())
    found = [(c["length"], c["causal"], c["milliseconds"]["all"]) for c in content["cells"]]
    assert sorted(found) == [(T, causal, T) for T in (16, 32) for causal in (False, True)]
    assert content["command"].endswith(" ".join(argv[1:]))
    assert content["device"]
    assert content["versions"]["jax"] == jax.__version__


def test_without_a_gpu(capsys):
    assert program.main(["bench_mosaic"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err

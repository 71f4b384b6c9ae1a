"""The sweep of the Mosaic kernel's tiles, with "xla" in the place of what needs a GPU."""

import re

import pytest

from experiments import bench_mosaic as program
from experiments.benchmarks.clock import Clock
from experiments.benchmarks.contenders import Cell, rbf
from rbf_jax.ops.mosaic.tiles import HEAD_DIMS, Tiles, choose, overridden


@pytest.mark.parametrize("H", HEAD_DIMS)
def test_candidates_have_the_default(H):
    assert {choose(H, True), choose(H, False)} <= set(program.candidates(H))


def test_measure(monkeypatch):
    """Wrong results are named, and not timed."""
    cell = Cell(1, 64, 1, 64, True)
    wrong = Tiles(block_k=64)

    def mosaic(cell, implementation):
        attend = rbf(cell, "xla")
        if implementation != "mosaic":
            return attend
        return lambda *x: attend(*x) * (0 if overridden()[0] == wrong else 1)

    monkeypatch.setattr(program, "rbf", mosaic)
    monkeypatch.setattr(program, "dot_product", lambda cell, _: rbf(cell, "xla"))
    monkeypatch.setattr(program, "candidates", lambda _: [Tiles(), wrong])
    monkeypatch.setattr(program, "QUEUE_MILLISECONDS", 0.1)
    lines = []
    program.measure(cell, Clock(), lines.append)
    assert lines[0] == f"{wrong}: wrong by 1 of the largest output"
    pattern = r" +[0-9.]+ ms +[0-9]+ TFLOP/s +[0-9.]+ (.*)"
    names = {re.fullmatch(pattern, line)[1] for line in lines[1:]}
    assert names == {"cuDNN dot product", "RBF triton", str(Tiles())}


def test_without_a_gpu(capsys):
    assert program.main(["bench_mosaic"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err

"""The layer's benchmark; times are whatever they are."""

import json
from types import SimpleNamespace

import jax
import pytest

from experiments import bench_layer


@pytest.mark.parametrize(
    "names",
    [
        ("RBF, RoPE", "RBF, SuSiE, 1 register"),
        pytest.param(tuple(bench_layer.LAYERS), marks=pytest.mark.exhaustive),
    ],
    ids=len,
)
def test_measures_every_layer_and_writes_json(names, tmp_path, capsys, monkeypatch):
    some = {name: bench_layer.LAYERS[name] for name in names}
    monkeypatch.setattr(bench_layer, "LAYERS", some)
    out = tmp_path / "new folder" / "layer.json"
    sizes = ["--lengths=8,16", "--tokens=16", "--d_model=8", "--heads=2", "--rounds=1"]
    assert bench_layer.main(["bench", *sizes, f"--out={out}"]) == 0
    content = json.loads(out.read_text())
    cells = {(r["implementation"], r["length"], r["direction"]) for r in content["results"]}
    assert len(cells) == len(content["results"]) == len(names) * 2 * 2
    assert all(r["milliseconds"] > 0 and r["temporary_bytes"] >= 0 for r in content["results"])
    assert content["settings"]["d_model"] == 8
    assert content["versions"]["jax"]
    assert "RBF, SuSiE, 1 register" in capsys.readouterr().out


class Shapes:
    """Stands for a jitted function; called, it returns shapes."""

    def __init__(self, function):
        self._function = function

    def lower(self, *arguments):
        return self

    def compile(self):
        return self

    def __call__(self, *arguments):
        return jax.eval_shape(self._function, *arguments)


def test_layers_are_what_their_names_say(monkeypatch):
    options = bench_layer._parse(["bench", "--tokens=8", "--d_model=8", "--heads=2"])
    monkeypatch.setattr(bench_layer.jax, "jit", Shapes)
    monkeypatch.setattr(bench_layer, "memory", lambda _: SimpleNamespace(temp_size_in_bytes=0))
    for name in bench_layer.LAYERS:
        call, _ = bench_layer.calls(name, 8, options)["forward+backward"]
        out, (gradients, _) = call.run()
        assert out.shape == (1, 8 + ("register" in name), 8)
        assert ("susie" in gradients["params"]) == ("SuSiE" in name)


def test_sizes_that_do_not_fit(capsys):
    with pytest.raises(SystemExit):
        bench_layer.main(["bench", "--d_model=12", "--heads=4"])
    assert "--d_model is 12; it must be a multiple of" in capsys.readouterr().err

import json
import types

import pytest

from experiments import bench_training
from tests.experiments.conftest import REPOSITORY

TINY = [
    "--vocab_size=300",
    "--rounds=2",
    "--steps=1",
    "--config.model.num_layers=1",
    "--config.model.d_model=16",
    "--config.train.batch_size=2",
    "--config.data.context_length=16",
]
RBF = f"--config={REPOSITORY / 'configs' / 'stories_rbf.py'}"
DOT = f"--against={REPOSITORY / 'configs' / 'stories_dot.py'}"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "new" / "training.json"
    argv = ["bench", RBF, DOT, *TINY, "--config.model.dtype=bfloat16", f"--out={out}"]
    patch = pytest.MonkeyPatch()
    patch.chdir(REPOSITORY)
    assert bench_training.main(argv) == 0
    patch.undo()
    return json.loads(out.read_text())


def test_measures_both(content):
    rbf, dot = content["results"]
    assert rbf["config"].endswith("stories_rbf.py")
    assert dot["config"].endswith("stories_dot.py")
    for result in (rbf, dot):
        assert result["tokens_per_second"] > 0
        assert result["peak_bytes"] > 3 * 4 * result["parameters"]  # Parameters and AdamW's two.
        assert result["tokens_per_step"] == 2 * 16
        assert result["dtype"] == "bfloat16"
        assert result["allocator_peak_bytes"] is None  # A CPU does not tell.
    # Embeddings of 300 tokens, and susie's weights beyond what the twin has.
    assert rbf["parameters"] > dot["parameters"] > 300 * 16
    assert content["vocab_size"] == 300
    assert content["versions"]["jax"]


def test_prints_ratios(content):
    rbf, dot = content["results"]
    rbf |= {"tokens_per_second": 1.83e6, "allocator_peak_bytes": int(5.1 * 2**30)}
    dot |= {"tokens_per_second": 2.00e6}
    text = bench_training.describe(content)
    assert "1,830,000 tokens/s" in text
    assert "stories_dot.py's: 0.915" in text
    assert "3.00 times its tokens/s, 0.50 times its memory" in text
    assert "allocator's peak 5.10 GiB" in text


def test_peak_counts_what_is_donated_once():
    analysis = types.SimpleNamespace(
        argument_size_in_bytes=100,
        output_size_in_bytes=90,
        alias_size_in_bytes=80,
        temp_size_in_bytes=7,
    )
    step = types.SimpleNamespace(memory_analysis=lambda: analysis)
    assert bench_training.Running(step, None, None, 1, 1).peak_bytes() == 100 + 10 + 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/none.py"], "config file configs/none.py does not exist"),
        ([RBF, "--config.train.batchsize=2"], "there is no key train.batchsize"),
        ([RBF, "--config.model.num_heads=3"], "num_heads"),
    ],
)
def test_wrong_configurations(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert bench_training.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_wrong_options(capsys):
    with pytest.raises(SystemExit):
        bench_training.main(["bench", RBF, "--step=3"])
    assert "'--step=3' is not understood" in capsys.readouterr().err

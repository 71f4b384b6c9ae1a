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


def test_packing_counts_what_the_loss_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    out = tmp_path / "packing.json"
    sizes = ["--rounds=2", "--steps=1", "--config.data.tokenizer=bytes", *TINY[3:6]]
    sizes += ["--config.data.context_length=1024", f"--config.data.cache_dir={tmp_path}"]
    argv = ["bench", f"--config={REPOSITORY / 'configs' / 'base.py'}", "--packing", *sizes]
    assert bench_training.main([*argv, f"--out={out}"]) == 0
    packed, padded = json.loads(out.read_text())["results"]
    assert (packed["layout"], padded["layout"]) == ("packed", "padded")
    assert packed["share_of_text"] == 1 >= padded["share_of_text"]
    assert 1 > packed["share_that_counts"] > padded["share_that_counts"] > 0.1
    for result in (packed, padded):
        counted = result["share_that_counts"] * result["places_per_second"]
        assert result["tokens_per_second"] == pytest.approx(counted)
    assert "packed trains on " in capsys.readouterr().out


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
    with pytest.raises(SystemExit):
        bench_training.main(["bench", RBF, DOT, "--packing"])
    assert "--against has no effect with --packing" in capsys.readouterr().err

import json
import shutil

import jax
import numpy as np
import pytest

from rbf_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from rbf_jax.training import SetupError, load_run, train, trainer
from rbf_jax.training.initial import open_source, start_from
from tests.harness.gpt2_folder import random_tensors, write_folder
from tests.harness.tiny import state_digests, without_timing


def test_a_run_goes_on_from_anothers_parameters_and_its_dial_is_annealed(
    config, tmp_path, finished_run, monkeypatch
):
    """λ is 0 before the first step and 1 from step 8 on; and killed anywhere, all is the same."""
    config.train.init_from = str(finished_run)
    config.train.keep_checkpoints = 9
    config.optimizer.anneal_steps = 8
    config.model.attention.key_norm_weight = 0.0
    config.seed = 5
    train(config, tmp_path / "whole")
    weights = {
        line["step"]: line["key_norm_weight/0"]
        for line in without_timing(tmp_path / "whole" / "metrics.jsonl")
        if line["split"] == "train"
    }
    expected = {step: [min(1, step / 8)] * 2 for step in range(1, 13)}
    assert weights == {step: pytest.approx(value) for step, value in expected.items()}
    assert weights[8] == weights[12] == [1.0, 1.0]

    save = trainer.Trainer._save
    monkeypatch.setattr(trainer.Trainer, "_save", _killed_at(save, 6))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "killed")
    monkeypatch.setattr(trainer.Trainer, "_save", save)
    # What a run goes on with is in its folder.
    monkeypatch.setattr(trainer, "open_source", None)
    train(config, tmp_path / "killed")
    for step in (4, 12):
        digests = [state_digests(tmp_path / run, step) for run in ("whole", "killed")]
        assert digests[0] == digests[1]


def _killed_at(save, step):
    def wrapped(self):
        if self.step == step:
            raise KeyboardInterrupt
        save(self)

    return wrapped


def test_the_parameters_at_the_start_are_the_others(config, tmp_path, finished_run, monkeypatch):
    def not_trained(self, stop):
        old, new = load_run(finished_run).variables["params"], self.state.params
        jax.tree.map(np.testing.assert_array_equal, new, old)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "run", not_trained)
    config.train.init_from, config.seed = str(finished_run), 5
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)


def test_longer_tables_of_positions_are_cut_and_a_dial_and_a_sink_are_added(tmp_path):
    source = open_source(write_folder(tmp_path))
    params = source.params()
    drawn = jax.tree.map(np.zeros_like, params)
    drawn["position_embedding"]["embedding"] = np.zeros((7, 24), np.float32)
    new = {"key_norm_weight": np.float32([0.0, 0.5, 0.25]), "sink_logits": np.float32([0, 1, 2])}
    drawn["block_0"]["attention"].update(new)
    result = start_from(source, drawn, load_tokenizer(tmp_path))
    expected = source.params()
    table = expected["position_embedding"]
    table["embedding"] = table["embedding"][:7]
    expected["block_0"]["attention"].update(new)
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_models_that_do_not_fit_are_an_error(tmp_path):
    source = open_source(write_folder(tmp_path))
    tokenizer = load_tokenizer(tmp_path)

    def check(message, change):
        drawn = source.params()
        change(drawn)
        with pytest.raises(ValueError, match=message):
            start_from(source, drawn, tokenizer)

    zeros = lambda *shape: np.zeros(shape, np.float32)  # noqa: E731
    check(
        "has no parameter registers/embedding, but the model does",
        lambda p: p.update(registers={"embedding": zeros(1, 24)}),
    )
    check("has a parameter final_norm/bias, but", lambda p: p["final_norm"].pop("bias"))
    check(
        r"block_0/mlp/in/bias has shape \(96,\), but that of the model has \(48,\)",
        lambda p: p["block_0"]["mlp"]["in"].update(bias=zeros(48)),
    )
    check(
        r"position_embedding/embedding has shape \(20, 24\), .* has \(21, 24\)",
        lambda p: p["position_embedding"].update(embedding=zeros(21, 24)),
    )
    with pytest.raises(
        ValueError, match=r"another one than that of the run; set data.tokenizer to"
    ):
        start_from(source, source.params(), ByteTokenizer())


def test_folders_that_hold_no_model_are_an_error(config, tmp_path, finished_run):
    with pytest.raises(ValueError, match=r"no config.json is in it"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"layers": 3}))
    with pytest.raises(ValueError, match="neither that of a run nor that of GPT-2"):
        open_source(tmp_path)
    untrained = tmp_path / "untrained"
    shutil.copytree(finished_run, untrained, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        open_source(untrained)
    # Training names it in one line, and spares the run folder.
    config.train.init_from = str(write_folder(tmp_path / "gpt2", random_tensors()))
    with pytest.raises(SetupError, match=r"tokenizer of .* is another one than that of the run"):
        train(config, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {
        *("config.json", "tokenizer.json", ".lock"),
    }

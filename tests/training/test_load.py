import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.training import CheckpointError, evaluate_run, load_run
from tests.harness.tiny import without_timing


@pytest.fixture
def run_copy(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def test_load_run(finished_run):
    run = load_run(finished_run)
    assert run.step == run.config.train.steps == 12
    assert run.model.config.vocab_size == run.data.tokenizer.vocab_size
    trained = jax.eval_shape(run.model.apply, run.variables, jnp.zeros((4, 16), jnp.int32))
    assert trained.shape == (4, 16, run.data.tokenizer.vocab_size)


def test_steps_are_chosen(finished_run, run_copy):
    assert load_run(finished_run, 10).step == 10
    # The loss falls all along; make an earlier evaluation the best.
    assert load_run(run_copy, "best").step == 12
    metrics = without_timing(run_copy / "metrics.jsonl")
    metrics.append({"step": 10, "split": "valid", "loss": 0.0})
    (run_copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    assert load_run(run_copy, "best").step == 10
    assert load_run(run_copy, "last").step == 12
    with pytest.raises(CheckpointError, match="holds no checkpoint 3; it holds 10, 12"):
        load_run(run_copy, 3)


def test_what_is_no_run_is_an_error(tmp_path, run_copy):
    with pytest.raises(ValueError, match=r"is not a run folder: no config\.json"):
        load_run(tmp_path)
    shutil.rmtree(run_copy / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        load_run(run_copy)


def test_damaged_parameters_are_an_error(run_copy):
    about = run_copy / "checkpoints" / "12" / "about" / "metadata"
    content = json.loads(about.read_text())
    content["params"] += 1
    about.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"12 cannot be read: .*digests differ"):
        load_run(run_copy)


def test_evaluate_run(run_copy):
    result = evaluate_run(run_copy, checkpoint=12)
    assert json.loads((run_copy / "evaluation.json").read_text()) == result
    assert (result["step"], result["split"]) == (12, "valid")
    run = load_run(run_copy)
    token_losses = jax.jit(functools.partial(run.model.apply, method="token_losses"))
    losses = []
    for batch in run.data.batches("valid", 4, shuffle=False, repeat=False):
        names = ("inputs", "targets", "positions", "segment_ids")
        here = token_losses(run.variables, *(batch[name] for name in names))
        losses.extend(here[batch["loss_mask"]].tolist())
    assert len(losses) == run.data.num_targets["valid"]
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    bits = -np.sum(np.log2(np.exp(-np.array(losses))))
    text_bytes = run.data.bytes_per_token["valid"] * len(losses)
    assert result["bits_per_byte"] == pytest.approx(bits / text_bytes, rel=1e-5)
    assert result["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest

from configs import base
from rbf_jax.nn import AttentionConfig, CausalLM
from rbf_jax.training import load_run, train
from rbf_jax.training.config import model_config
from rbf_jax.training.conversion import arm_config, arm_report, convert, summary_table
from rbf_jax.training.initial import open_source
from rbf_jax.training.step import make_eval_step
from tests.harness.gpt2_folder import write_folder
from tests.harness.tiny import tiny_config


@pytest.fixture(scope="module")
def dot_run(corpus, tmp_path_factory):
    """A dot-product model of learned positions, trained a little. Only to be read."""
    folder = tmp_path_factory.mktemp("dot") / "run"
    config = conversion(corpus)
    config.model = tiny_config(corpus).model
    config.optimizer.anneal_steps = 0  # Then the control arm compiles nothing of its own.
    config.model.attention.kind = "dot"
    config.model.positions = "learned"
    config.model.attention.sink = "none"
    train(config, folder)
    return folder


def conversion(corpus):
    """A configuration of a conversion, of few steps."""
    config = tiny_config(corpus)
    config.model = base.model()
    config.optimizer.anneal_steps = 3
    config.optimizer.warmup_steps = 1
    config.optimizer.learning_rate = 0.5  # For keys that are not small.
    config.train.steps = 4
    config.train.eval_every = 2
    return config


def test_what_is_lost_and_what_comes_back(corpus, dot_run, tmp_path):
    config = conversion(corpus)
    report = convert(config, open_source(dot_run), tmp_path, ["annealed", "control"], "a command")
    # At λ = 0 it is the model that it was, as its own training evaluated it.
    summary = json.loads((dot_run / "summary.json").read_text())
    assert report["untrained"]["dot_product"] == pytest.approx(summary["valid_loss"], abs=1e-5)
    assert report["untrained"]["rbf"] == pytest.approx(_rbf_loss(dot_run, config), abs=1e-5)
    assert report["lost"] == report["untrained"]["rbf"] - report["untrained"]["dot_product"]
    assert abs(report["lost"]) > 1e-4
    for arm, weights in (("annealed", [1 / 3, 2 / 3, 1, 1]), ("control", [0, 0, 0, 0])):
        result = report["arms"][arm]
        steps, values = zip(*result["key_norm_weight"])
        assert (steps, values) == ((1, 2, 3, 4), pytest.approx(weights))
        assert [step for step, _ in result["valid_loss"]] == [2, 4]
    written = json.loads((tmp_path / "convert.json").read_text())
    assert written == json.loads(json.dumps(report))  # where tuples are lists
    # The arms are ordinary runs, and the same command finds them finished.
    assert load_run(tmp_path / "control").config.model.attention.kind == "dot"
    again = convert(config, open_source(dot_run), tmp_path, ["annealed", "control"], "a command")
    assert again["arms"] == report["arms"]


def _rbf_loss(run, config):
    """Loss at λ = 1 of the dot-product model's parameters, by hand."""
    run = load_run(run)
    attention = AttentionConfig(kind="rbf", gamma=0.5 / math.sqrt(8), sink="none")
    model = CausalLM(dataclasses.replace(run.model.config, attention=attention))
    batches = run.data.batches("valid", config.train.batch_size, shuffle=False, repeat=False)
    step = make_eval_step(model)
    losses = [step(run.variables["params"], batch) for batch, _ in zip(batches, range(2))]
    return sum(float(loss) for loss, _ in losses) / sum(int(targets) for _, targets in losses)


@pytest.fixture
def source():
    """A dot-product model of ours, by what its configuration says."""
    fields = base.model().to_dict() | {"positions": "rope", "d_model": 64, "num_heads": 4}
    fields["attention"] |= {"kind": "dot"}
    return SimpleNamespace(path="runs/dot", fields=fields, num_positions=None)


@pytest.mark.parametrize(("dot_scale", "gamma"), [("standard", 0.125), ("rbf", 0.25)])
def test_arms_differ_in_the_dial_only(source, dot_scale, gamma):
    source.fields["attention"]["dot_scale"] = dot_scale
    config = base.get_config()
    config.optimizer.anneal_steps = 100
    config.model.dtype = "bfloat16"
    config.model.attention.implementation = "xla"
    models = {}
    for arm in ("annealed", "switched", "learned", "control"):
        made = arm_config(config, source, arm, "bytes")
        assert made.optimizer.anneal_steps == (100 if arm == "annealed" else 0)
        assert made.train.init_from == "runs/dot"
        models[arm] = model_config(made, 300)
    control = models.pop("control")
    assert (control.dtype, control.attention.implementation) == ("bfloat16", "xla")
    assert (control.positions, control.d_model, control.attention.kind) == ("rope", 64, "dot")
    assert control.attention.initial_gamma(16) == gamma
    rbf = {"kind": "rbf", "dot_scale": "standard", "gamma": gamma}
    for arm, weight, learned in (
        ("annealed", 0, True),
        ("switched", 1, False),
        ("learned", 0, True),
    ):
        attention = dataclasses.replace(
            control.attention, **rbf, key_norm_weight=float(weight), learn_key_norm_weight=learned
        )
        assert models[arm] == dataclasses.replace(control, attention=attention)


def test_gpt2_is_what_its_folder_says(tmp_path):
    config = base.get_config()
    config.data.context_length = 20
    config.optimizer.anneal_steps = 100
    config.model.norm, config.model.attention.key_norm_weight = "rms", 0.0  # have no say
    gpt2 = open_source(write_folder(tmp_path))
    model = model_config(arm_config(config, gpt2, "annealed", "x"), 258)
    assert (model.norm, model.use_bias, model.positions) == ("layer", True, "learned")
    assert (model.num_layers, model.d_model, model.num_heads, model.num_registers) == (2, 24, 3, 0)
    assert model.attention.sink == "none"
    assert model.attention.gamma == pytest.approx(0.5 / math.sqrt(8))
    assert model.attention.key_norm_weight == 0
    assert model_config(arm_config(config, gpt2, "control", "x"), 258).attention == AttentionConfig(
        kind="dot", sink="none"
    )
    config.data.context_length = 21
    with pytest.raises(ValueError, match=r"context_length is 21; .* has 20 positions"):
        arm_config(config, gpt2, "control", "x")


def test_what_cannot_be_converted_is_an_error(source, tmp_path):
    config = base.get_config()
    with pytest.raises(ValueError, match="anneal_steps is 0; the arm 'annealed' needs at least 1"):
        convert(config, source, tmp_path, ["annealed"])
    with pytest.raises(ValueError, match="arm 'anneal' must be one of annealed, switched"):
        convert(config, source, tmp_path, ["anneal"])
    source.fields["attention"]["kind"] = "rbf"
    with pytest.raises(ValueError, match="kind 'rbf'; only a dot-product model can be converted"):
        arm_config(config, source, "control", "bytes")


def test_report_of_an_arm(tmp_path):
    lines = [
        {"step": 1, "split": "train", "key_norm_weight/0": [0.1, 0.3], "key_norm_weight/1": [0, 0]},
        {"step": 2, "split": "valid", "loss": 3.5},
        {"step": 4, "split": "valid", "loss": 2.9},
        {"step": 6, "split": "valid", "loss": 3.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = arm_report(tmp_path, 3.0)
    assert result == {
        "valid_loss": [[2, 3.5], [4, 2.9], [6, 3.1]],
        "key_norm_weight": [[1, pytest.approx(0.1)]],
        "best": 2.9,
        "final": 3.1,
        "recovered_at": 4,
    }
    assert arm_report(tmp_path, 2.0)["recovered_at"] is None
    report = {"untrained": {"dot_product": 3.0, "rbf": 7.25}, "lost": 4.25}
    table = summary_table(report | {"arms": {"annealed": result}}).splitlines()
    assert table[2].split() == ["RBF,", "λ", "=", "1", "7.2500", "+4.2500"]
    assert table[3].split() == ["annealed,", "trained", "3.1000", "+0.1000", "4"]

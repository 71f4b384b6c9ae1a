import pytest

from configs import base
from rbf_jax.training.config import differences, from_json, model_config, to_json, validate


@pytest.fixture
def config():
    return base.get_config()


def test_the_defaults_are_valid(config):
    validate(config, 2)
    assert model_config(config, 300).vocab_size == 300


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.steps", -1, "train.steps is -1; it must be at least 1"),
        ("train.keep_checkpoints", 0, "it must be at least 1"),
        ("train.eval_batches", -1, "it must be at least 0"),
        ("train.steps", 100, r"warmup_steps is 100; it must be less than train.steps = 100"),
        ("optimizer.learning_rate", 0.0, r"learning_rate is 0.0; it must be in \(0, inf\)"),
        ("optimizer.learning_rate", float("nan"), "learning_rate is nan"),
        ("optimizer.learning_rate", 1e-6, "at most optimizer.learning_rate = 1e-06"),
        ("optimizer.b2", 1.0, r"b2 is 1.0; it must be in \[0, 1\)"),
        ("optimizer.clip_norm", 0.0, "clip_norm is 0.0"),
        ("optimizer.anneal_steps", -1, "anneal_steps is -1; it must be at least 0"),
        ("optimizer.anneal_steps", 1001, "is 1001; it must be at most train.steps = 1000"),
        ("optimizer.anneal_steps", 5, "other than 1 to start from, .* are 'rbf', 1.0 and False"),
        ("optimizer.accumulate_steps", 3, r"multiple of .* = 3 × 2 × 1\."),
        ("train.batch_size", 33, "batch_size is 33; it must be a multiple"),
        ("mesh.tensor", 3, r"mesh is data=-1, .* product, 3, must divide .* of devices, 2\."),
        ("mesh.data", 1, r"mesh is data=1, .* product, 1, must be the number of devices, 2\."),
        ("mesh.seq", -1, r"mesh is .* seq=-1; only one axis may be -1"),
        ("mesh.fsdp", 0, r"mesh is .* fsdp=0, .* each axis must be at least 1, or -1 to fill"),
        ("train.eval_every", 150, "must be a multiple of train.checkpoint_every = 100"),
        ("model.num_heads", 3, "num_heads=3 must divide d_model=256"),
        ("model.attention.kind", "rbg", "did you mean 'rbf'"),
        ("model.attention.window", -1, "attention.window=-1"),
        ("model.attention.window", 255, "window is 255; .* less than data.context_length - 1 = 2"),
    ],
)
def test_wrong_values_are_named(key, value, message, config):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message) as error:
        validate(config, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("axis", "key", "value", "message"),
    [
        (
            "tensor",
            "model.num_heads",
            1,
            "num_heads is 1; it must be a multiple of mesh.tensor = 2",
        ),
        ("tensor", "model.num_kv_heads", 1, "num_kv_heads is 1; .* multiple of mesh.tensor = 2"),
        ("seq", "data.context_length", 255, "length is 255; .* a multiple of mesh.seq = 2"),
    ],
)
def test_what_the_mesh_splits_is_even(axis, key, value, message, config):
    config.mesh[axis] = 2
    validate(config, 2)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        validate(config, 2)


def test_the_widest_window_that_leaves_something_out_is_valid(config):
    config.model.attention.window = 254
    validate(config, 2)


def test_no_clipping_is_valid(config):
    config.optimizer.clip_norm = None
    validate(config, 2)


def test_an_annealed_dial_is_a_parameter(config):
    config.optimizer.anneal_steps = 1000
    config.model.attention.key_norm_weight = 0.0
    validate(config, 2)
    attention = model_config(config, 300).attention
    assert (attention.key_norm_weight, attention.learn_key_norm_weight) == (0.0, True)
    config.model.attention.learn_key_norm_weight = True
    with pytest.raises(ValueError, match=r"learn_key_norm_weight False, but they are .* True"):
        validate(config, 2)


def test_runs_from_before_there_was_annealing_have_a_model(config):
    del config.optimizer.anneal_steps
    assert not model_config(config, 300).attention.learn_key_norm_weight


def test_an_ensemble_starts_from_its_seeds(config):
    config.train.init_from = "runs/other"
    validate(config, 2)
    with pytest.raises(ValueError, match=r"init_from is 'runs/other'; an ensemble draws"):
        validate(config, 2, keeps_best=False)


def test_json(config):
    config.data.train_files = ("a.txt", "b.txt")
    config.optimizer.clip_norm = None
    assert from_json(to_json(config)).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="must be a JSON object, not list"):
        from_json("[]")


def test_differences(config):
    other = base.get_config()
    other.model.attention.gamma = 0.5
    other.train.steps = 7
    assert differences(config.to_dict(), other.to_dict()) == [
        "model.attention.gamma: None -> 0.5",
        "train.steps: 1000 -> 7",
    ]
    assert differences({"a": 1}, {"b": {"c": 2}}) == ["a: 1 -> absent", "b.c: absent -> 2"]

from pathlib import Path

import pytest

from experiments import config_files
from rbf_jax.training.config import differences, validate

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = [
    "smoke.py",
    "demo.py:rbf",
    "demo.py:dot",
    "stories_rbf.py",
    "stories_dot.py",
    "stories_gpt2.py",
    "convert.py",
]


def read(name):
    return config_files.read_config(str(CONFIGS / name))


def test_every_file_is_tested():
    files = {path.name for path in CONFIGS.glob("*.py")}
    assert files - {"__init__.py", "base.py", "twins.py"} == {name.split(":")[0] for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_configurations_are_valid(name):
    validate(read(name), 1)


@pytest.mark.parametrize("name", RUNS)
def test_files_open_with_command_hardware_time_and_result(name):
    text = (CONFIGS / name.split(":")[0]).read_text().partition('"""')[2].partition('"""')[0]
    assert f"--config=configs/{name}" in text
    assert "Hardware:" in text
    for heading in ("Time:", "Expect:"):
        assert heading in text or "stories_rbf.py says" in text


@pytest.mark.parametrize(
    ("rbf", "dot"), [("demo.py:rbf", "demo.py:dot"), ("stories_rbf.py", "stories_dot.py")]
)
def test_twins_differ_in_attention_positions_and_register_only(rbf, dot):
    assert differences(read(rbf).to_dict(), read(dot).to_dict()) == [
        "model.attention.kind: 'rbf' -> 'dot'",
        "model.positions: 'susie' -> 'rope'",
        "model.register_init: 'zero' -> 'normal'",
    ]


def test_stories_have_the_sizes_of_the_original_experiment():
    config = read("stories_rbf.py")
    model, optimizer, train = config.model, config.optimizer, config.train
    assert (model.num_layers, model.d_model, model.num_heads) == (4, 256, 4)
    assert (config.data.context_length, train.batch_size, train.steps) == (256, 64, 33_000)
    assert (optimizer.learning_rate, optimizer.final_learning_rate) == (1e-3, 1e-5)
    assert optimizer.warmup_steps == 1000
    assert (config.data.source, config.data.layout) == ("tinystories", "padded")

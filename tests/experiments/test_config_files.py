import re
from pathlib import Path

import pytest

from configs import base
from experiments import config_files

SMOKE = "--config=configs/smoke.py"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])


def parse(*arguments):
    return config_files.parse(["train", *arguments])


@pytest.mark.parametrize(
    ("arguments", "run"),
    [
        ([SMOKE], "runs/smoke"),
        (["--config", "configs/smoke.py"], "runs/smoke"),
        (["--config=configs/demo.py:dot"], "runs/demo_dot"),
        ([SMOKE, "--run=elsewhere/x"], "elsewhere/x"),
    ],
)
def test_run_folder(arguments, run):
    assert parse(*arguments)[1] == Path(run)


def test_overrides_take_their_types():
    config, _ = parse(
        SMOKE,
        "--config.optimizer.learning_rate=1",
        "--config.optimizer.clip_norm=None",
        "--config.model.num_kv_heads=2",
        "--config.model.attention.window=8",
        "--config.model.attention.implementation=xla",
        "--config.model.attention.gamma=0.5",
        "--config.model.remat",
        "--noconfig.logging.tensorboard",
        "--config.train.steps",
        "7",
    )
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.optimizer.clip_norm is None
    assert (config.model.num_kv_heads, config.model.attention.window) == (2, 8)
    assert (config.model.attention.implementation, config.model.attention.gamma) == ("xla", 0.5)
    assert config.model.remat
    assert not config.logging.tensorboard
    assert config.train.steps == 7


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["--config.data.train_files=/texts/*.txt.xz"], ("/texts/*.txt.xz",)),
        (["--config.data.train_files=a.txt", "--config.data.train_files=b.gz"], ("a.txt", "b.gz")),
        (["--config.data.train_files=('a.txt', 'b c.gz')"], ("a.txt", "b c.gz")),
    ],
)
def test_files(arguments, files):
    assert parse(SMOKE, *arguments)[0].data.train_files == files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config=FILE.py is missing"),
        (["--config=configs/smok.py"], "configs/smok.py does not exist; did you mean configs/smo"),
        (["--config=configs/demo.py:rfb"], "the variant is 'rfb'; it must be 'rbf' or 'dot'"),
        (["--config=configs/smoke.py:x"], "get_config() takes 0 positional arguments"),
        ([SMOKE, "--config.model.num_layer=3"], "no key model.num_layer; did you mean model.num_l"),
        ([SMOKE, "--config.num_layers=3"], "no key num_layers; did you mean model.num_layers?"),
        ([SMOKE, "--config.optimizer.lr=3"], "did you mean optimizer.learning_rate?"),
        ([SMOKE, "--config.model=3"], "there is no key model;"),
        (
            [SMOKE, "--config.train.steps=many"],
            "--config.train.steps=many: it must be an int, not 'many'",
        ),
        (
            [SMOKE, "--config.train.steps=1.5"],
            "--config.train.steps=1.5: it must be an int, not '1.5'",
        ),
        ([SMOKE, "--config.optimizer.b1=low"], "b1=low: it must be a float, not 'low'"),
        ([SMOKE, "--config.train.steps=None"], "train.steps is None, but must be an int"),
        ([SMOKE, "--config.data.source=None"], "data.source is None, but must be a string"),
        ([SMOKE, "--config.data.train_files=3"], "(3,), but must be a tuple of strings"),
        ([SMOKE, "--config.model.remat=maybe"], "remat=maybe: it must be true or false, not 'm"),
        ([SMOKE, "--config.train.steps"], "Missing value for flag --config.train.steps"),
        ([SMOKE, "--rnu=x"], "flag 'rnu'. Did you mean: run ?"),
        ([SMOKE, "--steps=3"], "flag 'steps'; did you mean --config.train.steps?"),
        ([SMOKE, "left over"], "argument 'left over' is not understood"),
    ],
)
def test_errors_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("config.model.num_layer = 2", "no key model.num_layer; did you mean model.num_layers?"),
        ("config.model.num_layers = 'two'", "line 4: Could not override field 'num_layers'"),
        ("config.model.num_layers = None", "model.num_layers is None, but must be an int"),
        ("config.model.num_layers = True", "model.num_layers is True, but must be an int"),
        ("config.data.train_files = (1,)", "(1,), but must be a tuple of strings"),
        ("config.modle.num_layers = 2", "line 4: 'modle' Did you mean \"model\" instead"),
        ("del config.train.steps", "train.steps is missing"),
        ("return 3", "returned int, not a ConfigDict"),
    ],
)
def test_errors_in_a_file_are_one_line(body, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        f"from configs import base\ndef get_config():\n    config = base.get_config()\n    {body}\n"
        "    return config\n"
    )
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        parse(f"--config={path}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_errors_in_a_file_keep_their_traceback(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        parse(f"--config={tmp_path / 'mine.py'}")


def test_a_checked_configuration_has_the_types_of_base():
    config = base.get_config().to_dict()
    config["train"]["steps"] = 5
    config["optimizer"]["b1"] = 0
    result = config_files.checked(config, "here")
    assert result.train.steps == 5
    assert isinstance(result.optimizer.b1, float)
    with pytest.raises(AttributeError, match="stepz"):
        result.train.stepz = 3

import json

import pytest

from configs import base
from rbf_jax.training.run_folder import RunFolder


@pytest.fixture
def config():
    return base.get_config()


@pytest.fixture
def other():
    config = base.get_config()
    config.seed = 1
    return config


def test_a_claimed_folder_holds_its_configuration(tmp_path, config):
    folder = RunFolder(tmp_path / "new" / "run")
    with folder.claimed(config):
        assert folder.read_config().to_dict() == config.to_dict()
    with folder.claimed(config):
        assert folder.read_summary() is None


def test_a_folder_is_one_processs(tmp_path, config):
    with (
        RunFolder(tmp_path).claimed(config),
        pytest.raises(ValueError, match="another process is training in"),
        RunFolder(tmp_path).claimed(config),
    ):
        pass
    with RunFolder(tmp_path).claimed(config):
        pass


def test_nothing_trained_yet(tmp_path, config, other):
    folder = RunFolder(tmp_path)
    with folder.claimed(config):
        folder.tokenizer.write_text("of the old configuration")
    with folder.claimed(other):
        assert folder.read_config().seed == 1
        assert not folder.tokenizer.exists()


def test_another_configuration_is_refused(tmp_path, config, other):
    folder = RunFolder(tmp_path)
    with folder.claimed(config):
        folder.metrics.touch()
    with (
        pytest.raises(ValueError, match=r"another configuration; .* Different: seed: 0 -> 1"),
        folder.claimed(other),
    ):
        pass
    assert folder.read_config().seed == 0


@pytest.mark.parametrize(
    ("origin_sink", "registers", "sink", "number"),
    [(False, 1, "register", None), (False, 0, "none", None), (True, 1, "origin", 1)],
)
def test_a_folder_of_before_there_were_sinks_goes_on(
    origin_sink, registers, sink, number, tmp_path, config
):
    """Its configuration equals today's of the same model, and is written so."""
    config.model.attention.sink, config.model.num_registers = sink, number
    old = config.to_dict()
    del old["model"]["attention"]["sink"]
    old["model"]["attention"]["origin_sink"] = origin_sink
    old["model"]["num_registers"] = registers
    folder = RunFolder(tmp_path)
    folder.config.write_text(json.dumps(old))
    folder.metrics.touch()
    with folder.claimed(config):
        folder.require_config(config)
        assert folder.read_config().to_dict() == config.to_dict()
    config.model.attention.sink, config.model.num_registers = "learned", None
    with pytest.raises(ValueError, match=rf"sink: '{sink}' -> 'learned'"), folder.claimed(config):
        pass


def test_somebody_elses_folder_is_refused(tmp_path, config):
    (tmp_path / "precious.txt").touch()
    with (
        pytest.raises(ValueError, match="is not empty and holds no run"),
        RunFolder(tmp_path).claimed(config),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    with (
        pytest.raises(ValueError, match=r"precious\.txt is not a folder"),
        RunFolder(tmp_path / "precious.txt").claimed(config),
    ):
        pass


def test_unreadable_configuration(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json is in it"):
        RunFolder(tmp_path).read_config()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        RunFolder(tmp_path).read_config()


def test_a_folder_that_cannot_be_made(tmp_path, config):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"folder .*file/run cannot be made: Not a directory\.$"),
        RunFolder(tmp_path / "file" / "run").claimed(config),
    ):
        pass

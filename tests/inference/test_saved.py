import json
import shutil

import jax
import numpy as np
import pytest

from rbf_jax.data.tokenizer import ByteTokenizer
from rbf_jax.inference import load_model, save_model
from tests.harness.models import small_model

TOKENS = np.arange(12, dtype=np.int32)[None]


@pytest.fixture
def saved(tmp_path):
    model, variables = small_model(
        {"window": 3, "learn_gamma": True, "qk_norm": True}, positions="susie", vocab_size=257
    )
    paths = save_model(tmp_path / "model", model, variables, ByteTokenizer(), {"step": 3})
    return tmp_path / "model", model, variables, paths


def test_the_same_logits(saved):
    folder, model, variables, paths = saved
    loaded = load_model(folder)
    assert loaded.model.config == model.config
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    a, b = (
        jax.jit(m.apply)(v, TOKENS)
        for m, v in ((model, variables), (loaded.model, loaded.variables))
    )
    np.testing.assert_array_equal(a, b)
    assert loaded.tokenizer.encode("é") == ByteTokenizer().encode("é")
    assert json.loads((folder / "config.json").read_text())["about"] == {"step": 3}
    assert sorted(folder.iterdir()) == sorted(paths)


def test_a_model_saved_before_there_were_sinks(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "old")
    content = json.loads((folder / "config.json").read_text())
    del content["model"]["attention"]["sink"]
    content["model"]["attention"]["origin_sink"] = False
    (folder / "config.json").write_text(json.dumps(content))
    assert load_model(folder).model.config == saved[1].config


def test_parameters_have_plain_names(saved):
    from safetensors.numpy import load_file

    arrays = load_file(saved[0] / "model.safetensors")
    assert arrays["block_1.attention.query.kernel"].shape == (16, 4, 4)
    assert {x.dtype.name for x in arrays.values()} == {"float32"}


def _spoil(folder, name, old, new):
    path = folder / name
    path.write_bytes(path.read_bytes().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no exported model: no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors does not exist"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "is not the configuration of a model"),
        (lambda f: (f / "config.json").write_text("[]"), "is not the configuration of a model"),
        (lambda f: _spoil(f, "config.json", b'"version": 1', b'"version": 2'), "version 1"),
        (lambda f: _spoil(f, "config.json", b'"remat"', b'"remake"'), "remake"),
        (lambda f: _spoil(f, "config.json", b'"vocab_size": 257', b'"vocab_size": 258'), "embed"),
    ],
)
def test_what_is_damaged_is_an_error(saved, spoil, message):
    spoil(saved[0])
    with pytest.raises(ValueError, match=message):
        load_model(saved[0])

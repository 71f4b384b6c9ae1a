"""What is kept of several seeds survives the disk, and knows what it was made with."""

import copy
import dataclasses
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.figures import scales
from experiments.figure_runs import Experiment
from rbf_jax.analysis import records
from rbf_jax.analysis.variants import Variant, name_of
from tests.harness.synthetic_records import make_record

CONFIG = scales.get_config("smoke").to_dict()


def test_written_and_read_it_is_the_same_to_its_digits(tmp_path):
    record = make_record("RBF", CONFIG, lengths=(32, 64), diverged=(2,))
    path = tmp_path / f"RBF{records.SUFFIX}"
    records.write_record(record, path)
    found = records.read_record(path)
    assert (found.name, found.seeds, found.tokens) == (record.name, record.seeds, record.tokens)
    assert found.summary == record.summary
    for section in ("train", "inspected", "valid", "lengths", "inside"):
        own, read = getattr(record, section), getattr(found, section)
        assert own.keys() == read.keys()
        for key in own:
            rtol = 1e-2 if key == "attention_map" else 1e-4
            np.testing.assert_allclose(read[key], own[key], rtol=rtol)
    assert found.train["step"].dtype.kind == "i"
    assert np.isnan(found.valid["loss"][-1, 2])


@pytest.mark.parametrize("content", [b"", b"not xz", lzma.compress(b"{}\n"), lzma.compress(b"")])
def test_what_is_no_record(tmp_path, content):
    path = tmp_path / f"x{records.SUFFIX}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.jsonl.xz is no record"):
        records.read_record(path)


def test_identity_is_of_what_is_trained():
    def changed(section, key, value):
        config = copy.deepcopy(CONFIG)
        config[section][key] = value
        return records.identity(config, CONFIG)

    own = records.identity(CONFIG, CONFIG)
    assert changed("data", "cache_dir", "elsewhere") == own
    assert changed("mesh", "data", 4) == own
    assert records.identity({**CONFIG, "seed": 3}, CONFIG) == own
    assert changed("data", "context_length", 64) != own
    assert changed("model", "num_registers", 4) != own
    here, there = (changed("data", "train_files", [f"{d}/a.txt"]) for d in ("here", "there"))
    assert here == there != own


def test_a_key_that_came_later_has_its_default():
    older = copy.deepcopy(CONFIG)
    del older["model"]["attention"]["normalize"]
    assert records.identity(older, CONFIG) == records.identity(CONFIG, CONFIG)
    other = copy.deepcopy(CONFIG)
    other["model"]["attention"]["normalize"] = False
    assert records.identity(older, CONFIG) != records.identity(other, CONFIG)


KEPT = Path(__file__).parents[2] / "docs" / "measurements" / "experiments" / "paper"


def test_a_kept_record_has_the_keys_of_today():
    path = KEPT / f"origin_sink=True,num_registers=0{records.SUFFIX}"
    with lzma.open(path, "rt") as text:
        stored = json.loads(text.readline())["config"]["model"]
    assert (stored["num_registers"], stored["attention"]["origin_sink"]) == (0, True)
    model = records.read_record(path).config["model"]
    assert (model["num_registers"], model["attention"]["sink"]) == (None, "origin")
    assert "origin_sink" not in model["attention"]
    assert records.read_config_of_record(path) == records.read_record(path).config


@pytest.mark.parametrize(
    ("changes", "file"),
    [
        ({}, "base"),
        ({"model.attention.sink": "none"}, "num_registers=0"),
        ({"model.attention.sink": "origin"}, "origin_sink=True,num_registers=0"),
        ({"model.attention.sink": "origin", "model.num_registers": 1}, "origin_sink=True"),
        ({"model.num_registers": 4}, "num_registers=4"),
    ],
)
def test_kept_records_are_found_by_their_configuration(changes, file, tmp_path):
    """Their names are those of keys that are no more."""
    variant = Variant(name_of(changes), changes)
    experiment = Experiment(scales.get_config("paper"), (0, 1, 2, 3), tmp_path, KEPT)
    found = experiment.find_kept(variant)
    assert found.name == variant.name
    expected = records.read_record(KEPT / f"{file}{records.SUFFIX}")
    np.testing.assert_array_equal(found.train["loss"], expected.train["loss"])
    # And by the whole configuration, where the data is the same.
    same_data = scales.get_config("paper")
    same_data.data = ConfigDict(expected.config["data"])
    whole = dataclasses.replace(experiment, base=same_data).find(variant)
    np.testing.assert_array_equal(whole.train["loss"], expected.train["loss"])


def test_what_no_record_holds_is_not_found(tmp_path):
    learned = Variant("sink=learned", {"model.attention.sink": "learned"})
    experiment = Experiment(scales.get_config("paper"), (0, 1, 2, 3), tmp_path, KEPT)
    assert experiment.find_kept(learned) is None
    assert experiment.find(learned) is None

"""What is kept of several seeds survives the disk, and knows what it was made with."""

import copy
import lzma

import numpy as np
import pytest

from configs.figures import scales
from rbf_jax.analysis import records
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
    del older["model"]["attention"]["origin_sink"]
    assert records.identity(older, CONFIG) == records.identity(CONFIG, CONFIG)
    with_sink = copy.deepcopy(CONFIG)
    with_sink["model"]["attention"]["origin_sink"] = True
    assert records.identity(older, CONFIG) != records.identity(with_sink, CONFIG)

"""On dummy data, without a network and without TensorFlow."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rbf_jax.data import sources, tfds_source
from tests.harness.corpus import DOCUMENTS, ROOT, VALID, config, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of files as TinyStories publishes them, `manual`, and one for tfds, `tfds`."""
    folder = tmp_path_factory.mktemp("tfds")
    (folder / "manual").mkdir()
    for version, last in (("TinyStoriesV2-GPT4", "four"), ("TinyStories", "three")):
        write(folder / "manual" / f"{version}-train.txt", [*DOCUMENTS, last])
        write(folder / "manual" / f"{version}-valid.txt", VALID)
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise RuntimeError("a test reached for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.mark.parametrize(("version", "last"), [("", "four"), ("original", "three")])
def test_tinystories_from_a_manual_folder(folder, version, last):
    source = tfds_source.tinystories(version, str(folder / "tfds"), str(folder / "manual"))
    assert list(source.documents("train")) == [*DOCUMENTS, last]
    assert list(source.documents("valid")) == VALID
    assert list((folder / "tfds").rglob("*.array_record*"))
    # What has been prepared is found again without the files.
    again = tfds_source.tinystories(version, str(folder / "tfds"), "")
    assert again.fingerprint == source.fingerprint


@pytest.mark.parametrize("others", [False, True], ids=["no folder", "another data set's files"])
def test_tinystories_downloads_what_is_published(others, folder, tmp_path, monkeypatch):
    if others:
        # The folder that all data sets share, by default; one of the files is not enough.
        manual = tmp_path / "downloads" / "manual"
        manual.mkdir(parents=True)
        write(manual / "TinyStoriesV2-GPT4-valid.txt", ["another"])
    asked = {}

    def download(_, urls):
        asked.update(urls)
        names = {split: url.rpartition("/")[2] for split, url in urls.items()}
        return {split: folder / "manual" / name for split, name in names.items()}

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    source = tfds_source.tinystories("gpt4", str(tmp_path), "")
    assert list(source.documents("valid")) == VALID
    home = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
    assert asked == {
        "train": f"{home}/TinyStoriesV2-GPT4-train.txt",
        "validation": f"{home}/TinyStoriesV2-GPT4-valid.txt",
    }


def test_no_tensorflow(folder, tmp_path):
    program = (
        "import sys; from types import SimpleNamespace as Config;"
        "from rbf_jax.data import load_data;"
        "tmp, manual = sys.argv[1:];"
        "data = load_data(Config(source='tinystories', train_files=(), valid_files=(), "
        "tfds_dir=tmp, manual_dir=manual, tokenizer='bytes', context_length=32, layout='packed', "
        "num_workers=0, cache_dir=tmp + '/cache', vocab_size=4096, separator='<|endoftext|>'), "
        "seed=0);"
        "next(iter(data.batches('train', 2, shuffle=True, repeat=True)));"
        "sys.exit(str({'tensorflow', 'torch'} & set(sys.modules)) if {'tensorflow', 'torch'} & "
        "set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(folder / "manual")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


class DummyTexts(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    SPLITS = ("train",)
    TEXTS = tuple(text.encode() for text in DOCUMENTS)

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int32})
        return self.dataset_info_from_configs(features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in self.SPLITS}

    def _generate_examples(self):
        for number, text in enumerate(self.TEXTS):
            yield number, {"text": text, "number": number}


class DummyBrokenTexts(DummyTexts):
    TEXTS = (b"fine", b"\xff", b"fine")


class DummyTestOnly(DummyTexts):
    SPLITS = ("test",)


class DummyPictures(DummyTexts):
    def _info(self):
        features = tfds.features.FeaturesDict({"picture": np.uint8, "text": np.int32})
        return self.dataset_info_from_configs(features=features)


def test_any_data_set_with_text(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, "_BATCH", 50)
    source = tfds_source.named("dummy_texts", str(tmp_path), "")
    # No validation split: the last 5 % of the training texts are held out.
    assert list(source.documents("train")) == DOCUMENTS[:114]
    assert list(source.documents("valid")) == DOCUMENTS[114:]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dummy_text", r"'tfds:dummy_text'; .* must come the name of .* such as dummy_texts"),
        ("dummy_texts/other", r"data.source is 'tfds:dummy_texts/other': "),
        ("dummy_pictures", r"no text feature 'text'; its features: \['picture', 'text'\]"),
        ("dummy_test_only", r"no split 'train'; its splits are \['test'\]"),
        ("", r"data.source is 'tfds:'"),
    ],
)
def test_wrong_data_sets(tmp_path, name, message):
    with pytest.raises(ValueError, match=message) as error:
        tfds_source.named(name, str(tmp_path), "")
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8(tmp_path):
    source = tfds_source.named("dummy_broken_texts", str(tmp_path), "")
    with pytest.raises(ValueError, match=r"dummy_broken_texts/1.0.0: text 1 is not UTF-8"):
        list(source.documents("train"))


def test_missing_packages_are_named(folder, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "array_record" else find_spec(name),
    )
    changes = {"source": "tinystories", "train_files": (), "valid_files": ()}
    with pytest.raises(ImportError, match=r"'tinystories', but array_record is not .*\[tfds\]"):
        sources.open_source(config(folder, **changes))


def test_wrong_versions_and_folders(tmp_path):
    with pytest.raises(ValueError, match=r"'tinystories/gpt5'; .* one of gpt4, original"):
        tfds_source.tinystories("gpt5", "", "")
    with pytest.raises(ValueError, match=r"must hold TinyStoriesV2-GPT4-train.txt"):
        tfds_source.tinystories("gpt4", "", str(tmp_path))


def test_prepared_in_another_format(tmp_path, monkeypatch):
    source = tfds_source.named("dummy_texts", str(tmp_path), "")
    monkeypatch.setattr(tfds_source, "_FORMAT", "parquet")
    with pytest.raises(ValueError, match="is in the format array_record; it must be parquet"):
        tfds_source.TfdsSource(source._builder)

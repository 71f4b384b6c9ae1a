import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbf_jax.data import tokenizer
from tests.harness.corpus import DOCUMENTS, ROOT


@pytest.fixture(scope="module")
def bpe() -> tokenizer.SubwordTokenizer:
    return tokenizer.train_bpe(DOCUMENTS, 300)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def any_tokenizer(request, bpe):
    return bpe if request.param == "bpe" else tokenizer.ByteTokenizer()


@settings(max_examples=100)
@given(text=st.text() | st.sampled_from(["a<|endoftext|>b", "\r\n \t x ", "ﬁ Å e\u0301"]))
def test_decoding_gives_the_text_back(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert any_tokenizer.eos_id not in ids
    assert all(0 <= i < any_tokenizer.vocab_size for i in ids)
    assert any_tokenizer.decode([*ids, any_tokenizer.eos_id]) == text
    np.testing.assert_array_equal(any_tokenizer.encode_batch(["x", text])[1], ids)


def test_decoding_takes_arrays_and_broken_utf8(any_tokenizer):
    snow = any_tokenizer.encode("☃")
    assert any_tokenizer.decode(np.array(snow, np.int32)) == "☃"
    byte = tokenizer.ByteTokenizer()
    assert byte.decode(byte.encode("☃")[:2]) == "�"


@pytest.mark.parametrize("as_folder", [False, True])
def test_what_is_kept_is_read_back(any_tokenizer, tmp_path, as_folder):
    path = tmp_path / tokenizer.FILE_NAME
    any_tokenizer.save(path)
    again = tokenizer.load_tokenizer(tmp_path if as_folder else str(path))
    assert type(again) is type(any_tokenizer)
    assert again.fingerprint == any_tokenizer.fingerprint
    assert again.vocab_size == any_tokenizer.vocab_size
    text = "<|endoftext|> aé☃"
    assert again.encode(text) == any_tokenizer.encode(text)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_bpe_is_the_same_in_every_process(bpe):
    program = (
        "from rbf_jax.data import tokenizer; from tests.harness.corpus import DOCUMENTS;"
        "print(tokenizer.train_bpe(DOCUMENTS, 300).fingerprint)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == bpe.fingerprint


def test_bpe_shortens_and_has_the_size_asked_for(bpe):
    assert bpe.vocab_size == 300
    text = DOCUMENTS[111]
    assert len(bpe.encode(text)) < len(text.encode()) / 2


def test_too_little_text_for_a_vocabulary_is_logged(caplog):
    trained = tokenizer.train_bpe(["ab ab"], 1000)
    assert trained.vocab_size < 1000
    assert "vocab_size asks for 1000" in caplog.text


def test_too_small_a_vocabulary():
    with pytest.raises(ValueError, match=r"vocab_size is 256; .* at least 257"):
        tokenizer.train_bpe(DOCUMENTS, 256)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a tokenizer.json"),
        (None, "does not exist"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, content, message):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"some.json {message}"):
        tokenizer.load_tokenizer(path)


def test_a_tokenizer_without_an_end(bpe, tmp_path):
    path = tmp_path / "endless.json"
    bpe.save(path)
    content = json.loads(path.read_text())
    content["added_tokens"] = []
    content["model"]["vocab"] = {
        ("other" if token == "<|endoftext|>" else token): number
        for token, number in content["model"]["vocab"].items()
    }
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"endless.json has no end-of-document token"):
        tokenizer.load_tokenizer(path)

import logging
import pickle
import subprocess
import sys

import numpy as np
import pytest

from rbf_jax.data import tokens
from rbf_jax.data.tokenizer import ByteTokenizer
from tests.harness.corpus import DOCUMENTS, ROOT


def build(folder, documents=DOCUMENTS, key="key"):
    return tokens.cached_tokens(folder, "name", (key,), lambda: iter(documents), ByteTokenizer())


def unreachable():
    raise RuntimeError("the documents were read again")


def assert_whole(found):
    assert len(found.offsets) == len(DOCUMENTS) + 1
    for number, text in enumerate(DOCUMENTS):
        ids = found.tokens[found.offsets[number] : found.offsets[number + 1]]
        assert ids[-1] == 256
        assert bytes(ids[:-1].astype(np.uint8)).decode() == text
    assert found.num_bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert found.num_targets == found.num_bytes


def test_every_document_with_its_end(tmp_path):
    found = build(tmp_path)
    assert_whole(found)
    assert found.dtype == "uint16"
    assert isinstance(found.tokens, np.memmap)


def test_the_second_time_nothing_is_read(tmp_path):
    build(tmp_path)
    again = tokens.cached_tokens(tmp_path, "name", ("key",), unreachable, ByteTokenizer())
    assert_whole(again)


def test_another_key_is_another_cache(tmp_path):
    build(tmp_path)
    other = build(tmp_path, ["other"], key="other")
    assert other.num_bytes == 5
    assert_whole(build(tmp_path))


def test_many_batches_are_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 50)
    assert_whole(build(tmp_path))


@pytest.mark.parametrize("kind", ["tokens", "offsets", "json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_cache_is_made_anew(tmp_path, caplog, kind, damage):
    build(tmp_path)
    (path,) = tmp_path.glob(f"*.{kind}")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert_whole(build(tmp_path))
    if (kind, damage) != ("json", "remove"):  # Written last: without it nothing was begun.
        assert "is damaged and made anew" in caplog.text
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failure_leaves_nothing_behind(tmp_path):
    def failing():
        yield "some text"
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        tokens.cached_tokens(tmp_path, "name", ("key",), failing, ByteTokenizer())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("documents", [[], [""]])
def test_no_text(tmp_path, documents):
    with pytest.raises(ValueError, match="name: there is no text"):
        build(tmp_path, documents)


def test_pickled_as_a_path(tmp_path):
    found = build(tmp_path, ["x" * 100_000])
    pickled = pickle.dumps(found)
    assert len(pickled) < 2000
    np.testing.assert_array_equal(pickle.loads(pickled).tokens, found.tokens)


def test_processes_that_build_the_same_at_once(tmp_path):
    program = (
        "import sys; from pathlib import Path; from tests.data.test_tokens import *;"
        "sys.stdin.readline(); assert_whole(build(Path(sys.argv[1])))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in running:
        process.communicate(b"go\n")
    assert [process.returncode for process in running] == [0, 0]
    assert_whole(build(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3

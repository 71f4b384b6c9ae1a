import types

import numpy as np
import pytest

from rbf_jax.analysis import models
from rbf_jax.analysis.runs import read_run
from tests.analysis.synthetic import write_run
from tests.nn.models import LENGTH, small_model

TEXT = "old mill"


class Letters:
    """One token a letter, from 1 for 'a'; a space is 0."""

    def __init__(self, shift):
        self.alphabet = " abcdefghijklmno"
        self.shift = shift

    def encode(self, text):
        return [self.alphabet.index(letter) + self.shift for letter in text]

    def decode(self, ids):
        return "".join(self.alphabet[i - self.shift] for i in ids)


class Rows:
    """A validation split whose first row is a short document and a text, and the others padding."""

    def __init__(self, tokenizer, text):
        self.tokenizer = tokenizer
        self.text = text

    def batches(self, split, batch_size, *, shuffle, repeat):
        assert (split, shuffle, repeat) == ("valid", False, False)
        batch = {
            key: np.zeros((batch_size, LENGTH), np.int32)
            for key in ("inputs", "positions", "segment_ids")
        }
        text = self.tokenizer.encode(self.text)
        batch["inputs"][0, 2 : 2 + len(text)] = text
        batch["positions"][0] = [0, 1, *range(LENGTH - 2)]
        batch["segment_ids"][0] = [1, 1, *[2] * len(text), 0, 0]
        return [batch]


TEXT_TOKENS = 2 + len(TEXT)


@pytest.fixture
def loaded(monkeypatch):
    """What `load_run` returns, by the run folder's name; an error is raised."""
    answers = {}

    def load_run(path):
        if isinstance(answers[path.name], Exception):
            raise answers[path.name]
        return answers[path.name]

    monkeypatch.setattr(models, "load_run", load_run)
    return answers


def answer(shift=0, text=TEXT):
    model, variables = small_model()
    return types.SimpleNamespace(
        model=model, variables=variables, data=Rows(Letters(shift), text), step=7
    )


def test_examine(tmp_path, loaded):
    loaded["a"], loaded["b"] = answer(), answer()
    loaded["c"] = ValueError("no checkpoint yet")
    runs = [read_run(write_run(tmp_path / name)) for name in "cab"]
    reason, a, b = models.examine(runs, num_tokens=5, num_rows=2)
    assert reason == "no checkpoint yet"
    assert a.step == 7
    assert a.tokens == ["o", "l", "d", "␣", "m"]
    assert a.inside.attention_weights.shape == (2, 1, 4, 5, 2 + 5)
    np.testing.assert_allclose(a.inside.attention_weights.sum(-1), 1.0, rtol=1e-5)
    assert a.text_key_norms.shape == (2, TEXT_TOKENS * 2)
    assert a.register_key_norms.shape == (2, 2 * 2)
    # The row's own second document starts at position 0 too, and sees only itself.
    row = b.text_key_norms.reshape(2, TEXT_TOKENS, 2)[:, 2:7]
    np.testing.assert_allclose(row, a.inside.text_key_norms[:, 0], rtol=1e-5)


def test_other_tokenizers_read_the_same_text(tmp_path, loaded):
    loaded["a"], loaded["b"] = answer(), answer(shift=1, text="one mail")
    runs = [read_run(write_run(tmp_path / name)) for name in "ab"]
    a, b = models.examine(runs, num_tokens=100, num_rows=2)
    assert "".join(a.tokens) == "".join(b.tokens) == "old␣mill"


def test_programming_errors_are_not_swallowed(tmp_path, loaded):
    loaded["a"] = TypeError("wrong")
    with pytest.raises(TypeError, match="wrong"):
        models.examine([read_run(write_run(tmp_path / "a"))])


def test_visible():
    assert models.visible(" a\tb\n") == "␣a⇥b↵"

import functools
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rbf_jax.analysis import models
from rbf_jax.analysis.diagnostics import diagnose
from rbf_jax.analysis.runs import read_run
from tests.harness.models import LENGTH, small_model
from tests.harness.synthetic import write_run

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


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"num_registers": 0, "attention": {"kind": "dot", "window": 3, "sink": "none"}}, 3),
        ({"num_registers": 4, "attention": {"sink": "origin"}}, 100),
    ],
)
def test_inspect_run(changes, window, tmp_path, monkeypatch):
    model, variables = small_model(**changes, num_layers=1)
    data = Rows(Letters(0), TEXT)
    run = types.SimpleNamespace(
        path=tmp_path,
        config=ConfigDict({"seed": 3}),
        model=model,
        variables=variables,
        data=data,
        step=7,
    )
    asked = []
    monkeypatch.setattr(models, "load_run", lambda *arguments: asked.append(arguments) or run)
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "split": "valid", "loss": 1.5}\n')
    seen = models.inspect_run(Path("x"), checkpoint="best", num_rows=3, num_tokens=5)
    assert asked == [(Path("x"), "best")]
    assert (seen.config, seen.model) == ({"seed": 3}, model.config)
    assert (seen.step, seen.valid_loss) == (7, 1.5)
    # The other two rows are padding.
    assert (seen.rows, seen.text_tokens) == (1, TEXT_TOKENS)
    (batch,) = data.batches("valid", 3, shuffle=False, repeat=False)
    expected = jax.jit(functools.partial(diagnose, model))(variables["params"], batch)
    assert seen.numbers.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(seen.numbers[name], values, err_msg=name)

    # By hand: each token sees those before it in its document, registers and sink.
    others = changes["num_registers"] + (changes["attention"].get("sink") == "origin")
    seen_text = [min(i, window) + 1 for i in (0, 1, *range(len(TEXT)))]
    entropy = np.mean([np.log(n + others) for n in seen_text])
    reach = np.mean([sum(range(n)) / (n + others) for n in seen_text])
    mass = np.mean([n / (n + others) for n in seen_text])
    assert seen.uniform == pytest.approx({"entropy": entropy, "distance": reach / mass})

    assert seen.document.tokens == ["o", "l", "d", "␣", "m"]
    assert seen.document.inside.attention_weights.shape[1:] == (
        1,
        4,
        5,
        changes["num_registers"] + 5,
    )


def test_attention_that_weighs_all_alike_is_uniform(tmp_path, monkeypatch):
    model, variables = small_model(
        num_registers=1, attention={"sink": "origin"}, positions="none", num_layers=1
    )
    variables = jax.tree.map(np.zeros_like, variables)  # All logits are 0.
    run = types.SimpleNamespace(
        path=tmp_path,
        config=ConfigDict(),
        model=model,
        variables=variables,
        data=Rows(Letters(0), TEXT),
        step=7,
    )
    monkeypatch.setattr(models, "load_run", lambda *_: run)
    seen = models.inspect_run(tmp_path, num_rows=1)
    assert seen.valid_loss is None
    for name in ("entropy", "distance"):
        np.testing.assert_allclose(seen.numbers[name], seen.uniform[name], rtol=1e-5)

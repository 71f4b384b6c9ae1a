import itertools

import jax
import numpy as np
import pytest

from rbf_jax.inference import Sampling, complete, generate
from rbf_jax.inference import generation as module
from tests.harness.models import LENGTH, VOCAB, small_model

PROMPTS = [[3, 1, 4, 1], [5], [9, 2]]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def small():
    return small_model({"window": 5}, positions="rope", num_layers=1)


def test_greedy_takes_the_likeliest_token_of_the_whole_row_each_time(small):
    """Without a cache, one row at a time."""
    model, variables = small
    new = 5
    got = complete(model, variables, PROMPTS, max_new_tokens=new, sampling=GREEDY)
    logits = jax.jit(lambda tokens: model.apply(variables, tokens))
    for prompt, text in zip(PROMPTS, got):
        row = list(prompt)
        for _ in range(new):  # What follows is of no account: one program for all lengths.
            padded = np.zeros((1, 12), np.int32)
            padded[0, : len(row)] = row
            row.append(int(np.argmax(logits(padded)[0, len(row) - 1])))
        assert text == row[len(prompt) :]


def test_the_seed_says_what_is_drawn(small):
    model, variables = small

    def draw(prompts, seed):
        return complete(model, variables, prompts, max_new_tokens=9, seed=seed)

    texts = draw(PROMPTS, 0)
    assert texts == draw(PROMPTS, 0)
    assert texts != draw(PROMPTS, 1)
    assert draw([PROMPTS[0]], 0)[0] == texts[0]  # whatever the others are
    same = draw([[7]] * 3, 0)
    assert same[0] != same[1] != same[2] != same[0]
    nothing = jax.tree.map(np.zeros_like, variables)  # all tokens are equally likely, always
    (text,) = complete(model, nothing, [[7]], max_new_tokens=9)
    assert len(set(text)) > 3


def test_texts_end_one_by_one(small):
    """Where their end comes, which is not given; the others go on."""
    model, variables = small
    options = {"max_new_tokens": 9, "sampling": GREEDY}
    texts = complete(model, variables, PROMPTS, **options)
    eos = texts[0][2]
    ended = complete(model, variables, PROMPTS, **options, eos_id=eos)
    assert ended == [list(itertools.takewhile(lambda t: t != eos, text)) for text in texts]
    assert len({len(text) for text in ended}) > 1
    steps = list(generate(model, variables, PROMPTS, **options, eos_id=eos))
    assert len(steps) == max(map(len, ended))
    for text, tokens in zip(ended, zip(*steps)):
        assert list(tokens) == text + [None] * (len(steps) - len(text))


def test_tokens_come_one_by_one(small, monkeypatch):
    model, variables = small
    calls = []
    go_on = module._go_on
    monkeypatch.setattr(module, "_go_on", lambda *args: calls.append(1) or go_on(*args))
    steps = generate(model, variables, PROMPTS, max_new_tokens=4)
    assert calls == []
    for i in range(4):
        next(steps)
        assert len(calls) == min(i + 1, 3)  # one ahead, and none for what nobody asked for
    assert next(steps, None) is None


def test_learned_positions_are_used_to_the_last():
    model, variables = small_model(positions="learned", num_layers=1)
    prompt = [1] * 5
    options = {"max_new_tokens": LENGTH + 1 - 5, "sampling": GREEDY}
    (text,) = complete(model, variables, [prompt], **options)
    logits = jax.jit(lambda tokens: model.apply(variables, tokens))(
        np.array([prompt + text[:-1]], np.int32)
    )
    assert text == list(np.argmax(logits[0], axis=-1)[4:])
    with pytest.raises(ValueError, match="max_new_tokens=9 must be at most 8"):
        generate(model, variables, [prompt], max_new_tokens=9)
    with pytest.raises(ValueError, match=r"has 13 tokens, .* has 12: it must be shorter"):
        generate(model, variables, [[1] * 13], max_new_tokens=1)


def test_prompts_of_like_lengths_share_a_program(small):
    model, variables = small
    module._start.clear_cache()
    module._go_on.clear_cache()
    for length in (3, 9, 16):
        complete(model, variables, [[1] * length], max_new_tokens=3, sampling=GREEDY)
    assert module._start._cache_size() == module._go_on._cache_size() == 1


def test_nothing_is_copied(small):
    """The cache is given away at each step, so that it is written in place."""
    model, variables = small
    keys = jax.random.split(jax.random.key(0), 1)
    tokens, lengths = np.ones((1, 4), np.int32), np.array([4], np.int32)
    latest, cache = module._start(model, 64, GREEDY, variables, tokens, lengths, keys)
    module._go_on(model, GREEDY, variables, latest, cache, keys)
    assert all(x.is_deleted() for x in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[1], []], {}, r"prompts\[1\] is empty: there must be at least one token"),
        ([[1, VOCAB]], {}, "tokens from 1 to 17; .* less than the vocabulary's size 17"),
        ([[-1]], {}, "tokens from -1 to -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([[1]], {"sampling": Sampling(top_k=18)}, "top_k=18 must be at most the vocab"),
    ],
)
def test_wrong_input_is_an_error_at_once(small, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*small, prompts, **{"max_new_tokens": 1, **options})

import pytest

from rbf_jax.data.tokenizer import ByteTokenizer, train_bpe
from rbf_jax.inference import TextStream

TEXT = "Zoë said: “naïve café” – 🦊🦊 … a fox!\n"


@pytest.fixture(scope="module")
def tokenizers():
    return [ByteTokenizer(), train_bpe([TEXT, "the fox said"], 270)]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("at", [0, 9, 24])
def test_the_pieces_are_the_text_and_no_character_is_cut(tokenizers, number, at):
    tokenizer = tokenizers[number]
    prompt, rest = TEXT[:at], TEXT[at:]
    stream = TextStream(tokenizer, tokenizer.encode(prompt))
    pieces = [stream.push(token) for token in tokenizer.encode(rest)]
    assert "".join(pieces) == rest
    assert stream.end() == ""
    assert "" in pieces  # of characters of several bytes
    assert sum(bool(piece) for piece in pieces) > 5  # and the others are not kept waiting


def test_half_a_character_at_the_end(tokenizers):
    stream = TextStream(tokenizers[0])
    assert [stream.push(token) for token in (97, *"é".encode()[:1])] == ["a", ""]
    assert stream.end() == "\ufffd"
    assert stream.end() == ""


def test_what_is_no_text_does_not_stop_what_comes_after(tokenizers):
    stream = TextStream(tokenizers[0])
    assert [stream.push(token) for token in (0x80, 0xFF, 97)] == ["", "", "\ufffd\ufffda"]

"""Text as its tokens come."""

from __future__ import annotations

from rbf_jax.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class TextStream:
    """Turns tokens into text piece by piece; the pieces together are the text of all tokens.

    A character may be spread over several tokens, and what a token's text is may depend on the one
    before. So tokens are decoded together with the last ones that gave text, and no text is given
    away that ends in half a character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int] | None = None):
        """Takes what decodes, and tokens that come before and whose text is not to be given."""
        self._tokenizer = tokenizer
        self._shown: list[int] = list(prompt or [])
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """Returns the text that `token` completes; "" where it completes none."""
        self._waiting.append(token)
        return self._take(final=False)

    def end(self) -> str:
        """Returns what is left: half a character as U+FFFD."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._tokenizer.decode(self._shown)
        text = self._tokenizer.decode(self._shown + self._waiting)[len(before) :]
        if not text or (text.endswith(_REPLACEMENT) and not final):
            return ""
        self._shown, self._waiting = self._waiting, []
        return text

"""Generation: prompts are read at once, then each token is fed back until its text ends."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax.inference.sampling import Sampling, sample
from rbf_jax.nn.cache import Cache, empty_cache
from rbf_jax.nn.transformer import CausalLM

# Prompts are filled up to a power of two from here on, caches to a multiple: few programs to
# compile for prompts of many lengths.
_SHORTEST_PROMPT = 16
_CACHE_MULTIPLE = 64


def generate(
    model: CausalLM,
    variables: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[list[int | None]]:
    """Goes on with several prompts at once.

    The same seed gives the same text, also of a prompt among others as far as rounding allows: what
    is drawn depends on the seed, the number of the prompt and the position of the token.

    Args:
      model: the language model.
      variables: its parameters.
      prompts: B of them, tokens, of any lengths.
      max_new_tokens: the most tokens that a text is to grow by.
      sampling: how tokens are chosen; None for `Sampling()`.
      seed: of the random choices.
      eos_id: the token that ends a text; None for none.

    Yields:
      B tokens, the next of each text; None where it has ended. The token that ends it is left out.

    Raises:
      ValueError: an argument is wrong, or a text would outgrow the learned positions. At once, not
        when the first token is asked for.
    """
    sampling = sampling or Sampling()
    _validate(model, prompts, max_new_tokens, sampling)
    B, longest = len(prompts), max(map(len, prompts))
    width = max(_SHORTEST_PROMPT, 1 << (longest - 1).bit_length())
    if model.config.positions == "learned":
        width = min(width, model.config.context_length)
    tokens = np.zeros((B, width), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    # The last token is not read again.
    capacity = max(width, longest + max_new_tokens - 1)
    capacity = -(-capacity // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(B))
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)

    def steps() -> Iterator[list[int | None]]:
        latest, cache = _start(model, capacity, sampling, variables, tokens, lengths, keys)
        going = np.ones(B, bool)
        for left in reversed(range(max_new_tokens)):
            ahead = latest
            if left:  # Begun before its turn: the device is not to wait for what is done here.
                ahead, cache = _go_on(model, sampling, variables, latest, cache, keys)
            ids = np.asarray(latest)
            going = going & (ids != eos_id)
            if not going.any():
                return
            yield [int(token) if on else None for token, on in zip(ids, going)]
            latest = ahead

    return steps()


def complete(
    model: CausalLM,
    variables: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    **options: Any,
) -> list[list[int]]:
    """Returns the new tokens of each prompt, all at once.

    Args:
      model: the language model.
      variables: its parameters.
      prompts: B of them.
      **options: of `generate`.

    Raises:
      ValueError: as `generate`.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, variables, prompts, **options):
        for text, token in zip(texts, step):
            if token is not None:
                text.append(token)
    return texts


@functools.partial(jax.jit, static_argnames=("model", "capacity", "sampling"))
def _start(model, capacity, sampling, variables, tokens, lengths, keys) -> tuple[jax.Array, Cache]:
    cache = empty_cache(model.config, len(tokens), capacity)
    logits, cache = model.apply(variables, tokens, lengths, cache, method="prefill")
    return _draw(logits, cache, keys, sampling), cache


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="cache")
def _go_on(model, sampling, variables, tokens, cache, keys) -> tuple[jax.Array, Cache]:
    logits, cache = model.apply(variables, tokens[:, None], cache, method="extend")
    return _draw(logits[:, 0], cache, keys, sampling), cache


def _draw(logits, cache, keys, sampling) -> jax.Array:
    return sample(logits, jax.vmap(jax.random.fold_in)(keys, cache.lengths), sampling)


def _validate(model, prompts, max_new_tokens, sampling) -> None:
    config = model.config
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if sampling.top_k is not None and sampling.top_k > config.vocab_size:
        raise ValueError(
            f"top_k={sampling.top_k} must be at most the vocabulary's size {config.vocab_size}."
        )
    if not len(prompts):
        raise ValueError("prompts is empty: there must be at least one.")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(
                f"prompts[{i}] is empty: there must be at least one token to go on from."
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(
                f"prompts[{i}] holds tokens from {min(prompt)} to {max(prompt)}; they must be at "
                f"least 0 and less than the vocabulary's size {config.vocab_size}."
            )
        most = config.context_length + 1 - len(prompt)
        if config.positions == "learned" and max_new_tokens > most:
            room = f"max_new_tokens={max_new_tokens} must be at most {most}"
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens, of which positions='learned' has "
                f"{config.context_length}: {room if most > 0 else 'it must be shorter'}."
            )

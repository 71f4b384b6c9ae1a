"""What a model remembers of the tokens that it has seen, for the next ones to attend to."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from rbf_jax.nn import registers
from rbf_jax.nn.config import TransformerConfig
from rbf_jax.ops.decode import api as decode
from rbf_jax.ops.decode import cache as caches
from rbf_jax.ops.decode.cache import KeysValues
from rbf_jax.ops.logits import undo_normalization


class Cache(NamedTuple):
    """Keys, values and key norms of all layers, those of the registers among them.

    Attributes:
      layers: L of them, heads first.
      lengths: int32 (B,), the tokens that each row has seen.
    """

    layers: tuple[KeysValues, ...]
    lengths: jax.Array


class Prompt(NamedTuple):
    """A layer's input is registers and prompts, whose keys and values are to be kept.

    Attributes:
      cache: to be filled; what it holds is given up.
      lengths: int32 (B,), the tokens of each row that count.
    """

    cache: KeysValues
    lengths: jax.Array


class Step(NamedTuple):
    """A layer's input is T tokens that go on from what is in the cache; no registers.

    Attributes:
      cache: of what was before.
      starts: int32 (B,), the tokens of each row before.
      lengths: int32 (B,), the tokens after.
    """

    cache: KeysValues
    starts: jax.Array
    lengths: jax.Array


Past = Prompt | Step


def empty_cache(
    config: TransformerConfig, batch_size: int, capacity: int, max_step: int = 1
) -> Cache:
    """Returns a cache for `CausalLM.prefill`.

    With a window it is a ring: of window + `max_step` tokens, if that is less than `capacity`, and
    rows may grow without end.

    Args:
      config: of the model.
      batch_size: B.
      capacity: the most tokens that a row is to hold, prompt included.
      max_step: the most tokens that `CausalLM.extend` is to be given at once.

    Raises:
      ValueError: a size is less than 1.
    """
    sizes = {"batch_size": batch_size, "capacity": capacity, "max_step": max_step}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1.")
    slots = capacity
    if (window := config.attention.window) is not None:
        slots = min(capacity, window + max_step)
    layer = caches.empty(
        batch_size, config.kv_heads, config.num_registers + slots, config.head_dim, config.dtype
    )
    # Arrays of their own in each layer: what is donated must be there once only.
    layers = tuple(jax.tree.map(jnp.copy, layer) for _ in range(config.num_layers))
    return Cache(layers, jnp.zeros(batch_size, jnp.int32))


def num_slots(config: TransformerConfig, cache: Cache) -> int:
    """C, the tokens that a row of the cache holds at once."""
    return cache.layers[0].key.shape[2] - config.num_registers


def rolls(config: TransformerConfig, cache: Cache, step: int) -> bool:
    """Whether `step` tokens may take the place of others, as none needs these any more."""
    window = config.attention.window
    return window is not None and num_slots(config, cache) >= window + step


def registers_in_front(config: TransformerConfig, past: Past | None) -> int:
    """How many registers a layer's input begins with: R, and none where they are in the cache."""
    return 0 if isinstance(past, Step) else config.num_registers


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_registers: int,
    past: Past | None,
    *,
    segment_ids: jax.Array | None = None,
    implementation: Any = None,
    normalize: bool = True,
    **options: Any,
) -> tuple[jax.Array, KeysValues | None]:
    """As `registers.attend`, beside or instead of what is in a cache.

    Args:
      query: (B, R+T, N, H), registers first; with a `Step` (B, T, N, H).
      key: of as many places as query.
      value: as key.
      num_registers: R.
      past: a cache to fill, or to go on from; or None.
      segment_ids: of `registers.attend`.
      implementation: of the operation; a `Step` takes its own of this name, or its best.
      normalize: of `registers.attend`.
      **options: of `registers.attend`.

    Returns:
      As query, and the cache with the new tokens in it.
    """
    if isinstance(past, Step):
        cache = caches.append(past.cache, key, value, past.starts, past.lengths, num_registers)
        named = implementation if implementation in get_args(decode.Implementation) else None
        out, logsumexp = decode.attend(
            query,
            cache,
            past.starts,
            past.lengths,
            num_registers=num_registers,
            implementation=named,
            **options,
        )
        if not normalize:
            out, _ = undo_normalization(query, options["gamma"], out, logsumexp)
        return out, cache
    out = registers.attend(
        query,
        key,
        value,
        num_registers,
        segment_ids=segment_ids,
        implementation=implementation,
        normalize=normalize,
        **options,
    )
    if past is None:
        return out, None
    return out, caches.fill(past.cache, key, value, past.lengths, num_registers)

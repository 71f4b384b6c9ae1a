"""Keys and values that stay while queries come and go, the keys' squared norms kept beside them.

A cache has R + C slots for each row and head: R registers in front, then a ring of C slots in which
the token at position p lies in slot p mod C. Which token a slot holds follows from the number of
tokens that the row has seen, so that rows of different lengths, and sequences longer than the ring,
need no further bookkeeping.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbf_jax.ops.call import accumulation_dtype, squared_norms


class KeysValues(NamedTuple):
    """The cache of one attention layer. Heads come first: a head's keys are read in one piece.

    Attributes:
      key: (B, K, R+C, H).
      value: (B, K, R+C, H).
      key_norms: ‖k‖², (B, K, R+C), float32 (float64 for float64 keys).
    """

    key: jax.Array
    value: jax.Array
    key_norms: jax.Array


def empty(
    batch_size: int, num_kv_heads: int, num_slots: int, head_dim: int, dtype: jnp.dtype | str
) -> KeysValues:
    """Returns a cache in which nothing is, of (B, K, R+C, H)."""
    shape = (batch_size, num_kv_heads, num_slots, head_dim)
    norms = jnp.zeros(shape[:3], accumulation_dtype(jnp.dtype(dtype)))
    return KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), norms)


def slot_positions(lengths: jax.Array, num_slots: int) -> jax.Array:
    """Which token each slot of a ring holds.

    Args:
      lengths: int32 (B,), tokens that each row has seen.
      num_slots: C.

    Returns:
      int32 (B, C), positions; negative where a slot holds none.
    """
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(num_slots, dtype=jnp.int32)[None]) % num_slots


def fill(
    cache: KeysValues,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    num_registers: int,
) -> KeysValues:
    """Returns the cache of prompts; of one that is longer than the ring, its end.

    Args:
      cache: of the shapes wanted; what it holds is given up.
      key: (B, R+P, K, H), registers first, then P tokens of which each row's first count.
      value: as key.
      lengths: int32 (B,), 0 to P.
      num_registers: R.
    """
    R, P = num_registers, key.shape[1] - num_registers
    positions = slot_positions(lengths, cache.key.shape[2] - R)
    # An empty slot gets some token, not to be looked at: 0 times it is then 0.
    source = jnp.clip(positions, 0, P - 1)[:, :, None, None]

    def place(array: jax.Array) -> jax.Array:
        tokens = jnp.take_along_axis(array[:, R:], source, axis=1)
        return jnp.concatenate([array[:, :R], tokens], axis=1).swapaxes(1, 2)

    key = place(key.astype(cache.key.dtype))
    return KeysValues(key, place(value.astype(cache.value.dtype)), squared_norms(key))


def append(
    cache: KeysValues,
    key: jax.Array,
    value: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    num_registers: int,
) -> KeysValues:
    """Returns the cache with T more tokens in each row, or with as many of them as count.

    They take the places of the tokens C positions before, so T is at most C, and with a window of
    W tokens at most C − W: the first of them still looks back that far.

    Args:
      cache: what was before. Donate it, and nothing is copied.
      key: (B, T, K, H).
      value: as key.
      starts: int32 (B,), the tokens of each row before.
      lengths: int32 (B,), the tokens after, `starts` to `starts` + T.
      num_registers: R.
    """
    if key.shape[1] == 1:
        # And one that is dropped. Of a single write XLA makes an update of a slice, which on a CPU
        # it fuses with what reads it, at the price of several copies of the cache.
        key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (key, value))
    B, T = key.shape[:2]
    num_slots = cache.key.shape[2] - num_registers
    positions = starts[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    slots = num_registers + positions % num_slots
    # Beyond the last slot, where "drop" lets it fall.
    slots = jnp.where(positions < lengths[:, None], slots, num_registers + num_slots)
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]

    def write(array: jax.Array, tokens: jax.Array) -> jax.Array:
        return array.at[rows, :, slots].set(tokens.astype(array.dtype), mode="drop")

    return KeysValues(
        write(cache.key, key),
        write(cache.value, value),
        write(cache.key_norms, squared_norms(key.astype(cache.key.dtype))),
    )

"""What every implementation of attention to a cache receives: validated arrays, static options."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from rbf_jax.ops.decode.cache import KeysValues


class Call(NamedTuple):
    """The arrays of one call.

    Attributes:
      query: (B, T, N, H).
      cache: K divides N; it holds the queries' own keys too.
      starts: int32 (B,), the position of each row's first query.
      lengths: int32 (B,), the tokens in the cache.
      gamma: γ, (N,), accumulation dtype.
      key_norm_weight: λ, (N,), accumulation dtype.
      alibi_slopes: (N,), accumulation dtype, or None.
    """

    query: jax.Array
    cache: KeysValues
    starts: jax.Array
    lengths: jax.Array
    gamma: jax.Array
    key_norm_weight: jax.Array
    alibi_slopes: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Options:
    """Static choices, hashable.

    Attributes:
      num_registers: R; all queries see the first R slots, which are at no distance from them.
      window: a query sees this many tokens back, and itself; None for all.
      origin_sink: a virtual key at the origin with value 0 takes part in every row.
    """

    num_registers: int
    window: int | None
    origin_sink: bool

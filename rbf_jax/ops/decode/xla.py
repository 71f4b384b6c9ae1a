"""Attention to a cache in one dense pass, for any device: memory is O(B·N·T·(R+C))."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from rbf_jax.ops import reference
from rbf_jax.ops.call import Inputs, Masking, Rules
from rbf_jax.ops.decode.cache import slot_positions

SUPPORTS = frozenset(
    {
        *("left", "right", "num_global_keys", "sink", "return_residual"),
        *("key_lengths", "alibi_slopes", "query_offset"),
    }
)
_NOWHERE = 2**30  # the position of a slot that holds no token: after all queries


def attend(inputs: Inputs, masking: Masking, rules: Rules) -> tuple[jax.Array, jax.Array]:
    """Returns the output and the logsumexp of a call that `decode.api` has put together."""
    T, R = inputs.query.shape[1], rules.num_global_keys
    lengths = cast(jax.Array, masking.key_lengths)  # always given
    tokens = slot_positions(lengths, inputs.key.shape[2] - R)
    tokens = jnp.where(tokens < 0, _NOWHERE, R + tokens)
    registers = jnp.broadcast_to(jnp.arange(R, dtype=jnp.int32), (tokens.shape[0], R))
    columns = jnp.concatenate([registers, tokens], axis=1)
    rows = jnp.arange(T, dtype=jnp.int32)
    masking = masking._replace(key_lengths=None)  # the positions say it
    return reference.attend_to_positions(inputs, masking, rules, rows, columns)

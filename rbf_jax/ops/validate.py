"""Turns what the user passed into `Inputs` and `Masking`, or says what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax.ops.call import Inputs, Masking, accumulation_dtype

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def arrays(
    query,
    key,
    value,
    mask,
    *,
    gamma,
    key_norm_weight,
    query_seq_lengths,
    key_value_seq_lengths,
    query_segment_ids,
    key_value_segment_ids,
    alibi_slopes,
) -> tuple[Inputs, Masking, bool]:
    """Checks all arrays of the call and gives them a batch axis where they have none.

    Returns:
      The inputs, the masking rules, and whether the user's arrays had no batch axis.

    Raises:
      ValueError: naming the argument, its value and the requirement.
    """
    query, key, value, unbatched = _query_key_value(query, key, value)
    B, T, N, H = query.shape
    S = key.shape[1]
    dtype = accumulation_dtype(query.dtype)
    if gamma is None:
        gamma = 1 / math.sqrt(H)
    _require_known(
        "gamma", gamma, dtype, "finite and greater than 0", lambda x: np.isfinite(x) & (x > 0)
    )
    _require_known("key_norm_weight", key_norm_weight, dtype, "finite", np.isfinite)
    inputs = Inputs(
        query,
        key,
        value,
        _per_head("gamma", gamma, N, dtype),
        _per_head("key_norm_weight", key_norm_weight, N, dtype),
    )
    if (query_segment_ids is None) != (key_value_segment_ids is None):
        given, missing = "query_segment_ids", "key_value_segment_ids"
        if query_segment_ids is None:
            given, missing = missing, given
        raise ValueError(f"{given} is given without {missing}: both or neither are required.")
    if alibi_slopes is not None:
        _require_known(
            "alibi_slopes",
            alibi_slopes,
            dtype,
            "finite and not negative",
            lambda x: np.isfinite(x) & (x >= 0),
        )
        if np.shape(alibi_slopes) != (N,):
            raise ValueError(
                f"alibi_slopes has shape {np.shape(alibi_slopes)}, but must have (N,) = ({N},)."
            )
        alibi_slopes = jax.lax.stop_gradient(_per_head("alibi_slopes", alibi_slopes, N, dtype))
    query_lengths = _integers("query_seq_lengths", query_seq_lengths, (B,), unbatched)
    key_lengths = _integers("key_value_seq_lengths", key_value_seq_lengths, (B,), unbatched)
    masking = Masking(
        mask=_mask(mask, (B, N, T, S)),
        query_lengths=_clip(query_lengths, T),
        key_lengths=_clip(key_lengths, S),
        query_segments=_integers("query_segment_ids", query_segment_ids, (B, T), unbatched),
        key_segments=_integers("key_value_segment_ids", key_value_segment_ids, (B, S), unbatched),
        alibi_slopes=alibi_slopes,
    )
    return inputs, masking, unbatched


def boolean(name: str, value: Any) -> bool:
    """Returns a static bool; raises ValueError for anything else, a traced array among it."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={value!r} must be a Python bool, known when tracing.")
    return bool(value)


def window(value: Any, longest: int) -> tuple[int, int] | None:
    """Returns (left, right) for `local_window_size`, which may be None, an int or a pair.

    Each is at most `longest`, the longer of T and S, which no distance between positions reaches.
    """
    if value is None:
        return None
    pair = (value, value) if isinstance(value, (int, np.integer)) else value
    valid = (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(x, (int, np.integer)) and not isinstance(x, bool) for x in pair)
        and all(x >= 0 for x in pair)
    )
    if not valid:
        raise ValueError(
            f"local_window_size={value!r} must be None, an int ≥ 0 or a pair of them (left, right)."
        )
    return min(int(pair[0]), longest), min(int(pair[1]), longest)


def static_number(value: Any) -> float | None:
    """Returns a scalar that is known when tracing as a Python float, else None."""
    if isinstance(value, jax.core.Tracer) or np.ndim(value) > 0:
        return None
    return float(value)


def _query_key_value(query, key, value) -> tuple[jax.Array, jax.Array, jax.Array, bool]:
    query, key = _asarray("query", query), _asarray("key", key)
    value = _asarray("value", value)
    named = {"query": query, "key": key, "value": value}
    for name, array in named.items():
        if array.ndim not in (3, 4) or array.ndim != query.ndim:
            raise ValueError(
                f"{name} has shape {array.shape}, but query, key and value must all be 4-D, "
                f"(batch, length, heads, head dimension), or all 3-D, without the batch."
            )
        if array.dtype.name not in _DTYPES:
            raise ValueError(f"{name} has dtype {array.dtype}, but must be one of {_DTYPES}.")
        if array.dtype != query.dtype:
            raise ValueError(
                f"{name} has dtype {array.dtype}, but must have query's dtype {query.dtype}."
            )
        if 0 in array.shape:
            raise ValueError(f"{name} has shape {array.shape}, but no axis may be empty.")
    N, H, K = query.shape[-2], query.shape[-1], key.shape[-2]
    if key.shape[:-3] != query.shape[:-3] or key.shape[-1] != H:
        raise ValueError(
            f"key has shape {key.shape}, but must agree in batch and head dimension with query's "
            f"shape {query.shape}."
        )
    if value.shape != key.shape:
        raise ValueError(f"value has shape {value.shape}, but must have key's shape {key.shape}.")
    if N % K:
        raise ValueError(
            f"query has {N} heads and key {K}, but the key's number must divide the query's."
        )
    unbatched = query.ndim == 3
    if unbatched:
        query, key, value = query[None], key[None], value[None]
    return query, key, value, unbatched


def _require_known(name: str, value, dtype, requirement: str, test) -> None:
    """Tests what is known when tracing, as it will be in `dtype`; a traced array passes."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(value)):
        return
    try:
        # Booleans and complex numbers are refused by `_per_head`, later.
        with np.errstate(over="ignore"):  # what overflows is inf, and is refused below
            known = np.real(np.asarray(value)).astype(dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r} must be numbers, {requirement}.") from error
    if not np.all(test(known)):
        raise ValueError(f"{name}={value} must be {requirement} in {np.dtype(dtype).name}.")


def _asarray(name: str, value) -> jax.Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is {type(value).__name__} {value!r}, but must be an array."
        ) from error


def _per_head(name: str, value, num_heads: int, dtype) -> jax.Array:
    if np.shape(value) not in ((), (num_heads,)):
        raise ValueError(
            f"{name} has shape {np.shape(value)}, but must be a scalar or have shape "
            f"(N,) = ({num_heads},)."
        )
    array = _asarray(name, value)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise ValueError(f"{name} has dtype {array.dtype}, but must be real numbers.")
    return jnp.broadcast_to(array.astype(dtype), (num_heads,))


def _mask(mask, shape: tuple[int, int, int, int]) -> jax.Array | None:
    if mask is None:
        return None
    mask = _asarray("mask", mask)
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask has dtype {mask.dtype}, but must be bool (True = attend).")
    padded = (1,) * (4 - mask.ndim) + mask.shape
    if len(padded) != 4 or any(a not in (1, b) for a, b in zip(padded, shape)):
        raise ValueError(
            f"mask has shape {mask.shape}, but must be broadcastable to (B, N, T, S) = {shape}."
        )
    return mask.reshape(padded)


def _integers(name: str, value, shape: tuple[int, ...], unbatched: bool) -> jax.Array | None:
    if value is None:
        return None
    array = _asarray(name, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {array.dtype}, but must be an integer dtype.")
    if array.shape != shape and not (unbatched and array.shape == shape[1:]):
        allowed = f"{shape[1:]} or {shape}" if unbatched else f"{shape}"
        raise ValueError(f"{name} has shape {array.shape}, but must have shape {allowed}.")
    return array.reshape(shape)


def _clip(lengths: jax.Array | None, longest: int) -> jax.Array | None:
    """Lengths as int32, those out of range as 0 or all."""
    return None if lengths is None else jnp.clip(lengths, 0, longest).astype(jnp.int32)

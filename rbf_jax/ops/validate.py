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
    sink_logits,
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
    inputs = Inputs(query, key, value, *numbers(gamma, key_norm_weight, sink_logits, N, H, dtype))
    if (query_segment_ids is None) != (key_value_segment_ids is None):
        given, missing = "query_segment_ids", "key_value_segment_ids"
        if query_segment_ids is None:
            given, missing = missing, given
        raise ValueError(f"{given} is given without {missing}: both or neither are required.")
    query_lengths = _integers("query_seq_lengths", query_seq_lengths, (B,), unbatched)
    key_lengths = _integers("key_value_seq_lengths", key_value_seq_lengths, (B,), unbatched)
    masking = Masking(
        mask=_mask(mask, (B, N, T, S)),
        query_lengths=_clip(query_lengths, T),
        key_lengths=_clip(key_lengths, S),
        query_segments=_integers("query_segment_ids", query_segment_ids, (B, T), unbatched),
        key_segments=_integers("key_value_segment_ids", key_value_segment_ids, (B, S), unbatched),
        alibi_slopes=slopes(alibi_slopes, N, dtype),
    )
    return inputs, masking, unbatched


def numbers(
    gamma, key_norm_weight, sink_logits, num_heads: int, head_dim: int, dtype
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns γ, λ and the sinks' logits, one per head; λ < 0 is as valid as λ > 0."""
    finite = "finite", np.isfinite
    positive = "finite and greater than 0", lambda x: np.isfinite(x) & (x > 0)
    gamma = 1 / math.sqrt(head_dim) if gamma is None else gamma
    return (
        _per_head("gamma", gamma, num_heads, dtype, *positive),
        _per_head("key_norm_weight", key_norm_weight, num_heads, dtype, *finite),
        None
        if sink_logits is None
        else _per_head("sink_logits", sink_logits, num_heads, dtype, *finite),
    )


def slopes(alibi_slopes, num_heads: int, dtype) -> jax.Array | None:
    """Returns ALiBi's slopes, (N,), constants of every derivative."""
    if alibi_slopes is None:
        return None
    requirement = "finite and not negative", lambda x: np.isfinite(x) & (x >= 0)
    return jax.lax.stop_gradient(
        _per_head("alibi_slopes", alibi_slopes, num_heads, dtype, *requirement, scalar=False)
    )


def sink(origin_sink: Any, sink_logits: Any, normalize: bool) -> Any:
    """Returns the sinks' logits: 0 for the origin sink, a virtual key at the origin."""
    origin_sink = boolean("origin_sink", origin_sink)
    if origin_sink and sink_logits is not None:
        raise ValueError(
            "origin_sink=True is sink_logits=0 and excludes other sink_logits; give one of them."
        )
    given = {"origin_sink=True": origin_sink, "sink_logits": sink_logits is not None}
    if not normalize and any(given.values()):
        name = next(name for name, is_given in given.items() if is_given)
        raise ValueError(f"{name} has no effect with normalize=False; leave it out.")
    return 0.0 if origin_sink else sink_logits


def refuse_dot_product_arguments(scale: Any, bias: Any) -> None:
    """Raises for arguments of `jax.nn.dot_product_attention` that have another name here.

    Raises:
      ValueError: scale is given.
      NotImplementedError: bias is given.
    """
    if scale is not None:
        raise ValueError(
            f"scale={scale!r} is not taken: pass gamma = scale / 2, since the logits are "
            "2γ q·k − λγ‖k‖², and key_norm_weight=0 as well for the dot product."
        )
    if bias is not None:
        raise NotImplementedError(
            f"bias of shape {np.shape(bias)} is not supported: use mask for entries of −∞, "
            "alibi_slopes for a penalty of distance, local_window_size or segment ids for blocks."
        )


def refuse_dropout(rate: Any, deterministic: Any, advice: str = "") -> None:
    """Raises NotImplementedError unless the arguments of Flax's attention layers mean no dropout.

    Anything but None, 0 or `deterministic` of True asks for dropout, a traced rate too.
    """
    if rate is None or (isinstance(deterministic, (bool, np.bool_)) and deterministic):
        return
    if static_number(rate) != 0:
        raise NotImplementedError(
            f"dropout_rate={rate} with deterministic={deterministic} is not supported: attention "
            f"weights are never formed, so none can be dropped. Set dropout_rate=0.{advice}"
        )


def require_dtype(name: str, array: jax.Array) -> None:
    """Raises ValueError unless attention is defined for the array's dtype."""
    if array.dtype.name not in _DTYPES:
        raise ValueError(f"{name} has dtype {array.dtype}, but must be one of {_DTYPES}.")


def global_keys(value: Any, num_keys: int) -> int:
    """Returns `num_global_keys`, from 0 to S."""
    if not is_integer(value) or not 0 <= value <= num_keys:
        raise ValueError(
            f"num_global_keys={value!r} must be an int from 0 to the number of keys, {num_keys}."
        )
    return int(value)


def boolean(name: str, value: Any) -> bool:
    """Returns a static bool; raises ValueError for anything else, a traced array among it."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={value!r} must be a Python bool, known when tracing.")
    return bool(value)


def window(value: Any, is_causal: bool, longest: int) -> tuple[int | None, int | None]:
    """Returns (left, right) for `local_window_size`, which may be None, an int or a pair.

    Causality is right = 0. None where a side reaches `longest`, the longer of T and S, which no
    distance between positions does: there is no such rule then.
    """
    pair = (value, value) if is_integer(value) else value
    if pair is None:
        return None, 0 if is_causal else None
    valid = isinstance(pair, Sequence) and len(pair) == 2 and all(map(is_integer, pair))
    if not valid or min(pair) < 0:
        raise ValueError(
            f"local_window_size={value!r} must be None, an int ≥ 0 or a pair of them (left, right)."
        )
    left, right = (int(x) if x < longest else None for x in pair)
    return left, 0 if is_causal else right


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
        require_dtype(name, array)
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
    """Tests what is known while tracing, as it will be in `dtype`; a traced array passes."""
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


def _per_head(
    name: str, value, num_heads: int, dtype, requirement: str, test, *, scalar: bool = True
) -> jax.Array:
    """Returns one number per query head; they are tested where they are known while tracing."""
    _require_known(name, value, dtype, requirement, test)
    if np.shape(value) != (num_heads,) and not (scalar and np.shape(value) == ()):
        shape = f"have shape (N,) = ({num_heads},)"
        raise ValueError(
            f"{name} has shape {np.shape(value)}, but must "
            f"{'be a scalar or ' if scalar else ''}{shape}."
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return jnp.asarray(np.full(num_heads, value, dtype))  # one operation instead of three
    array = _asarray(name, value)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise ValueError(f"{name} has dtype {array.dtype}, but must be real numbers.")
    return jnp.broadcast_to(array.astype(dtype), (num_heads,))


def is_integer(value: Any) -> bool:
    """Whether a value is an int known while tracing; a bool is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


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

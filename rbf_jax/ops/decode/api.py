"""Attention of a few new queries to a cache of keys: what each step of generation computes.

A call to a cache is a call like any other (`call.Inputs`, `Masking`, `Rules`) with three
conventions: keys are laid out as in the cache; the registers are its global keys, in the first
slots; and the token at position p counts as key R + p, wherever in the ring it is. So query i is at
position R + `starts` + i (`Masking.query_offset`), and `Masking.key_lengths` counts tokens.
"""

from __future__ import annotations

from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rbf_jax.ops import dispatch, validate
from rbf_jax.ops.call import Inputs, Masking, Rules, accumulation_dtype
from rbf_jax.ops.decode import triton, xla
from rbf_jax.ops.decode.cache import KeysValues
from rbf_jax.ops.manual_axes import vary_together

Implementation = Literal["triton", "xla"]

IMPLEMENTATIONS: dict[str, dispatch.Implementation] = {
    "triton": dispatch.Implementation(triton.attend, triton.SUPPORTS, triton.unsupported),
    "xla": dispatch.Implementation(xla.attend, xla.SUPPORTS),
}


def attend(
    query: jax.Array,
    cache: KeysValues,
    starts: jax.Array,
    lengths: jax.Array,
    *,
    num_registers: int = 0,
    gamma: ArrayLike | None = None,
    key_norm_weight: ArrayLike = 1.0,
    window: int | None = None,
    alibi_slopes: ArrayLike | None = None,
    origin_sink: bool = False,
    sink_logits: ArrayLike | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax_j(2γ q_i·k_j − λγ‖k_j‖²) v_j over a cache, causally, with its key norms as they are.

    Query i of a row is at position `starts` + i. It sees all registers, and the tokens in the cache
    at its position and before, within the window.

    Args:
      query: (B, T, N, H), of the cache's dtype. T is small: memory of "xla" is O(B·N·T·(R+C)).
      cache: with the queries' own keys; see `rbf_jax.ops.decode.cache`.
      starts: int32 (B,).
      lengths: int32 (B,), the tokens that each row has seen, those of the queries among them.
      num_registers: R.
      gamma: γ > 0, scalar or (N,). Default 1/√H.
      key_norm_weight: λ, scalar or (N,).
      window: a query sees this many tokens back, and itself; None for all.
      alibi_slopes: (N,): adds −slope·(i − j) to the logits of tokens, not to those of registers.
      origin_sink: adds exp(0) to the denominator of every row.
      sink_logits: scalar or (N,): adds its exponential to the denominator of every row.
      implementation: None takes the best that supports the call. "xla" is dense, for any device;
        "triton", for NVIDIA GPUs from compute capability 8.0, reads what a row may see and no more,
        and needs no memory for logits. Generation needs no gradients: those of "triton" are what
        "xla" makes of the same call, and take its memory.

    Returns:
      The output (B, T, N, H) of query's dtype, and the logsumexp of the logits (B, T, N), float32
      (float64 for float64): 0 and −inf where a query sees nothing.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
      NotImplementedError: the implementation asked for by name cannot do this call.
    """
    _validate(query, cache, starts, lengths, num_registers, window)
    N, H = query.shape[2:]
    dtype = accumulation_dtype(query.dtype)
    sink_logits = validate.sink(origin_sink, sink_logits, normalize=True)
    numbers = validate.numbers(gamma, key_norm_weight, sink_logits, N, H, dtype)
    inputs = Inputs(query, cache.key, cache.value, *numbers, key_norms=cache.key_norms)
    masking = Masking(
        key_lengths=lengths,
        alibi_slopes=validate.slopes(alibi_slopes, N, dtype),
        query_offset=num_registers + starts,
    )
    rules = Rules(
        left=window,
        right=0,
        num_global_keys=num_registers,
        sink=sink_logits is not None,
        return_residual=True,
    )
    inputs, masking = vary_together((inputs, masking))
    out, logsumexp = dispatch.attend(implementation, inputs, masking, rules, IMPLEMENTATIONS)
    return out, cast(jax.Array, logsumexp)  # the rules ask for it


def _validate(query, cache, starts, lengths, num_registers, window) -> None:
    if query.ndim != 4:
        raise ValueError(f"query has shape {query.shape}, but must be (B, T, N, H).")
    validate.require_dtype("query", query)
    B, _, N, H = query.shape
    K, S = cache.key.shape[1:3]
    shapes = (B, K, S, H), (B, K, S, H), (B, K, S)
    if tuple(x.shape for x in cache) != shapes or N % K:
        raise ValueError(
            f"cache has shapes {tuple(x.shape for x in cache)}, but for query's shape "
            f"{query.shape} must have {shapes}, K a divisor of N."
        )
    for name, array in (("key", cache.key), ("value", cache.value)):
        if array.dtype != query.dtype:
            raise ValueError(
                f"cache.{name} has dtype {array.dtype}, but must have query's dtype {query.dtype}."
            )
    for name, array in (("starts", starts), ("lengths", lengths)):
        if array.shape != (B,) or array.dtype != jnp.int32:
            raise ValueError(
                f"{name} has shape {array.shape} and dtype {array.dtype}, but must be int32 of "
                f"shape (B,) = ({B},)."
            )
    dtype = accumulation_dtype(query.dtype)
    if cache.key_norms.dtype != dtype:
        raise ValueError(
            f"cache.key_norms has dtype {cache.key_norms.dtype}, but must have {dtype}."
        )
    if not validate.is_integer(num_registers) or not 0 <= num_registers < S:
        raise ValueError(
            f"num_registers={num_registers!r} must be an int from 0, less than the {S} slots."
        )
    if window is not None and not (validate.is_integer(window) and window >= 0):
        raise ValueError(f"window={window!r} must be None or an int ≥ 0.")

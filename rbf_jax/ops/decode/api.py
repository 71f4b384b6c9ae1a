"""Attention of a few new queries to a cache of keys: what each step of generation computes.

`attend` validates and dispatches. An implementation is a function of a `Call` and its `Options`.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rbf_jax.ops.call import accumulation_dtype, group_heads
from rbf_jax.ops.decode import triton
from rbf_jax.ops.decode.cache import KeysValues, slot_positions
from rbf_jax.ops.decode.types import Call, Options
from rbf_jax.ops.parallel.manual_axes import vary_together

_logger = logging.getLogger("rbf_jax")

Implementation = Literal["triton", "xla"]


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
    if implementation is not None and implementation not in _BACKENDS:
        raise ValueError(
            f"implementation={implementation!r} must be None or one of {sorted(_BACKENDS)}."
        )
    N, H = query.shape[2:]
    dtype = accumulation_dtype(query.dtype)

    def per_head(name: str, value: ArrayLike) -> jax.Array:
        if np.shape(value) not in ((), (N,)):
            raise ValueError(
                f"{name} has shape {np.shape(value)}, but must be a scalar or have (N,) = ({N},)."
            )
        return jnp.broadcast_to(jnp.asarray(value).astype(dtype), (N,))

    call = Call(
        query,
        cache,
        starts,
        lengths,
        per_head("gamma", 1 / math.sqrt(H) if gamma is None else gamma),
        per_head("key_norm_weight", key_norm_weight),
        None if alibi_slopes is None else per_head("alibi_slopes", alibi_slopes),
    )
    return _dispatch(
        implementation, vary_together(call), Options(num_registers, window, origin_sink)
    )


def _dispatch(implementation: str | None, call: Call, options: Options):
    """Does the call by the implementation asked for, or by the best that can."""
    name = implementation or "triton"
    reason = _BACKENDS[name].unsupported(call, options)
    if implementation is None and reason is None:
        _log_choice("takes 'triton' where the program is compiled for CUDA, else 'xla'")
        # The program may yet be placed on the CPU (jax.default_device).
        return jax.lax.platform_dependent(
            call,
            cuda=lambda call: _BACKENDS["triton"].attend(call, options),
            default=lambda call: _BACKENDS["xla"].attend(call, options),
        )
    if implementation is None:
        _log_choice(f"takes 'xla', since 'triton' {reason}")
        return _BACKENDS["xla"].attend(call, options)
    if reason is not None:
        raise NotImplementedError(
            f"implementation={implementation!r} {reason}; 'xla' can do this call."
        )
    return _BACKENDS[name].attend(call, options)


@functools.cache
def _log_choice(choice: str) -> None:
    _logger.info("decode.attend: implementation=None %s.", choice)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend_triton(call: Call, options: Options) -> tuple[jax.Array, jax.Array]:
    return triton.attend(call, options)


def _forward_triton(call: Call, options: Options):
    return triton.attend(call, options), call


def _backward_triton(options: Options, call: Call, cotangents):
    _, vjp = jax.vjp(lambda call: _attend_xla(call, options), call)
    return vjp(cotangents)


_attend_triton.defvjp(_forward_triton, _backward_triton)


def _attend_xla(call: Call, options: Options) -> tuple[jax.Array, jax.Array]:
    """One dense pass.

    Keys and values are cast to float32: found by trying on two CPU cores, where products of
    bfloat16 take several times as long, and so do keys whose heads come after their slots.
    """
    B, T, N, H = call.query.shape
    K = call.cache.key.shape[1]
    dtype = accumulation_dtype(call.query.dtype)
    # The heads of a group and the new tokens are rows of one matrix: keys are read once for all.
    query = jnp.moveaxis(call.query.astype(dtype).reshape(B, T, K, N // K, H), 1, 3)
    products = _dot(query.reshape(B, K, -1, H), call.cache.key.astype(dtype), 3)
    products = products.reshape(B, K, N // K, T, -1)
    gamma = group_heads(call.gamma, K)
    weight = group_heads(call.key_norm_weight, K)
    norms = call.cache.key_norms[:, :, None, None, :]
    logits = 2 * gamma * products - weight * gamma * norms
    allowed, distance = _rules(call, options)
    if call.alibi_slopes is not None:
        logits = logits - group_heads(call.alibi_slopes, K) * distance.astype(dtype)
    logits = jnp.where(allowed, logits, -jnp.inf)

    sink = 0.0 if options.origin_sink else -jnp.inf
    maximum = jnp.maximum(logits.max(axis=-1, keepdims=True), sink)
    maximum = jax.lax.stop_gradient(jnp.where(jnp.isneginf(maximum), 0, maximum))
    weights = jnp.exp(logits - maximum)
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - maximum)
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    logsumexp = jnp.where(nothing, -jnp.inf, maximum + jnp.log(total))[..., 0]
    weights = weights.reshape(B, K, -1, weights.shape[-1])
    out = _dot(weights, call.cache.value.astype(dtype), 2).reshape(B, K, -1, T, H) / total
    out = jnp.moveaxis(out, 3, 1).reshape(B, T, N, H)
    return out.astype(call.query.dtype), jnp.moveaxis(logsumexp, 3, 1).reshape(B, T, N)


def _rules(call: Call, options: Options) -> tuple[jax.Array, jax.Array]:
    """Who is seen, and how far back it is: bool and int32, (B, 1, 1, T, R+C)."""
    T, R = call.query.shape[1], options.num_registers
    rows = call.starts[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    columns = slot_positions(call.lengths, call.cache.key.shape[2] - R)
    distance = rows[:, :, None] - columns[:, None, :]
    allowed = (distance >= 0) & (columns >= 0)[:, None, :]
    if options.window is not None:
        allowed = allowed & (distance <= options.window)
    in_front = ((0, 0), (0, 0), (R, 0))
    allowed = jnp.pad(allowed, in_front, constant_values=True)
    return allowed[:, None, None], jnp.pad(distance, in_front)[:, None, None]


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Contracts a's last axis with one of b's, batched over rows and heads; never in tf32."""
    return jax.lax.dot_general(
        a, b, (((3,), (axis,)), ((0, 1), (0, 1))), precision=jax.lax.Precision.HIGHEST
    )


class _Backend(NamedTuple):
    attend: Callable[[Call, Options], tuple[jax.Array, jax.Array]]
    # Why this call cannot be done, or None where it can.
    unsupported: Callable[[Call, Options], str | None]


_BACKENDS: dict[str, _Backend] = {
    "triton": _Backend(_attend_triton, triton.unsupported),
    "xla": _Backend(_attend_xla, lambda *_: None),
}


def _validate(query, cache, starts, lengths, num_registers, window) -> None:
    if query.ndim != 4:
        raise ValueError(f"query has shape {query.shape}, but must be (B, T, N, H).")
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
    if not 0 <= num_registers < S:
        raise ValueError(
            f"num_registers={num_registers} must be at least 0 and less than the {S} slots."
        )
    if window is not None and window < 0:
        raise ValueError(f"window={window} must be None or at least 0.")

"""The operation as `attention_fn` of Flax's own attention layers, linen and nnx."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.typing import ArrayLike, DTypeLike

from rbf_jax.nn import inspection
from rbf_jax.ops import validate
from rbf_jax.ops.api import Implementation, rbf_attention
from rbf_jax.ops.call import squared_norms


# linen passes an argument only if the function's signature names it, and drops it otherwise
# without a word; nnx passes all it has. So all that either may pass is named here.
def rbf_attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    is_causal: bool = False,
    *,
    gamma: ArrayLike | None = None,
    key_norm_weight: ArrayLike = 1.0,
    origin_sink: bool = False,
    sink_logits: ArrayLike | None = None,
    normalize: bool = True,
    implementation: Implementation | None = None,
) -> jax.Array:
    """RBF attention in place of `flax.linen.dot_product_attention` or that of `flax.nnx`.

    For example ``nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=rbf_attention_fn)``, or
    with options ``attention_fn=functools.partial(rbf_attention_fn, gamma=0.5)``.

    Args:
      query: (..., T, N, H), with any batch axes.
      key: (..., S, K, H), K divides N.
      value: (..., S, K, H).
      bias: must be None.
      mask: broadcastable to (..., N, T, S); nonzero or True = attend. Rows with nothing to attend
        to give 0 (Flax gives the mean of all values).
      broadcast_dropout: ignored, as there is no dropout.
      dropout_rng: ignored, as there is no dropout.
      dropout_rate: must be 0 unless `deterministic`.
      deterministic: no dropout.
      dtype: to which query, key and value are cast; None for their common one.
      precision: must be None or the default: the operation chooses its own.
      module: the layer, linen or nnx, that asks for the attention weights to be sown. They are
        then also computed by the quadratic formula, (..., N, T, S) float32.
      force_fp32_for_softmax: ignored, softmax is in float32 always.
      einsum_dot_general: must be None.
      qk_attn_weights_einsum: must be None.
      attn_weights_value_einsum: must be None.
      is_causal: query i attends to keys j ≤ i only.
      gamma: γ of `rbf_attention`, scalar or (N,).
      key_norm_weight: λ, scalar or (N,).
      origin_sink: a virtual key at the origin with value 0: `sink_logits` of 0.
      sink_logits: scalar or (N,), the logit of a virtual key with value 0, as in `rbf_attention`.
      normalize: False leaves out softmax's denominator, as in `rbf_attention`, for the weights that
        are sown too.
      implementation: of `rbf_attention`.

    Returns:
      (..., T, N, H), of query's dtype after the cast.

    Raises:
      NotImplementedError: bias, dropout, precision or a custom einsum is asked for.
      ValueError: a shape or value is wrong.
    """
    del broadcast_dropout, dropout_rng, force_fp32_for_softmax
    _require_default("bias", bias)
    _require_default("einsum_dot_general", einsum_dot_general)
    _require_default("qk_attn_weights_einsum", qk_attn_weights_einsum)
    _require_default("attn_weights_value_einsum", attn_weights_value_einsum)
    if precision not in (None, "default", jax.lax.Precision.DEFAULT):
        raise NotImplementedError(
            f"precision={precision!r} is not supported by rbf_attention_fn; leave it at None."
        )
    validate.refuse_dropout(dropout_rate, deterministic)
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    batch, (T, N, H), S = query.shape[:-3], query.shape[-3:], key.shape[-3]
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    if mask is not None:
        mask = _flat_mask(mask, (*batch, N, T, S))
    out = rbf_attention(
        query,
        key,
        value,
        mask,
        gamma=gamma,
        key_norm_weight=key_norm_weight,
        is_causal=is_causal,
        origin_sink=origin_sink,
        sink_logits=sink_logits,
        normalize=normalize,
        implementation=implementation,
    )
    if module is not None:
        gamma = jnp.asarray(H**-0.5 if gamma is None else gamma, jnp.float32)
        logits = inspection.attention_logits(
            query, key, gamma=gamma, key_norm_weight=key_norm_weight
        )
        causal = jnp.tril(jnp.ones((T, S), bool)) if is_causal else jnp.ones((T, S), bool)
        allowed = causal if mask is None else mask & causal
        if normalize:
            sink_logits = 0.0 if origin_sink else sink_logits
            weights, _ = inspection.attention_weights(logits, allowed, sink_logits)
        else:
            own = gamma * squared_norms(query.astype(jnp.float32))
            weights = jnp.where(allowed, jnp.exp(logits - own.swapaxes(1, 2)[..., None]), 0.0)
        _sow(module, weights.reshape(*batch, N, T, S))
    return out.reshape(*batch, T, N, H)


def _require_default(name: str, value: Any) -> None:
    if value is not None:
        raise NotImplementedError(
            f"{name} is not supported by rbf_attention_fn and must be None, but is a "
            f"{type(value).__name__}."
        )


def _flat_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the mask as bool with one batch axis, broadcastable to (B, N, T, S)."""
    mask = jnp.asarray(mask)
    padded = (1,) * (len(shape) - mask.ndim) + mask.shape
    if len(padded) != len(shape) or any(a not in (1, b) for a, b in zip(padded, shape)):
        raise ValueError(
            f"mask has shape {mask.shape}, but must be broadcastable to (..., N, T, S) = {shape}."
        )
    mask = mask.reshape(padded).astype(bool)
    if any(size > 1 for size in padded[:-3]):
        mask = jnp.broadcast_to(mask, (*shape[:-3], *padded[-3:]))
    return mask.reshape(-1, *padded[-3:])


def _sow(module: Any, weights: jax.Array) -> None:
    if isinstance(module, nn.Module):
        module.sow("intermediates", "attention_weights", weights)
        return
    from flax import nnx  # here, as models in linen need none of it

    module.sow(nnx.Intermediate, "attention_weights", weights)

"""RBF attention through cuDNN's fused dot-product attention, by extra head dimensions.

2γ q·k − λγ‖k‖² = 2γ [q, a, b, c]·[k, h, m, l] where a·h + b·m + c·l = −λ‖k‖²/2 and a, b, c are
powers of two: the norm is split into three parts of the input's own 16-bit dtype, which together
hold about the 24 bits of a float32. cuDNN wants head dimensions in multiples of 8, so 5 zeros
follow where H is one. Where λ is known to be 0 there are no norms, and none of this.

cuDNN applies the scale 2γ as one number known when compiling, so γ must be such a number. Its
backward pass wants even lengths: an odd one gets one more query, whose output is dropped, or one
more key, so far away that its weight is 0.

Not as exact as the others at huge norms: where logits reach 10⁷, that is ‖k‖ about 10⁴, cuDNN's
backward pass gives wrong gradients of v (docs/implementations.md).
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from rbf_jax.ops.call import Inputs, Masking, Options
from rbf_jax.ops.gpu import device
from rbf_jax.ops.parallel import custom_partitioning

_MULTIPLE = 8
# The weights a, b, c. bfloat16 has float32's range. float16 ends at 65,504, loses bits below 6e-5,
# and so do its gradients: the first part holds ‖k‖ up to 23,100 (√λ‖k‖, to be exact; beyond, the
# result is NaN), the others what is too small for the first.
_WEIGHTS = {"bfloat16": (1.0, 1.0, 1.0), "float16": (2.0**12, 2.0, 2.0**-10)}
_PARTS = 3
# The part that takes the gradient: one whose weight neither overflows nor underflows it.
_GRADIENT_PART = 1
# The first part of a key that stands for none: finite times its weight and 2γ, in float32.
_FAR_AWAY = {"bfloat16": -1e30, "float16": -65504.0}


def unsupported(inputs: Inputs, masking: Masking, options: Options) -> str | None:
    """Returns why this call cannot be done here, as the rest of a sentence, or None if it can."""
    H = inputs.query.shape[-1]
    given = [name for name, rule in masking._asdict().items() if rule is not None]
    if (reason := device.unavailable() or custom_partitioning.unsupported()) is not None:
        return reason
    if inputs.query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"supports bfloat16 and float16, not {inputs.query.dtype}"
    if options.static_gamma is None:
        return "needs gamma as one number known when tracing, not an array"
    if given:
        return f"does not support {', '.join(given)}"
    if options.origin_sink:
        return "does not support origin_sink"
    if options.return_residual:
        return "does not return a float32 logsumexp (return_residual, normalize=False)"
    if options.window is not None and not options.is_causal:
        return "supports local_window_size together with is_causal only"
    limit = 256 if device.target().compute_capability >= 90 else 128
    if _augmented_dim(H) > limit:
        return f"supports head dimensions up to {limit - _MULTIPLE} on this GPU, not {H}"
    return None


def attend(inputs: Inputs, masking: Masking, options: Options) -> tuple[jax.Array, None]:
    """The output (B, T, N, H); cuDNN's logsumexp is not passed on, being of 16 bits."""
    del masking  # `unsupported` refused any
    query, key, value = augment(inputs, options)
    with jax.numpy_dtype_promotion("standard"):  # jax.nn does not work in "strict" mode
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=2 * cast(float, options.static_gamma),  # `unsupported` refused None
            is_causal=options.is_causal,
            local_window_size=options.window,
            implementation="cudnn",
        )
    return unpad(out, inputs), None


def unpad(out: jax.Array, inputs: Inputs) -> jax.Array:
    """Cuts the output for augmented inputs to the query's shape."""
    _, T, _, H = inputs.query.shape
    return out[:, :T, :, :H]


def augment(inputs: Inputs, options: Options) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Appends the parts of −λ‖k‖²/2 to the keys, their weight to the queries, zeros to the values.

    Returns:
      query (B, T', N, H'), key and value (B, S', K', H'). H' is H + 3 rounded up to a multiple of
      8, T' and S' are T and S rounded up to even. K' = K, or N where λ is given per query head:
      the heads of a group then differ in their norms. As they are where λ = 0 and nothing is to be
      rounded up.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    N, K, H = query.shape[2], key.shape[2], query.shape[3]
    lengths = query.shape[1], key.shape[1]
    if (
        options.static_key_norm_weight == 0
        and not any(x % 2 for x in lengths)
        and not H % _MULTIPLE
    ):
        return query, key, value
    if options.shared_key_norm_weight:
        key_norm_weight = inputs.key_norm_weight[0]
    else:
        key_norm_weight = inputs.key_norm_weight
        key, value = jnp.repeat(key, N // K, axis=2), jnp.repeat(value, N // K, axis=2)
    weights = _WEIGHTS[query.dtype.name]
    norms = jnp.sum(jnp.square(key.astype(jnp.float32)), axis=-1)
    parts = _split(-0.5 * key_norm_weight * norms, weights, query.dtype)
    extra = jnp.broadcast_to(jnp.asarray(weights, query.dtype), (*query.shape[:-1], _PARTS))
    query = _pad(jnp.concatenate([query, extra], axis=-1), H)
    key = _pad(jnp.concatenate([key, parts], axis=-1), H)
    S = inputs.key.shape[1]
    key = key.at[:, S:, :, H].set(_FAR_AWAY[query.dtype.name])
    return query, key, _pad(value, H)


def _split(x: jax.Array, weights: tuple[float, ...], dtype: jnp.dtype) -> jax.Array:
    """Numbers of the 16-bit `dtype` whose weighted sum is x to about float32's precision, (..., 3).

    One of them takes the gradient, as if it were x over its weight.
    """
    info = jnp.finfo(dtype)
    rest = jax.lax.stop_gradient(x)
    parts = []
    for weight in weights:
        # reduce_precision, since XLA may leave out a cast to 16 bits and back, and its rounding.
        part = jax.lax.reduce_precision(rest / weight, info.nexp, info.nmant)
        rest = rest - weight * part
        parts.append(part.astype(dtype))
    nothing = (x - jax.lax.stop_gradient(x)) / weights[_GRADIENT_PART]
    parts[_GRADIENT_PART] += nothing.astype(dtype)
    return jnp.stack(parts, axis=-1)


def _augmented_dim(head_dim: int) -> int:
    return -(-(head_dim + _PARTS) // _MULTIPLE) * _MULTIPLE


def _pad(array: jax.Array, head_dim: int) -> jax.Array:
    """Zeros up to an even length and the augmented head dimension."""
    odd, missing = array.shape[1] % 2, _augmented_dim(head_dim) - array.shape[-1]
    return jnp.pad(array, [(0, 0), (0, odd), (0, 0), (0, missing)])

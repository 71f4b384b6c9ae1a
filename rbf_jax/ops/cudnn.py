"""The dot product, λ = 0, through cuDNN's fused attention: 2γ q·k is its logit for scale = 2γ.

cuDNN has no place for key norms. Appended as extra head dimensions they were slower than the Triton
kernels at every size, and gave wrong gradients at norms of 10⁴ (docs/kernels.md).
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from rbf_jax.ops.call import Inputs, Masking, Rules
from rbf_jax.ops.gpu import device
from rbf_jax.ops.parallel import custom_partitioning

SUPPORTS = frozenset({"left", "right"})
_MULTIPLE = 8  # of head dimensions


def unsupported(inputs: Inputs, rules: Rules) -> str | None:
    """Returns why this call cannot be done here, as the rest of a sentence, or None if it can."""
    T, _, H = inputs.query.shape[1:]
    S = inputs.key.shape[1]
    reason = device.unavailable() or custom_partitioning.unsupported()
    if reason is not None:
        return reason
    if inputs.query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"supports bfloat16 and float16, not {inputs.query.dtype}"
    if rules.static_key_norm_weight != 0:
        return "computes dot products only, and needs key_norm_weight=0, known when tracing"
    if rules.static_gamma is None:
        return "needs gamma as one number known when tracing, not an array"
    if not rules.causal and (rules.left is not None or rules.right is not None):
        return "supports local_window_size together with is_causal only"
    limit = 256 if device.target().compute_capability >= 90 else 128
    if limit < H or H % _MULTIPLE:
        return f"supports multiples of {_MULTIPLE} up to {limit} as head dimensions, not {H}"
    if (T % 2 or S % 2) and not (rules.causal and T == S):
        return f"supports odd lengths only if causal and T = S, not {T} queries and {S} keys"
    return None


def attend(inputs: Inputs, masking: Masking, rules: Rules) -> tuple[jax.Array, None]:
    """The output (B, T, N, H); cuDNN's logsumexp is not passed on: it has 16 bits."""
    del masking  # `unsupported` refused any
    T = inputs.query.shape[1]
    # Its backward pass wants even lengths; no query sees the key that is added after the last.
    even = [(0, 0), (0, T % 2 if rules.causal else 0), (0, 0), (0, 0)]
    window = None if rules.left is None else (rules.left, 0)
    with jax.numpy_dtype_promotion("standard"):  # jax.nn does not work in "strict" mode
        out = jax.nn.dot_product_attention(
            *(jnp.pad(x, even) for x in inputs[:3]),
            scale=2 * cast(float, rules.static_gamma),  # `unsupported` refused None
            is_causal=rules.causal,
            local_window_size=window,
            implementation="cudnn",
        )
    return out[:, :T], None

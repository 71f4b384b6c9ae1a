"""The custom_vjp around an implementation that has a forward and a backward pass of its own.

With P the attention weights, out = P v and the residuals q, k, v, out and the logsumexp:

    dS = P ∘ (dP − δ),   dP = dout vᵀ,   δ_i = out_i · dout_i − dlogsumexp_i
    dq_i = 2γ Σ_j dS_ij k_j
    dk_j = 2γ Σ_i dS_ij q_i − 2γλ c_j k_j,   c_j = Σ_i dS_ij
    dv_j = Σ_i P_ij dout_i

The column sum c is what RBF adds to the usual backward pass. γ and λ then cost nothing more: the
logits are homogeneous of degree 2 in (q, k), so by Euler's identity, for each head,

    dγ = Σ_i q_i·dq_i / γ − λ Σ_j c_j‖k_j‖²,   dλ = −γ Σ_j c_j‖k_j‖²
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rbf_jax.ops.types import Inputs, Masking, Options

# Names for jax.checkpoint policies, so that remat can keep what is dear to recompute.
OUTPUT_NAME = "rbf_attention_out"
LOGSUMEXP_NAME = "rbf_attention_logsumexp"


class Residuals(NamedTuple):
    """All that the backward pass keeps.

    Attributes:
      inputs: as the caller gave them.
      masking: as the caller gave it.
      out: (B, T, N, H), the input's dtype.
      logsumexp: (B, T, N), accumulation dtype; −inf for rows that may attend to nothing.
    """

    inputs: Inputs
    masking: Masking
    out: jax.Array
    logsumexp: jax.Array


class DotGradients(NamedTuple):
    """What a backward pass returns, in the accumulation dtype: the part without key norms.

    Attributes:
      query: 2γ Σ_j dS_ij k_j, (B, T, N, H).
      key: 2γ Σ_i dS_ij q_i, summed over the heads of a group, (B, S, K, H).
      value: (B, S, K, H).
      column_sums: c_j = Σ_i dS_ij, (B, S, N).
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    column_sums: jax.Array


Forward = Callable[[Inputs, Masking, Options], tuple[jax.Array, jax.Array]]
# (residuals, dout (B, T, N, H), δ (B, T, N) in the accumulation dtype, options)
Backward = Callable[[Residuals, jax.Array, jax.Array, Options], DotGradients]


def with_custom_vjp(forward: Forward, backward: Backward) -> Forward:
    """Returns ``attend(inputs, masking, options) -> (out, logsumexp)`` with the rule above."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def call(options, inputs, masking):
        return forward(inputs, masking, options)

    def call_forward(options, inputs, masking):
        out, logsumexp = forward(inputs, masking, options)
        out = checkpoint_name(out, OUTPUT_NAME)
        logsumexp = checkpoint_name(logsumexp, LOGSUMEXP_NAME)
        return (out, logsumexp), Residuals(inputs, masking, out, logsumexp)

    def call_backward(options, residuals, cotangents):
        dout, dlogsumexp = cotangents
        # The logsumexp of a row that may attend to nothing is the constant −∞.
        dlogsumexp = jnp.where(jnp.isneginf(residuals.logsumexp), 0, dlogsumexp)
        out = residuals.out.astype(dlogsumexp.dtype)
        delta = jnp.sum(out * dout.astype(dlogsumexp.dtype), axis=-1) - dlogsumexp
        gradients = backward(residuals, dout, delta, options)
        return _input_gradients(residuals.inputs, gradients), None

    call.defvjp(call_forward, call_backward)

    def attend(inputs: Inputs, masking: Masking, options: Options):
        return call(options, *_vary_together((inputs, masking)))

    return attend


def _vary_together(arrays):
    """Inside shard_map: lets all arrays vary over every mesh axis that any of them varies over.

    The rule above may then mix them freely; the gradient of one that was the same on all devices is
    summed over them by JAX, as the transpose of this cast.
    """
    axes = frozenset().union(*(_varying_axes(x) for x in jax.tree.leaves(arrays)))

    def cast(x):
        missing = tuple(sorted(axes - _varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def _varying_axes(x: jax.Array) -> frozenset[str]:
    aval = jax.typeof(x)
    if hasattr(aval, "manual_axis_type"):  # jax 0.10.2
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(aval.vma)


def _input_gradients(inputs: Inputs, gradients: DotGradients) -> Inputs:
    """Adds what the key norms contribute, and makes the gradients of γ and λ from the others."""
    dtype = gradients.query.dtype
    query, key = inputs.query.astype(dtype), inputs.key.astype(dtype)
    gamma, key_norm_weight = inputs.gamma, inputs.key_norm_weight
    K = key.shape[2]

    column_sums = gradients.column_sums.reshape(*key.shape[:3], -1)  # B S K G
    norm_weight = (2 * gamma * key_norm_weight).reshape(1, 1, K, -1)
    norm_part = jnp.sum(column_sums * norm_weight, axis=-1, keepdims=True) * key
    key_gradient = gradients.key - norm_part

    key_norms = jnp.sum(key * key, axis=-1, keepdims=True)  # B S K 1
    norm_moment = jnp.sum(column_sums * key_norms, axis=(0, 1)).reshape(gamma.shape)  # N
    query_moment = jnp.sum(query * gradients.query, axis=(0, 1, 3))  # N
    return Inputs(
        query=gradients.query.astype(inputs.query.dtype),
        key=key_gradient.astype(inputs.key.dtype),
        value=gradients.value.astype(inputs.value.dtype),
        gamma=query_moment / gamma - key_norm_weight * norm_moment,
        key_norm_weight=-gamma * norm_moment,
    )

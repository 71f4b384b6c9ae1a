"""The custom_vjp around an implementation that has a forward and a backward pass of its own.

With P the attention weights, out = P v and the residuals q, k, v, out and the logsumexp, the
implementation's backward pass computes

    dS = P ∘ (dP − δ),   dP = dout vᵀ,   δ_i = out_i · dout_i − dlogsumexp_i
    dq_i = 2γ Σ_j dS_ij k_j
    dk_j = 2γ Σ_i dS_ij q_i − 2γλ c_j k_j,   c_j = Σ_i dS_ij
    dv_j = Σ_i P_ij dout_i

The column sum c is what RBF adds to the usual backward pass. γ and λ then cost nothing more: the
logits are homogeneous of degree 2 in (q, k), so by Euler's identity, for each head,

    dγ = Σ_i q_i·dq_i / γ − λ Σ_j c_j‖k_j‖²,   dλ = −γ Σ_j c_j‖k_j‖²

A sink is a key of value 0, so that dP = 0 for it: the gradient of its logit is −Σ_i P_i δ_i, where
P_i is its weight, exp(logit − logsumexp_i).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rbf_jax.ops.call import Inputs, Masking, Rules
from rbf_jax.ops.manual_axes import vary_together

# Names for jax.checkpoint policies, so that remat can keep what is dear to recompute.
OUTPUT_NAME = "rbf_attention_out"
LOGSUMEXP_NAME = "rbf_attention_logsumexp"


class Residuals(NamedTuple):
    """All that the backward pass keeps.

    Attributes:
      inputs: as the caller gave them.
      masking: as the caller gave it.
      out: (B, T, N, H), the input's dtype.
      logsumexp: as the implementation's forward pass returned it.
    """

    inputs: Inputs
    masking: Masking
    out: jax.Array
    logsumexp: jax.Array


class Gradients(NamedTuple):
    """What a backward pass returns.

    Attributes:
      query: (B, T, N, H).
      key: (B, S, K, H).
      value: (B, S, K, H).
      query_moment: Σ_i q_i·dq_i, (N,).
      norm_moment: Σ_j c_j‖k_j‖², (N,).
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    query_moment: jax.Array
    norm_moment: jax.Array


Forward = Callable[[Inputs, Masking, Rules], tuple[jax.Array, jax.Array]]


class Passes(NamedTuple):
    """An implementation that has a forward and a backward pass of its own.

    Attributes:
      forward: returns the output and the logsumexp in a form of its own choice.
      backward: receives residuals with the logsumexp in that form, dout (B, T, N, H), dlogsumexp
        (B, T, N) in the accumulation dtype, and the rules.
      natural_logsumexp: from that form and the inputs makes the natural logarithm, (B, T, N) in the
        accumulation dtype, −inf for rows that may attend to nothing.
      own_logsumexp: the inverse.
    """

    forward: Forward
    backward: Callable[[Residuals, jax.Array, jax.Array, Rules], Gradients]
    natural_logsumexp: Callable[[jax.Array, Inputs], jax.Array] = lambda logsumexp, inputs: (
        logsumexp
    )
    own_logsumexp: Callable[[jax.Array], jax.Array] = lambda logsumexp: logsumexp


def with_custom_vjp(passes: Passes) -> Forward:
    """Returns ``attend(inputs, masking, rules) -> (out, logsumexp)`` with the rule above.

    Args:
      passes: of the implementation.
    """
    forward, backward, natural_logsumexp, _ = passes

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def call(rules, inputs, masking):
        out, logsumexp = forward(inputs, masking, rules)
        return out, natural_logsumexp(logsumexp, inputs)

    def call_forward(rules, inputs, masking):
        out, logsumexp = forward(inputs, masking, rules)
        out = checkpoint_name(out, OUTPUT_NAME)
        logsumexp = checkpoint_name(logsumexp, LOGSUMEXP_NAME)
        residuals = Residuals(inputs, masking, out, logsumexp)
        return (out, natural_logsumexp(logsumexp, inputs)), residuals

    def call_backward(rules, residuals, cotangents):
        dout, dlogsumexp = cotangents
        gradients = backward(residuals, dout, dlogsumexp, rules)
        inputs = residuals.inputs
        gamma, key_norm_weight = inputs.gamma, inputs.key_norm_weight
        query_moment, norm_moment = gradients.query_moment, gradients.norm_moment
        dsink = None
        if inputs.sink_logits is not None:
            logsumexp = natural_logsumexp(residuals.logsumexp, inputs)
            dsink = _sink_gradient(inputs.sink_logits, residuals.out, logsumexp, *cotangents)
        return Inputs(
            query=gradients.query.astype(inputs.query.dtype),
            key=gradients.key.astype(inputs.key.dtype),
            value=gradients.value.astype(inputs.value.dtype),
            gamma=query_moment / gamma - key_norm_weight * norm_moment,
            key_norm_weight=-gamma * norm_moment,
            sink_logits=dsink,
            key_norms=None,  # What they contribute is in the gradient of the keys.
        ), None

    call.defvjp(call_forward, call_backward)

    def attend(inputs: Inputs, masking: Masking, rules: Rules):
        try:
            return call(rules, *vary_together((inputs, masking)))
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(
                "This implementation of RBF attention has no forward-mode derivatives (jvp): it "
                'defines a custom_vjp. implementation="reference" has them; "xla" and "reference" '
                "have the jvp of gradients (forward over reverse)."
            ) from error

    return attend


def _sink_gradient(sink_logits, out, logsumexp, dout, dlogsumexp) -> jax.Array:
    """Returns the gradient of the sinks' logits, (N,)."""
    delta = jnp.einsum("btnh,btnh->btn", out, dout, preferred_element_type=logsumexp.dtype)
    weight = jnp.exp(sink_logits - jnp.where(jnp.isneginf(logsumexp), jnp.inf, logsumexp))
    return -jnp.sum(weight * (delta - dlogsumexp), axis=(0, 1))

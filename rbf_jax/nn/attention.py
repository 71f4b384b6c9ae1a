"""The attention layer: from the residual stream to queries, keys and values, and back."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rbf_jax.nn import cache as caches
from rbf_jax.nn import inspection, positions
from rbf_jax.nn.config import TransformerConfig
from rbf_jax.nn.layers import Norm, output_init, weight_init


class Attention(nn.Module):
    """Causal self attention over registers and text.

    RBF and dot product are one operation, softmax(2γ q·k − λγ‖k‖²): the dot product has λ = 0 and
    γ = scale / 2. So twins differ in mathematics only.

    Attributes:
      config: of the whole model.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: positions.Sinusoids | None = None,
        segment_ids: jax.Array | None = None,
        past: caches.Past | None = None,
    ) -> Any:
        """Applies the layer.

        Args:
          x: (B, R+T, D), registers first, in the compute dtype; with a `Step`, (B, T, D).
          angles: of the T text positions, for "susie" and "rope".
          segment_ids: integer (B, T): text attends to text of its own segment only.
          past: a cache to fill, or to go on from.

        Returns:
          As x, in the compute dtype; with a `past` a pair of it and the cache as it is then.
        """
        config, attention = self.config, self.config.attention
        in_front = caches.registers_in_front(config, past)
        query = self._project(config.num_heads, "query")(x)
        key = self._project(config.kv_heads, "key")(x)
        value = self._project(config.kv_heads, "value")(x)
        if attention.qk_norm:
            query = Norm(config.dtype, in_front, name="query_norm")(query)
            key = Norm(config.dtype, in_front, name="key_norm")(key)
        query, key = self._place(query, key, angles, in_front)
        gamma, key_norm_weight = self._gamma(), self._key_norm_weight()
        sink_logits = self._sink_logits()
        slopes = positions.alibi_slopes(config.num_heads) if config.positions == "alibi" else None
        rules: dict[str, Any] = {
            "segment_ids": segment_ids,
            "window": attention.window,
            "alibi_slopes": slopes,
        }

        out, cache = caches.attend(
            query,
            key,
            value,
            config.num_registers,
            past,
            **rules,
            sink_logits=sink_logits,
            normalize=attention.normalize,
            gamma=gamma,
            key_norm_weight=key_norm_weight,
            implementation=attention.implementation,
        )
        if past is None:
            self._sow(query, key, value, gamma, key_norm_weight, sink_logits, rules)
        if attention.exclusive:
            out = exclude_own_value(out, value)
        out = nn.DenseGeneral(
            config.d_model,
            axis=(-2, -1),
            use_bias=config.use_bias,
            dtype=config.dtype,
            kernel_init=output_init(config.num_layers),
            name="out",
        )(out)
        return out if past is None else (out, cache)

    def _project(self, heads: int, name: str) -> nn.DenseGeneral:
        return nn.DenseGeneral(
            (heads, self.config.head_dim),
            use_bias=self.config.use_bias,
            dtype=self.config.dtype,
            kernel_init=weight_init,
            name=name,
        )

    def _place(self, query, key, angles, in_front):
        """Tells queries and keys where they stand; in float32, whatever their dtype."""
        config = self.config
        if config.positions == "rope":
            query = positions.rotate(query, angles, in_front)
            key = positions.rotate(key, angles, in_front)
        elif config.positions == "susie":
            offsets = positions.SuSiE(config.kv_heads, in_front, name="susie")(angles)
            query, key = positions.add_susie(query, offsets), positions.add_susie(key, offsets)
        return query, key

    def _gamma(self) -> float | jax.Array:
        """γ. Learned, it is its value at the start times exp(log_gamma), log_gamma (N,) from 0."""
        gamma = self.config.attention.initial_gamma(self.config.head_dim)
        if not self.config.attention.learn_gamma:
            return gamma
        log_gamma = self.param("log_gamma", nn.initializers.zeros, (self.config.num_heads,))
        return gamma * jnp.exp(log_gamma)

    def _key_norm_weight(self) -> float | jax.Array:
        weight = self.config.attention.initial_key_norm_weight()
        if not self.config.attention.learn_key_norm_weight:
            return weight
        initializer = nn.initializers.constant(weight)
        return self.param("key_norm_weight", initializer, (self.config.num_heads,))

    def _sink_logits(self) -> float | jax.Array | None:
        """Logits of the virtual key, (N,) if they are learned; None without a virtual key."""
        attention = self.config.attention
        if attention.sink == "learned":
            return self.param("sink_logits", nn.initializers.zeros, (self.config.num_heads,))
        return 0.0 if attention.has_virtual_sink else None

    def _sow(self, query, key, value, gamma, key_norm_weight, sink_logits, rules) -> None:
        if self.is_mutable_collection("intermediates"):
            self._sow_weights(query, key, gamma, key_norm_weight, sink_logits, rules)
            value_norms = jnp.linalg.norm(value.astype(jnp.float32), axis=-1)
            self.sow("intermediates", "value_norms", value_norms)
        if collection := inspection.statistics_collection(self):
            self._sow_statistics(collection, query, key, gamma, key_norm_weight, rules)
            if sink_logits is not None:
                sink_logits = jnp.asarray(sink_logits, jnp.float32)
                sink_logits = jnp.broadcast_to(sink_logits, (self.config.num_heads,))
                self.sow(collection, "sink_logits", sink_logits)

    def _sow_statistics(self, collection, query, key, gamma, key_norm_weight, rules) -> None:
        R, N = self.config.num_registers, self.config.num_heads
        for name, value in {
            "key_norms": jnp.linalg.norm(key.astype(jnp.float32), axis=-1),
            "logit_max": inspection.largest_logit(
                query[:, R:], key, R, gamma=gamma, key_norm_weight=key_norm_weight, **rules
            ),
            "gamma": jnp.broadcast_to(jnp.asarray(gamma, jnp.float32), (N,)),
            "key_norm_weight": jnp.broadcast_to(jnp.asarray(key_norm_weight, jnp.float32), (N,)),
        }.items():
            self.sow(collection, name, value)

    def _sow_weights(self, query, key, gamma, key_norm_weight, sink_logits, rules) -> None:
        """Quadratic in T. Shares: rows sum to 1 where the layer does not normalise, too."""
        R = self.config.num_registers
        T = query.shape[1] - R
        allowed, bias = inspection.causal_rules(jnp.arange(T), T, R, **rules)
        logits = bias + inspection.attention_logits(
            query[:, R:], key, gamma=gamma, key_norm_weight=key_norm_weight
        )
        weights, logsumexp = inspection.attention_weights(logits, allowed, sink_logits)
        self.sow("intermediates", "attention_weights", weights)
        squares = jnp.sum(jnp.square(query[:, R:].astype(jnp.float32)), axis=-1)
        bounds = jnp.where(key_norm_weight > 0, gamma * squares / key_norm_weight, jnp.inf)
        bounds = bounds.swapaxes(1, 2)
        if sink_logits is not None:
            sink_logits = jnp.asarray(sink_logits, jnp.float32)
            bounds = jnp.maximum(bounds, sink_logits[..., None])
        self.sow("intermediates", "bound", bounds)
        self.sow("intermediates", "bound_gap", bounds - logsumexp)


def exclude_own_value(out: jax.Array, value: jax.Array) -> jax.Array:
    """Exclusive self attention: z_i = y_i − (y_i·v_i) v_i / ‖v_i‖², per head (arXiv:2603.09078).

    Args:
      out: y, (B, T, N, H).
      value: v, (B, T, K, H); a query head takes the value of its group's K/V head.

    Returns:
      z, as out, computed in float32; y where v_i is 0.
    """
    y, v = out.astype(jnp.float32), value.astype(jnp.float32)
    # Normalize v by its largest component so that squares cannot underflow.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(v), axis=-1, keepdims=True))
    v = v / jnp.where(largest == 0, 1.0, largest)
    v = jnp.repeat(v, out.shape[2] // value.shape[2], axis=2)
    squared = jnp.sum(v * v, axis=-1, keepdims=True)
    share = jnp.sum(y * v, axis=-1, keepdims=True) / jnp.where(squared == 0, 1.0, squared)
    return (y - share * v).astype(out.dtype)

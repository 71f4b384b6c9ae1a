"""Flax modules around the operation: attention layer, positions, registers, language model."""

from rbf_jax.nn.config import AttentionConfig, TransformerConfig
from rbf_jax.nn.flax_attention import rbf_attention_fn
from rbf_jax.nn.transformer import CausalLM

__all__ = ["AttentionConfig", "CausalLM", "TransformerConfig", "rbf_attention_fn"]

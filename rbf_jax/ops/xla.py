"""The reformulated path for any device."""

from rbf_jax.ops.reference import attend as attend

"""The attention operation. It knows JAX, and nothing of Flax."""

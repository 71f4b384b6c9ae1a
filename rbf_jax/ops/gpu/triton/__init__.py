"""Kernels in Triton, called through jax-triton."""

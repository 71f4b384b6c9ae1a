"""Kernels for Hopper in Pallas Mosaic GPU, which is part of jax."""

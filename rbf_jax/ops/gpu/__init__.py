"""Kernels for NVIDIA GPUs, and what surrounds any of them."""

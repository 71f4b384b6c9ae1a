"""RBF (distance-based) attention for JAX: softmax(−γ‖q−k‖²)v.

``from rbf_jax import rbf_attention`` needs JAX only; ``rbf_jax.nn`` needs Flax, and
``rbf_jax.data`` and ``rbf_jax.training`` the packages of the extra ``train``.

One legend of letters for every shape in this project:
B batch, T query length, S key length, N query heads, K key/value heads, G = N / K,
H head dimension, D model width, L layers, R register tokens, V vocabulary.
"""

from rbf_jax.ops.api import rbf_attention

__all__ = ["__version__", "rbf_attention"]

__version__ = "0.1.0"

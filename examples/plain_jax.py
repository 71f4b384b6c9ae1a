"""A causal layer in plain JAX: parameters are a dict, and of this package it needs `rbf_attention`.

python examples/plain_jax.py
"""

import jax
import jax.numpy as jnp

from rbf_jax import rbf_attention

B, T, N, D = 8, 16, 4, 32


def init(key: jax.Array) -> dict[str, jax.Array]:
    """Projections, and γ per head by its logarithm."""
    names = ("query", "key", "value", "out")
    keys = jax.random.split(key, len(names))
    params = {name: jax.random.normal(k, (D, D)) / D**0.5 for name, k in zip(names, keys)}
    return {**params, "log_gamma": jnp.full(N, jnp.log((D / N) ** -0.5))}


def layer(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """(B, T, D) → (B, T, D)."""
    query, key, value = (
        (x @ params[name]).reshape(*x.shape[:2], N, D // N) for name in ("query", "key", "value")
    )
    gamma = jnp.exp(params["log_gamma"])
    out = rbf_attention(query, key, value, gamma=gamma, is_causal=True)
    return x + out.reshape(x.shape) @ params["out"]


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean squared error."""
    return jnp.mean((layer(params, x) - y) ** 2)


@jax.jit
def step(params, x, y):
    """One step of gradient descent."""
    value, gradients = jax.value_and_grad(loss)(params, x, y)
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients), value


def main() -> None:
    """Learns the mean of what came before."""
    params = init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    y = jnp.cumsum(x, axis=1) / jnp.arange(1, T + 1)[:, None]
    losses = []
    for _ in range(200):
        params, value = step(params, x, y)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, gamma {jnp.exp(params['log_gamma'])}")
    assert losses[-1] < 0.5 * losses[0]


if __name__ == "__main__":
    main()

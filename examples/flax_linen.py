"""RBF attention in flax.linen's own layer: masks, training, and Flax's cache for decoding.

python examples/flax_linen.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from rbf_jax.nn import rbf_attention_fn

B, T, D = 4, 8, 16


def attention(decode: bool = False) -> nn.MultiHeadDotProductAttention:
    """Flax's layer, with our operation."""
    return nn.MultiHeadDotProductAttention(
        num_heads=2, decode=decode, attention_fn=rbf_attention_fn
    )


def main() -> None:
    """Trains with causal and padding masks, then decodes token by token."""
    x, y = jax.random.normal(jax.random.key(0), (2, B, T, D))
    real = jnp.arange(T) < jnp.array([8, 8, 5, 3])[:, None]
    mask = nn.combine_masks(nn.make_causal_mask(real), nn.make_attention_mask(real, real))
    params = attention().init(jax.random.key(1), x)["params"]
    optimizer = optax.adam(1e-2)

    def loss(params):
        out = attention().apply({"params": params}, x, mask=mask)
        return jnp.mean((out - y) ** 2, where=real[..., None])

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(100):
        params, state, value = step(params, state)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.8 * losses[0]

    whole = attention().apply({"params": params}, x, mask=nn.make_causal_mask(real))
    cache = attention(decode=True).init(jax.random.key(1), x)["cache"]
    for t in range(T):
        variables = {"params": params, "cache": cache}
        out, new = attention(decode=True).apply(variables, x[:, t : t + 1], mutable=["cache"])
        cache = new["cache"]
        assert jnp.allclose(out[:, 0], whole[:, t], atol=1e-5), t
    print("decoding with Flax's cache gives the same")


if __name__ == "__main__":
    main()

"""RBF attention in flax.nnx's own layer: masks, training, and Flax's cache for decoding.

python examples/flax_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rbf_jax.nn import rbf_attention_fn

B, T, D = 4, 8, 16


def main() -> None:
    """Trains with causal and padding masks, then decodes token by token."""
    layer = nnx.MultiHeadAttention(
        num_heads=2, in_features=D, decode=False, attention_fn=rbf_attention_fn, rngs=nnx.Rngs(0)
    )
    x, y = jax.random.normal(jax.random.key(0), (2, B, T, D))
    real = jnp.arange(T) < jnp.array([8, 8, 5, 3])[:, None]
    causal = nnx.make_causal_mask(real)
    mask = nnx.combine_masks(causal, nnx.make_attention_mask(real, real))
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        def loss(layer):
            return jnp.mean((layer(x, mask=mask) - y) ** 2, where=real[..., None])

        value, gradients = nnx.value_and_grad(loss)(layer)
        optimizer.update(layer, gradients)
        return value

    losses = [float(step(layer, optimizer)) for _ in range(100)]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.8 * losses[0]

    whole = layer(x, mask=causal)
    layer.init_cache(x.shape)
    for t in range(T):
        out = layer(x[:, t : t + 1], decode=True)
        assert jnp.allclose(out[:, 0], whole[:, t], atol=1e-5), t
    print("decoding with Flax's cache gives the same")


if __name__ == "__main__":
    main()

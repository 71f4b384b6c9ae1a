"""Small models with random parameters, registers too: at their zeros much would go unseen."""

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax.nn import AttentionConfig, CausalLM, TransformerConfig

VOCAB, LENGTH = 17, 12


def small_config(attention=None, **changes) -> TransformerConfig:
    """Two registers, none with the sink "none", unless `changes` say otherwise."""
    attention = AttentionConfig(**(attention or {}))
    fields = {
        "vocab_size": VOCAB,
        "context_length": LENGTH,
        "num_layers": 2,
        "d_model": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_registers": None if attention.sink == "none" else 2,
        "tie_embeddings": False,
        "attention": attention,
    }
    return TransformerConfig(**fields | changes)


def random_variables(module, *args, seed=0, scale=0.4):
    """Variables of the shapes that `module.init` gives, all normal."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype), shapes)


def small_model(attention=None, seed=0, **changes):
    """Returns (model, variables)."""
    model = CausalLM(small_config(attention, **changes))
    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    return model, random_variables(model, tokens, seed=seed)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def primitives(jaxpr):
    """All equations of a jaxpr, those of its loops, branches and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)
